"""A study -> the numbers behind report.html's figures, packed so that no text of a run is ever part of the markup."""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from finetune.reporting.browser import NUM_RANDOM, NUM_WORST, browser
from finetune.reporting.cells import Cell, done
from finetune.reporting.columns import CONVENTIONS, COST, Column, rouge
from finetune.reporting.compare import Comparison
from finetune.reporting.lines import load
from finetune.reporting.study import Study
from finetune.reporting.tables import absent_word, num_seeds, topics, values
from finetune.reporting.words import CHINESE

MAX_BROWSER = 6_000_000  # bytes of the packed browser, so that the page stays under 8 MB
POINTS = 100  # of a loss curve


def pack(value: Any) -> str:
    """JSON, compressed, in base64: 48 MB of answers become 5, and nothing in it can end a script."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode(errors="replace")
    return base64.b64encode(gzip.compress(text, 6, mtime=0)).decode()


def page_data(study: Study) -> dict[str, Any]:
    """Everything but the browser."""
    return {
        "words": CHINESE,
        "tasks": [_task(study, task) for task in dict.fromkeys(cell.task for cell in study.cells)],
        "lead": _title(rouge(study.convention)[2]),
        "comparisons": [_comparison(comparison) for comparison in study.comparisons],
        "curves": [curve for cell in study.cells for curve in _curves(cell)],
    }


def packed_browser(study: Study) -> str:
    """The browser's rows; fewer of each kind where all would make the page too big."""
    share = 1.0
    while True:
        packed = pack(browser(study, num_worst=int(NUM_WORST * share), num_random=int(NUM_RANDOM * share)))
        if len(packed) <= MAX_BROWSER or share < 0.05:
            return packed
        share *= 0.9 * MAX_BROWSER / len(packed)


def _task(study: Study, task: str) -> dict[str, Any]:
    """Numbers by part of the rows; `scores` and `costs` tell which, `better` which way is better."""
    cells = [cell for cell in study.cells if cell.task == task]
    parts = ["mean", *sorted({part for cell in cells for run in done(cell) for part in run.scores} - {"mean"})]
    scores = _all_scores(study.convention) + tuple(column for group in topics(cells).values() for column in group)
    places = {
        (standing.cell.model, standing.cell.method): standing.place
        for comparison in study.comparisons if comparison.task == task for standing in comparison.standings
    }  # fmt: skip
    return {
        "name": task,
        "parts": parts,
        "scores": [[_title(column), column.better] for column in scores],
        "costs": [column.title for column in COST],
        "cells": [
            _cell(cell, parts=parts, scores=scores) | {"place": places.get((cell.model, cell.method), "")}
            for cell in cells
        ],
    }


def _all_scores(convention: str) -> tuple[Column, ...]:
    """ROUGE in the report's convention first, then in the others."""
    conventions = sorted(CONVENTIONS, key=lambda name: name != convention)
    return tuple(column for name in conventions for column in rouge(name))


def _title(column: Column) -> str:
    ending = column.key[8:] if column.key.startswith("rouge-") and column.key != "rouge-l-sections" else ""
    return f"{column.title} ({ending})" if ending else column.title


def _cell(cell: Cell, *, parts: Sequence[str], scores: Sequence[Column]) -> dict[str, Any]:
    """`values`: by part, mean and spread over seeds of each score, null where there is none; `costs` are means."""
    return {
        "model": cell.model,
        "method": cell.method,
        "state": "done" if done(cell) else absent_word(cell),
        "seeds": num_seeds(cell),
        "failed": [f"{name}: {note}" for run in done(cell) for name, note in run.failed_checks.items()],
        "reason": next((run.reason for run in cell.runs if run.reason), ""),
        "values": {part: [_spread(values(cell, part=part, column=column)) for column in scores] for part in parts},
        "costs": [_mean(values(cell, part="mean", column=column)) for column in COST],
    }


def _mean(numbers: Sequence[float]) -> float | None:
    return float(f"{fmean(numbers):.6g}") if numbers else None


def _spread(numbers: Sequence[float]) -> list[float | None] | None:
    return [_mean(numbers), float(f"{stdev(numbers):.3g}") if len(numbers) > 1 else None] if numbers else None


def _comparison(comparison: Comparison) -> dict[str, Any]:
    standings = [
        {
            "method": standing.cell.method,
            "mean": round(standing.mean, 3),
            "low": round(standing.interval[0], 3),
            "high": round(standing.interval[1], 3),
            "place": standing.place or "below",
        }
        for standing in comparison.standings
    ]
    return {"task": comparison.task, "model": comparison.model, "score": comparison.score, "standings": standings}


def _curves(cell: Cell) -> list[dict[str, Any]]:
    """Training and validation loss of the cell's first seed, a hundred points each."""
    if not done(cell):
        return []
    steps = read_steps(done(cell)[0].folder)
    same = {"task": cell.task, "model": cell.model, "method": cell.method}
    parts = {"train": "loss", "valid": "valid_loss"}
    points = {part: _points(steps, name) for part, name in parts.items()}
    return [same | {"part": part, "points": found} for part, found in points.items() if found]


def read_steps(folder: Path) -> list[Mapping[str, Any]]:
    """The lines of steps.jsonl that can be read."""
    found = []
    try:
        lines = (folder / "steps.jsonl").read_bytes().split(b"\n")
    except OSError:
        return []
    for line in lines:
        try:
            row = load(line)
        except ValueError:
            continue
        if isinstance(row, Mapping):
            found.append(row)
    return found


def _points(steps: Sequence[Mapping[str, Any]], name: str) -> list[list[float]]:
    """At most a hundred points, each the mean of its steps: the loss of one step is noise."""
    numbers = (int, float)
    points = [
        (row["step"], row[name])
        for row in steps
        if isinstance(row.get(name), numbers) and isinstance(row.get("step"), numbers) and abs(row[name]) < 1e6
    ]
    size = math.ceil(len(points) / POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [[group[-1][0], float(f"{fmean(loss for _, loss in group):.5g}")] for group in groups]
