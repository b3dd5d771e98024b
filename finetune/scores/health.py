"""Signs of a generation gone wrong: per row as 0 or 100, so that their mean is a share in percent."""

from __future__ import annotations

import re
from collections.abc import Sequence

MIN_REPEATS = 3  # said twice may be meant
MIN_SPAN = 20  # characters; shorter runs are dots, dashes and exclamations
SURE_REPEAT = 14  # characters of a loop's end that stand one unit earlier too: 20 less a unit of 6, or 2 units of 7

_LETTER = re.compile(r"[^\W\d_]")  # of any script
_CHINESE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")
_FOREIGN = re.compile(f"(?!{_CHINESE.pattern})[^\\W\\d_]")


def never_stopped(finish_reason: str) -> float:
    """Whether the token limit cut the text off."""
    return 100.0 * (finish_reason == "length")


def empty(text: str) -> float:
    """Whether nothing but white space came out."""
    return 100.0 * (not text.strip())


def exact(prediction: str, reference: str) -> float:
    """Whether the texts are equal but for white space around them."""
    return 100.0 * (prediction.strip() == reference.strip())


def length(predictions: Sequence[str], *, references: Sequence[str]) -> float:
    """Characters for every hundred of the references'; well below 100 is a base that answers too briefly."""
    expected = sum(len(text.strip()) for text in references)
    return 100.0 * sum(len(text.strip()) for text in predictions) / max(1, expected)


def not_chinese(prediction: str, reference: str) -> float | None:
    """Share of the prediction's letters that are not Chinese, where most of the reference's are; else None."""
    return _foreign_share(prediction) if _foreign_share(reference) < 50.0 and _CHINESE.search(reference) else None


def _foreign_share(text: str) -> float:
    if not _FOREIGN.search(text):  # most texts
        return 0.0
    num_letters = len(_LETTER.findall(text))
    return 100.0 - 100.0 * len(_CHINESE.findall(text)) / num_letters


def looping(text: str) -> float:
    """Whether the text ends in a loop: a tail of at least `MIN_SPAN` characters that is one unit, `MIN_REPEATS` times.

    The unit has any length, and its last occurrence may be cut off anywhere, as a token limit does; also within a
    character, which then decodes to U+FFFD.
    """
    backwards = text.rstrip().rstrip("\ufffd")[::-1]
    end = backwards[:SURE_REPEAT]
    unit = backwards.find(end, 1)
    while 0 < unit <= len(backwards) // MIN_REPEATS and len(backwards) >= MIN_SPAN:
        span = max(MIN_REPEATS * unit, MIN_SPAN)
        if backwards.startswith(backwards[unit:span]):
            return 100.0
        unit = backwards.find(end, unit + 1)
    return 0.0
