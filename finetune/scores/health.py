"""Signs of a generation gone wrong, per row, as 0 or 100 (so that their mean is a share in percent)."""

from __future__ import annotations

MIN_REPEATS = 3  # said twice may be meant
MIN_SPAN = 20  # characters; shorter runs are dots, dashes and exclamations


def never_stopped(finish_reason: str) -> float:
    """Whether the token limit cut the text off."""
    return 100.0 * (finish_reason == "length")


def empty(text: str) -> float:
    """Whether nothing but white space came out."""
    return 100.0 * (not text.strip())


def exact(prediction: str, reference: str) -> float:
    """Whether the texts are equal but for white space around them."""
    return 100.0 * (prediction.strip() == reference.strip())


def looping(text: str) -> float:
    """Whether the text ends in a loop: a tail of at least `MIN_SPAN` characters that is one unit, `MIN_REPEATS` times.

    The unit has any length, and its last occurrence may be cut off anywhere, as a token limit does.
    """
    backwards = text.rstrip()[::-1]
    units = range(1, len(backwards) // MIN_REPEATS + 1)
    return 100.0 * any(_has_period(backwards, unit) for unit in units)


def _has_period(text: str, unit: int) -> bool:
    """Whether the first `MIN_SPAN` characters and `MIN_REPEATS` units of the text repeat every `unit` characters."""
    span = max(MIN_REPEATS * unit, MIN_SPAN)
    return span <= len(text) and text.startswith(text[unit:span])
