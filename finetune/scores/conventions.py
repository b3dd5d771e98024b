"""ROUGE of two texts in its four conventions: by jieba's words or by characters, n-grams as sets or as multisets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean
from typing import NamedTuple

from finetune.scores.characters import characters
from finetune.scores.rouge import Counted, count, rouge_multisets, rouge_sets
from finetune.scores.segment import segment

Scores = dict[str, float]

# `rouge_chinese` 1.0.3 cuts into sentences before it splits at spaces; see `sentence_words`
_SENTENCE_ENDS = (
    re.compile(r"([。！？?])([^”’])"),
    re.compile(r"(\.{6})([^”’])"),
    re.compile(r"(…{2})([^”’])"),
    re.compile(r"([。！？?][”’])([^，。！？?])"),
)
_MARK_IN_WORD = re.compile(r"[。！？?…”’]\S")  # jieba's words have none; tokens of others may


class Text(NamedTuple):
    """A text, counted for every convention."""

    words: Counted
    sentence_words: Counted  # as `rouge_chinese` sees them
    characters: Counted


def rouge(prediction: str, reference: str) -> Scores:
    """ROUGE-1/2/L as F1 in percent: `rouge-1` is by words and sets; `-char` and `-multiset` name the others."""
    ours, theirs = count_text(prediction), count_reference(reference)
    return {
        **rouge_sets(ours.sentence_words, theirs.sentence_words),
        **_named("-multiset", rouge_multisets(ours.words, theirs.words)),
        **_named("-char", rouge_sets(ours.characters, theirs.characters)),
        **_named("-char-multiset", rouge_multisets(ours.characters, theirs.characters)),
    }


def mean_rouge(predictions: Sequence[str], *, references: Sequence[str]) -> Scores:
    """`rouge`, averaged over the pairs; nothing for no pairs."""
    rows = [rouge(*pair) for pair in zip(predictions, references, strict=True)]
    return {name: fmean(row[name] for row in rows) for name in rows[0]} if rows else {}


def count_text(text: str) -> Text:
    """Segment and count."""
    pieces = segment(text)
    visible = [piece for piece in pieces if not piece.isspace()]
    words = count(visible)
    seen = sentence_words(pieces)
    return Text(words, words if seen == visible else count(seen), count(characters(text)))


count_reference = lru_cache(maxsize=1 << 13)(count_text)  # every method of a study has the same references


def sentence_words(pieces: Sequence[str]) -> list[str]:
    """The words that `rouge_chinese` sees: cut into sentences, then at spaces; a blank sentence is an empty word.

    It matters for text with line breaks (two of them in a row are a word) and for long rows of dots.
    """
    text = " ".join(pieces)
    if "\n" not in text and "......" not in text and not _MARK_IN_WORD.search(text):
        return text.split()  # the usual case: no sentence is blank, no word holds the end of one
    for pattern in _SENTENCE_ENDS:
        text = pattern.sub(r"\1\n\2", text)
    sentences = [sentence for sentence in text.rstrip().split("\n") if sentence]
    return [word for sentence in sentences for word in sentence.split() or [""]]


def _named(suffix: str, scores: Scores) -> Scores:
    return {name + suffix: score for name, score in scores.items()}
