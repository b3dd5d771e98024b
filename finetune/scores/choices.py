"""Answers that are one of several choices: which one is meant, accuracy and F1 over a task.

What is scored is the answer as it stands, as PromptCBLUE does. An answer from which exactly one choice can still be
read (`答案：相关。`) is a failure of format, counted apart from a wrong choice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

NONE_OF_THESE = "非上述类型"  # an answer to every question with choices of PromptCBLUE, listed or not


def read_choice(answer: str, *, choices: Sequence[str]) -> str | None:
    """The one choice that occurs in the answer; None when none or several do. `不相关` is not also `相关`."""
    rest, found = answer, set()
    for choice in sorted({*choices, NONE_OF_THESE} - {""}, key=len, reverse=True):
        if choice in rest:
            found.add(choice)
            rest = rest.replace(choice, "\n")
    return found.pop() if len(found) == 1 else None


def accuracy(answers: Sequence[str], *, references: Sequence[str]) -> float:
    """Share of equal pairs, in percent."""
    return 100.0 * sum(map(str.__eq__, answers, references)) / len(answers) if answers else 0.0


def f1_micro(answers: Sequence[str], *, references: Sequence[str], labels: Sequence[set[str]]) -> float:
    """F1 of all decisions together. An answer outside its row's labels decides nothing: it costs recall only."""
    pairs = list(zip(answers, references, labels, strict=True))
    num_decided = sum(answer in known for answer, _, known in pairs)
    num_right = sum(answer == reference for answer, reference, _ in pairs)
    return 200.0 * num_right / (num_decided + len(pairs)) if pairs else 0.0


def f1_macro(answers: Sequence[str], *, references: Sequence[str]) -> float:
    """Mean F1 over the labels that occur on either side, an answer outside the choices being a label of its own."""
    scores = _f1_by_label(answers, references)
    return sum(scores.values()) / len(scores) if scores else 0.0


def f1_weighted(answers: Sequence[str], *, references: Sequence[str]) -> float:
    """Mean F1 over the labels, weighted by how many references have them; PromptCBLUE calls it micro-F1."""
    scores, support = _f1_by_label(answers, references), Counter(references)
    return sum(scores[label] * count for label, count in support.items()) / len(references) if references else 0.0


def _f1_by_label(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    predicted, expected = Counter(answers), Counter(references)
    right = Counter(answer for answer, reference in zip(answers, references, strict=True) if answer == reference)
    labels = sorted(predicted.keys() | expected.keys())
    return {label: 200.0 * right[label] / (predicted[label] + expected[label]) for label in labels}
