"""ROUGE-1/2/L as F1 in percent, over tokens, in two conventions.

*Sets*: every n-gram counts once, as in `rouge` and `rouge_chinese`, which the published Chinese tables use.
*Multisets*: every occurrence counts, Lin's and Google's definition (Lin 2004, `rouge_score`).
A reference said eight times over scores ROUGE-1/2/L 100/98/22 by sets and 22/22/22 by multisets.
An empty prediction or reference scores 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

# `rouge_chinese` 1.0.3 cuts into sentences before it splits at spaces; see `sentence_words`
_SENTENCE_ENDS = (
    re.compile(r"([。！？?])([^”’])"),
    re.compile(r"(\.{6})([^”’])"),
    re.compile(r"(…{2})([^”’])"),
    re.compile(r"([。！？?][”’])([^，。！？?])"),
)


def rouge_sets(prediction: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """Score with each n-gram counted once; equals `rouge_chinese` to 1e-6 on the same tokens."""
    ours, theirs = sentence_words(prediction), sentence_words(reference)
    scores = {}
    for n in (1, 2):
        left, right = set(ngrams(ours, n=n)), set(ngrams(theirs, n=n))
        scores[f"rouge-{n}"] = f1(len(left & right), num_predicted=len(left), num_expected=len(right))
    return scores | {"rouge-l": _rouge_l(ours, theirs)}


def rouge_multisets(prediction: Sequence[str], reference: Sequence[str]) -> dict[str, float]:
    """Score with each n-gram counted as often as it occurs; equals `rouge_score` on the same tokens."""
    scores = {}
    for n in (1, 2):
        left, right = Counter(ngrams(prediction, n=n)), Counter(ngrams(reference, n=n))
        overlap = (left & right).total()
        scores[f"rouge-{n}"] = f1(overlap, num_predicted=left.total(), num_expected=right.total())
    return scores | {"rouge-l": _rouge_l(prediction, reference)}


def _rouge_l(prediction: Sequence[str], reference: Sequence[str]) -> float:
    overlap = common_subsequence_length(prediction, reference)
    return f1(overlap, num_predicted=len(prediction), num_expected=len(reference))


def f1(overlap: int, *, num_predicted: int, num_expected: int) -> float:
    """F1 in percent; 0 when either side has nothing. `rouge_chinese` adds 1e-8 below the line: 5e-7 points at most."""
    return 200.0 * overlap / (num_predicted + num_expected) if overlap else 0.0


def ngrams(tokens: Sequence[str], *, n: int) -> Iterable[tuple[str, ...]]:
    """Every run of n tokens, in order."""
    return zip(*(tokens[start:] for start in range(n)), strict=False)


def sentence_words(tokens: Sequence[str]) -> list[str]:
    """The words that `rouge_chinese` sees: cut into sentences, then at spaces; a blank sentence is an empty word.

    It matters for text with line breaks (two of them in a row are a word) and for marks within a token (`a?b` is two).
    """
    text = " ".join(tokens)
    for pattern in _SENTENCE_ENDS:
        text = pattern.sub(r"\1\n\2", text)
    sentences = [sentence for sentence in text.rstrip().split("\n") if sentence]
    return [word for sentence in sentences for word in sentence.split() or [""]]


def common_subsequence_length(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence, one bit a token (Hyyrö 2004): no table, no recursion."""
    positions: dict[str, int] = {}
    for index, token in enumerate(left):
        positions[token] = positions.get(token, 0) | 1 << index
    all_bits = (1 << len(left)) - 1
    free = all_bits  # a cleared bit is one token of the subsequence
    for token in right:
        matched = free & positions.get(token, 0)
        free = (free + matched) | (free - matched)
    return (~free & all_bits).bit_count()
