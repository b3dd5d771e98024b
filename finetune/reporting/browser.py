"""The prediction browser's rows: of every kind of rows the worst and some random ones, with every method's answer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from finetune.reporting.cells import Cell, done
from finetune.reporting.rows import Key, RowScores, read_lines
from finetune.reporting.study import Study

NUM_WORST = 50
NUM_RANDOM = 50
MAX_CHARACTERS = 3000  # of one text; what is cut is said so


def browser(study: Study, *, num_worst: int = NUM_WORST, num_random: int = NUM_RANDOM) -> list[dict[str, Any]]:
    """For every task and kind of rows: the rows, and per cell the answers in the rows' order (None where it has none).

    A cell shows its first seed that has predictions. Texts are numbers into `texts`, since methods often agree.
    """
    found = []
    for task in dict.fromkeys(cell.task for cell in study.cells):
        shown = _shown([cell for cell in study.cells if cell.task == task], study.rows)
        keys = dict.fromkeys(key for _, folder in shown for key in study.rows[folder].scores)
        for part in sorted({part for part, _ in keys}):
            chosen = choose([key for key in keys if key[0] == part], shown, study.rows, num_worst, num_random)
            found.append({"task": task, "part": part, **_texts(chosen, shown, study.rows)})
    return found


def _shown(cells: Sequence[Cell], rows: dict[Path, RowScores]) -> list[tuple[Cell, Path]]:
    with_rows = [(cell, [run.folder for run in done(cell) if rows[run.folder].scores]) for cell in cells]
    return [(cell, folders[0]) for cell, folders in with_rows if folders]


def choose(
    keys: Sequence[Key],
    shown: Sequence[tuple[Cell, Path]],
    rows: dict[Path, RowScores],
    num_worst: int,
    num_random: int,
) -> list[tuple[Key, bool]]:
    """The rows with the lowest mean score over the cells, worst first, then random ones of the rest (marked True)."""

    def score(key: Key) -> float:
        return fmean(rows[folder].scores[key] for _, folder in shown if key in rows[folder].scores)

    by_score = sorted(keys, key=score)
    rest = by_score[num_worst:]
    drawn = random.Random(0).sample(rest, min(num_random, len(rest)))
    return [(key, False) for key in by_score[:num_worst]] + [(key, True) for key in drawn]


def _texts(
    chosen: Sequence[tuple[Key, bool]], shown: Sequence[tuple[Cell, Path]], rows: dict[Path, RowScores]
) -> dict[str, Any]:
    texts: dict[str, int] = {}
    questions: dict[Key, list[Any]] = {}
    answers = []
    for cell, folder in shown:
        known = [key for key, _ in chosen if key in rows[folder].places]
        lines = dict(zip(known, read_lines(folder, places=[rows[folder].places[key] for key in known]), strict=True))
        for key, line in lines.items():
            if key not in questions:
                questions[key] = [_number(texts, str(line.get(side, ""))) for side in ("prompt", "reference")]
        own = [_answer(lines[key], texts, rows[folder].scores[key]) if key in lines else None for key, _ in chosen]
        answers.append({"model": cell.model, "method": cell.method, "answers": own})
    asked = [{"id": key[1], "random": drawn, "texts": questions[key]} for key, drawn in chosen]
    return {"rows": asked, "cells": answers, "texts": list(texts)}


def _answer(line: dict[str, Any], texts: dict[str, int], score: float) -> list[Any]:
    """Text, score, whether the token limit cut it off."""
    return [_number(texts, str(line.get("prediction", ""))), round(score, 1), line.get("finish_reason") == "length"]


def _number(texts: dict[str, int], text: str) -> int:
    kept = text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}… [+{len(text) - MAX_CHARACTERS}]"
    return texts.setdefault(kept, len(texts))
