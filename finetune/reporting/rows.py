"""predictions.jsonl -> the scores of its rows, and the texts of a few of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.reporting.lines import load

SMALL = 30_000_000  # bytes that one process reads in the second that starting others takes

Key = tuple[str, str]  # row task, row id


@dataclass(frozen=True)
class RowScores:
    """One score of every row of a run. `places` are where the lines start, in bytes."""

    scores: Mapping[Key, float]
    places: Mapping[Key, int]


def read_scores(folders: Sequence[Path], *, score: str) -> dict[Path, RowScores]:
    """One score of the rows of each run, read by several processes when it is much; nothing for an unreadable file."""
    sizes = [_size(folder) for folder in folders]
    jobs = [(folder, score) for folder in folders]
    if sum(sizes) < SMALL:
        found: Iterable[RowScores] = map(_read, jobs)
        return dict(zip(folders, found, strict=True))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None) as pool:
        return dict(zip(folders, pool.map(_read, jobs, chunksize=4), strict=True))


def read_lines(folder: Path, *, places: Iterable[int]) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl that start at these bytes."""
    with (folder / "predictions.jsonl").open("rb") as file:
        lines = []
        for place in places:
            file.seek(place)
            lines.append(load(file.readline()))
    return lines


def _size(folder: Path) -> int:
    try:
        return (folder / "predictions.jsonl").stat().st_size
    except OSError:
        return 0


def _read(job: tuple[Path, str]) -> RowScores:
    """Rows that cannot be read or lack the score are left out; of rows with one id the first counts."""
    folder, score = job
    scores: dict[Key, float] = {}
    places: dict[Key, int] = {}
    place = 0
    try:
        with (folder / "predictions.jsonl").open("rb") as file:
            for line in file:
                _add(line, place, score=score, scores=scores, places=places)
                place += len(line)
    except OSError:
        pass
    return RowScores(scores, places)


def _add(line: bytes, place: int, *, score: str, scores: dict[Key, float], places: dict[Key, int]) -> None:
    try:
        row = load(line)
        key, value = (str(row["task"]), str(row["id"])), row["scores"][score]
    except (ValueError, KeyError, TypeError):
        return
    if not row.get("template") and isinstance(value, (int, float)):
        scores.setdefault(key, float(value))
        places.setdefault(key, place)
