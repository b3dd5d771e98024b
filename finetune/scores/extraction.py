"""Answers that list things: text -> set of facts, as PromptCBLUE parses each kind, and F1 over such sets.

The parsers are strict, as the benchmark's are. An answer that has more right facts once it is forgiven half-width marks
and a missing first line is a failure of format, counted apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

Fact = tuple[str, ...]
EVENT_FIELDS = ("主体词", "发生状态", "描述词", "解剖部位")
EVENT_LISTS = ("描述词", "解剖部位")
FULL_WIDTH = str.maketrans(":,;", "：，；")


class Facts(NamedTuple):
    """What an answer says. `form`: it has the shape of an answer; `foreign`: it names what was no choice."""

    found: frozenset[Fact]
    form: bool
    foreign: bool


def entities(answer: str, choices: Sequence[str]) -> Facts:
    """(mention, type) of lines `TYPE实体：m1，m2`, for the types asked."""
    lines = answer.split("\n")
    heads = [line.split("实体：")[0] for line in lines if "实体：" in line]
    found = [
        (mention, choice)
        for choice in choices for line in lines if line.startswith(f"{choice}实体")
        for mention in _list(line.replace(f"{choice}实体：", ""))
    ]  # fmt: skip
    return Facts(frozenset(found), form=any(head in choices for head in heads), foreign=bool(set(heads) - set(choices)))


def relations(answer: str, choices: Sequence[str]) -> Facts:
    """(subject, predicate, object) of lines `具有REL关系的头尾实体对如下：头实体为A，尾实体为B。…`."""
    found, predicates = [], []
    for line in answer.split("\n"):
        predicate = line.split("关系的头尾实体对")[0][2:].strip()
        if "关系的头尾实体对" in line:
            predicates.append(predicate)
        for pair in line.replace(f"具有{predicate}关系的头尾实体对如下：", "").split("。"):
            if "，尾实体为" in pair:
                subject, object_ = pair.split("，尾实体为")[:2]
                found.append(
                    (subject.replace("头实体为", "").strip(), predicate, object_.replace("尾实体为", "").strip())
                )
    return Facts(frozenset(found), form=bool(predicates), foreign=bool(set(predicates) - set(choices)))


def events(answer: str, choices: Sequence[str] = ()) -> Facts:
    """Whole events of the lines after the first, fields joined by `；`; a list's order is part of the event."""
    lines = answer.split("\n")[1:]
    form = any(line.startswith("主体词：") for line in lines)
    return Facts(frozenset(map(_event, lines)), form=form, foreign=False)


def _event(line: str) -> Fact:
    values = dict.fromkeys(EVENT_FIELDS, "")
    for part in line.split("；"):
        for field in EVENT_FIELDS:
            if part.startswith(f"{field}："):
                part = part.replace(f"{field}：", "").strip()
                values[field] = "，".join(_list(part)) if field in EVENT_LISTS else part
    return tuple(values.values())


def terms(answer: str, choices: Sequence[str]) -> Facts:
    """Standard terms of the last line, joined by `，`; terms outside the choices are dropped."""
    named = _list(answer.split("\n")[-1])
    found = {(term,) for term in named if term in choices}
    return Facts(frozenset(found), form=bool(found), foreign=any(term not in choices for term in named))


def verdicts(answer: str, choices: Sequence[str], *, unknown: str = "不标注") -> Facts:
    """(finding, verdict) of the lines `FINDING：VERDICT` after the first; an unknown verdict becomes `unknown`."""
    pairs = [line.split("：") for line in answer.split("\n")[1:]]
    pairs = [pair for pair in pairs if len(pair) == 2]
    found = {(finding.strip(), verdict if verdict in choices else unknown) for finding, verdict in pairs}
    return Facts(frozenset(found), form=bool(pairs), foreign=any(verdict not in choices for _, verdict in pairs))


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split("，") if part.strip()]


def forgive(answer: str) -> list[str]:
    """The answer with full-width marks, and the same with a first line in front."""
    widened = answer.translate(FULL_WIDTH)
    return [widened, f"\n{widened}"]


def precision_recall_f1(counts: Iterable[tuple[int, int, int]]) -> dict[str, float]:
    """Micro average in percent of rows of (right, predicted, expected) counts; all 0 when nothing is right."""
    right, predicted, expected = (sum(column) for column in zip(*counts, (0, 0, 0), strict=True))
    return {
        "precision": 100.0 * right / predicted if right else 0.0,
        "recall": 100.0 * right / expected if right else 0.0,
        "f1": 200.0 * right / (predicted + expected) if right else 0.0,
    }
