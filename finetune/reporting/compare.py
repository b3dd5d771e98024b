"""Cells of one base -> which of their differences are real: intervals, ties, gains over the base, rank correlation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.reporting.cells import Cell, done
from finetune.reporting.rows import Key, RowScores
from finetune.scores import statistics

if TYPE_CHECKING:
    from numpy import ndarray

Interval = tuple[float, float]


@dataclass(frozen=True)
class Standing:
    """How a cell stands among the cells of its task and base. Points of the score, with 95 % intervals."""

    cell: Cell
    mean: float
    interval: Interval
    place: str  # best | tie (not distinguishable from the best) | ""
    delta: float | None = None  # to the untouched base
    delta_interval: Interval | None = None
    share: float | None = None  # percent of full fine-tuning's gain


@dataclass(frozen=True)
class Pair:
    """The difference of two methods, left less right; `p` is corrected for all pairs of the base (Holm)."""

    left: Cell
    right: Cell
    difference: float
    interval: Interval
    p: float


@dataclass(frozen=True)
class Comparison:
    """All cells of a task on one base, judged on the same rows."""

    task: str
    model: str
    score: str
    num_rows: int
    standings: tuple[Standing, ...]  # in the order of the cells
    pairs: tuple[Pair, ...]


def compare_cells(cells: Sequence[Cell], *, rows: Mapping[Path, RowScores], score: str) -> list[Comparison]:
    """A comparison for every task and base that has rows to compare, in the order of the cells."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        if any(rows[run.folder].scores for run in done(cell) if run.folder in rows):
            groups.setdefault((cell.task, cell.model), []).append(cell)
    return [_compare(group, rows=rows, score=score) for group in groups.values() if _shared(group, rows)]


def _shared(cells: Sequence[Cell], rows: Mapping[Path, RowScores]) -> list[Key]:
    """Rows that every run of every cell has, in the order of the first."""
    scores = [rows[run.folder].scores for cell in cells for run in done(cell) if rows[run.folder].scores]
    common = set(scores[0]).intersection(*scores[1:])
    return [key for key in scores[0] if key in common]


def _compare(cells: Sequence[Cell], *, rows: Mapping[Path, RowScores], score: str) -> Comparison:
    import numpy as np

    keys = _shared(cells, rows)
    columns = [_over_seeds(cell, keys=keys, rows=rows) for cell in cells]
    tasks = np.unique([task for task, _ in keys], return_inverse=True)[1]
    values = np.stack(columns, axis=1)  # (rows, cells)
    resampled = statistics.bootstrap_means(values, tasks=tasks)
    means = np.mean([values[tasks == task].mean(axis=0) for task in np.unique(tasks)], axis=0)
    pairs = _pairs(cells, means=means, resampled=resampled)
    standings = _standings(cells, means=means, resampled=resampled, pairs=pairs)
    return Comparison(cells[0].task, cells[0].model, score, len(keys), standings, pairs)


def _over_seeds(cell: Cell, *, keys: Sequence[Key], rows: Mapping[Path, RowScores]) -> ndarray:
    """The mean over seeds of each row."""
    import numpy as np

    seeds = [rows[run.folder].scores for run in done(cell) if rows[run.folder].scores]
    return np.mean([[scores[key] for key in keys] for scores in seeds], axis=0)


def _pairs(cells: Sequence[Cell], *, means: ndarray, resampled: ndarray) -> tuple[Pair, ...]:
    indices = list(combinations(range(len(cells)), 2))
    differences = [resampled[:, left] - resampled[:, right] for left, right in indices]
    observed = [float(means[left] - means[right]) for left, right in indices]
    p_values = [statistics.p_value(d, observed=o) for d, o in zip(differences, observed, strict=True)]
    return tuple(
        Pair(cells[left], cells[right], observed[number], statistics.interval(differences[number]), p)
        for number, ((left, right), p) in enumerate(zip(indices, statistics.holm(p_values), strict=True))
    )


def _standings(
    cells: Sequence[Cell], *, means: ndarray, resampled: ndarray, pairs: Sequence[Pair]
) -> tuple[Standing, ...]:
    best = cells[int(means.argmax())]
    alike = [{pair.left.method, pair.right.method} for pair in pairs if pair.p >= statistics.LEVEL]
    standings = []
    for index, cell in enumerate(cells):
        place = "best" if cell is best else "tie" if {cell.method, best.method} in alike else ""
        gain = _gain(index, cells=cells, means=means, resampled=resampled)
        standings.append(Standing(cell, float(means[index]), statistics.interval(resampled[:, index]), place, *gain))
    return tuple(standings)


def _gain(
    index: int, *, cells: Sequence[Cell], means: ndarray, resampled: ndarray
) -> tuple[float | None, Interval | None, float | None]:
    """Delta to the untouched base, its interval, and the share of full fine-tuning's gain where full gains surely."""
    none, full = (counterpart(cells, cells[index].method, name) for name in ("none", "full"))
    if none is None or none == index:
        return None, None, None
    delta = float(means[index] - means[none])
    around = statistics.interval(resampled[:, index] - resampled[:, none])
    if full is None or statistics.interval(resampled[:, full] - resampled[:, none])[0] <= 0:
        return delta, around, None
    return delta, around, 100 * delta / float(means[full] - means[none])


def counterpart(cells: Sequence[Cell], method: str, name: str) -> int | None:
    """Index of the cell of the method `name`, with the same overrides (`none+optim.epochs=1`) or else without any."""
    methods = [cell.method for cell in cells]
    suffix = method.partition("+")[2]
    for candidate in (f"{name}+{suffix}", name):
        if candidate in methods:
            return methods.index(candidate)
    return None


def transfer(comparisons: Sequence[Comparison]) -> list[tuple[str, str, str, int, float]]:
    """Does the winner on one base win on another? (task, base, base, number of methods, rank correlation)."""
    found = []
    for left, right in combinations(comparisons, 2):
        if left.task == right.task:
            ours, theirs = ({s.cell.method: s.mean for s in side.standings} for side in (left, right))
            shared = [method for method in ours if method in theirs]
            value = statistics.rank_correlation([ours[m] for m in shared], [theirs[m] for m in shared])
            if value is not None:
                found.append((left.task, left.model, right.model, len(shared), value))
    return found
