"""Predictions -> the scores of each row, and their means by task. Everything is a percentage, rounded nowhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from finetune.scores import health
from finetune.scores.conventions import rouge

Scores = dict[str, float]


def score_rows(predictions: Sequence[Mapping[str, Any]]) -> list[Scores]:
    """Score each prediction (`prediction`, `reference`, `finish_reason`) by itself, in the order given."""
    return [score_row(row) for row in predictions]


def score_row(row: Mapping[str, Any]) -> Scores:
    """Score one prediction against its reference."""
    prediction, reference = row["prediction"], row["reference"]
    return {
        **rouge(prediction, reference),
        "exact": health.exact(prediction, reference),
        "empty": health.empty(prediction),
        "never_stopped": health.never_stopped(row["finish_reason"]),
        "looping": health.looping(prediction),
    }


def aggregate(predictions: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean scores: `tasks` by task name, and `mean`, the plain mean over the tasks (of `num_rows` the sum).

    Rows that carry their `scores` are believed; the others are scored here.
    """
    by_task: dict[str, list[Scores]] = defaultdict(list)
    for row in predictions:
        by_task[row["task"]].append(row.get("scores") or score_row(row))
    tasks = {task: _means(rows) | {"num_rows": len(rows)} for task, rows in sorted(by_task.items())}
    return {"mean": _means(list(tasks.values())) | {"num_rows": len(predictions)}, "tasks": tasks}


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """The mean of each score over the rows that have it."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: fmean(row[name] for row in rows if name in row) for name in names}
