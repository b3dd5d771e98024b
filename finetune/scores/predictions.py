"""Predictions -> the scores of each row and of each task. Everything is in percent, rounded nowhere."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from finetune.scores import health, kinds
from finetune.scores.conventions import rouge
from finetune.scores.overlap import bleu_and_chrf, count_overlap
from finetune.scores.provenance import provenance

Row = Mapping[str, Any]


def score_rows(predictions: Sequence[Row]) -> list[dict[str, Any]]:
    """Score each prediction (a line of predictions.jsonl, without its scores) by itself, in the order given."""
    return [score_row(row) for row in predictions]


def score_row(row: Row) -> dict[str, Any]:
    """Score one prediction; `kind`, `task` and `choices` decide what is added to the scores that every row has."""
    prediction, reference = row["prediction"], row["reference"]
    foreign = health.not_chinese(prediction, reference)
    return {
        **rouge(prediction, reference),
        "exact": health.exact(prediction, reference),
        "empty": health.empty(prediction),
        "never_stopped": health.never_stopped(row["finish_reason"]),
        "looping": health.looping(prediction),
        **({} if foreign is None else {"not_chinese": foreign}),
        **kinds.score_row(row),
        "overlap": count_overlap(prediction, reference),
    }


def aggregate(predictions: Sequence[Row]) -> dict[str, Any]:
    """Scores by task name in `tasks`, and in `mean` the plain mean over the tasks that have a score (`num_rows`: sum).

    Rows that carry their `scores` are believed; the others are scored here. `scorer` says what the scores mean.
    """
    by_task: dict[str, list[Row]] = defaultdict(list)
    for row in predictions:
        by_task[row["task"]].append(row if row.get("scores") else {**row, "scores": score_row(row)})
    tasks = {task: _score_task(rows) for task, rows in sorted(by_task.items())}
    return {
        "mean": _means(tasks.values()) | {"num_rows": sum(task["num_rows"] for task in tasks.values())},
        "tasks": tasks,
        "scorer": provenance(),
    }


def _score_task(rows: Sequence[Row]) -> dict[str, Any]:
    """The means of the row scores, and what is no mean: corpus scores, F1 over all rows, the official score.

    Rows asked in other words (`template` above 0) count only for `rewording_drop`.
    """
    asked, reworded = ([row for row in rows if bool(row.get("template")) is other] for other in (False, True))
    asked = asked or reworded
    predictions, references = ([row[side] for row in asked] for side in ("prediction", "reference"))
    return {
        **_means(row["scores"] for row in asked),
        **bleu_and_chrf(_overlap(row) for row in asked),
        "length": health.length(predictions, references=references),
        **kinds.score_task(asked),
        **_rewording_drop(asked, reworded),
        "num_rows": len(asked),
    }


def _overlap(row: Row) -> Sequence[int]:
    return row["scores"].get("overlap") or count_overlap(row["prediction"], row["reference"])


def _rewording_drop(asked: Sequence[Row], reworded: Sequence[Row]) -> dict[str, float]:
    """Points of ROUGE-L that the same rows lose when they are asked in other words."""
    if not reworded:
        return {}
    own = {row["id"]: row["scores"]["rouge-l"] for row in asked}
    lost = [own[row["id"]] - row["scores"]["rouge-l"] for row in reworded if row["id"] in own]
    return {"rewording_drop": fmean(lost)} if lost else {}


def _means(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of each number over the rows that have it."""
    values: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        for name, value in row.items():
            if isinstance(value, (int, float)):
                values[name].append(value)
    return {name: fmean(numbers) for name, numbers in values.items()}
