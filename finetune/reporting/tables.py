"""Cells -> tables of text, the same for every format. Means over seeds; the best of each column is marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from finetune.reporting.cells import Cell, done


@dataclass(frozen=True)
class Column:
    """One number of a run. `better` is 1 when more is better, -1 when less is."""

    title: str
    source: str  # scores | cost
    key: str
    better: int
    write: Callable[[float], str]


@dataclass(frozen=True)
class Entry:
    """One table cell: text (untrusted), the folder it was read from, whether it is the best of its column."""

    text: str
    folder: Path | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A titled table; the first columns of every row are names, `num_names` of them."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    num_names: int = 2


def _two_places(value: float) -> str:
    return f"{value:.2f}"


def _count(value: float) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


ROUGE = (
    Column("ROUGE-1", "scores", "rouge-1", 1, _two_places),
    Column("ROUGE-2", "scores", "rouge-2", 1, _two_places),
    Column("ROUGE-L", "scores", "rouge-l", 1, _two_places),
)
HEALTH = (
    Column("exact %", "scores", "exact", 1, _two_places),
    Column("empty %", "scores", "empty", -1, _two_places),
    Column("never stopped %", "scores", "never_stopped", -1, _two_places),
    Column("looping %", "scores", "looping", -1, _two_places),
)
COST = (
    Column("trainable", "cost", "trainable_parameters", -1, _count),
    Column("share %", "cost", "trainable_percent", -1, _three_digits),
    Column("peak GiB", "cost", "peak_memory_gib", -1, _three_digits),
    Column("train s", "cost", "train_seconds", -1, _three_digits),
    Column("tokens/s", "cost", "tokens_per_second", 1, _three_digits),
    Column("adapter MB", "cost", "adapter_mb", -1, _three_digits),
)


def study_tables(cells: Sequence[Cell]) -> list[Table]:
    """For every task of the study: the mean over its kinds of rows with the costs, then each kind of rows."""
    tables = []
    for task in dict.fromkeys(cell.task for cell in cells):
        of_task = [cell for cell in cells if cell.task == task]
        tables.append(make_table(task, of_task, part="mean", columns=ROUGE + COST))
        tables.append(make_table(f"{task}: health of the output", of_task, part="mean", columns=HEALTH))
        for part in sorted({part for cell in of_task for run in done(cell) for part in run.scores} - {"mean"}):
            tables.append(make_table(f"{task}: {part}", of_task, part=part, columns=ROUGE + HEALTH))
    return tables


def make_table(title: str, cells: Sequence[Cell], *, part: str, columns: Sequence[Column]) -> Table:
    """One row per cell with the means of one kind of rows (`part`; "mean" for the mean over the kinds)."""
    best = {column: _best(cells, part=part, column=column) for column in columns}
    rows = []
    for cell in cells:
        names = (Entry(cell.model), Entry(cell.method), Entry(num_seeds(cell)))
        numbers = [_entry(cell, part=part, column=column, best=best[column]) for column in columns]
        rows.append((*names, *(numbers if done(cell) else _absent(cell, width=len(columns)))))
    return Table(title, ("model", "method", "seeds", *(column.title for column in columns)), tuple(rows), num_names=3)


def reasons_tables(cells: Sequence[Cell]) -> list[Table]:
    """One table that says why each run without scores has none; no table when all have."""
    rows = [
        (Entry(cell.task), Entry(cell.model), Entry(cell.method), Entry(run.seed), Entry(run.state, run.folder),
         Entry(run.reason or "no reason given"))
        for cell in cells for run in cell.runs if run.state != "done"
    ]  # fmt: skip
    header = ("task", "model", "method", "seed", "state", "reason")
    return [Table("Without scores", header, tuple(rows), num_names=len(header))] if rows else []


def num_seeds(cell: Cell) -> str:
    """`3`, or `2 of 3` when a seed is not done."""
    total, finished = len(cell.runs), len(done(cell))
    return str(total) if finished in (0, total) else f"{finished} of {total}"


def values(cell: Cell, *, part: str, column: Column) -> list[float]:
    """The number in each done run that has it."""
    sources = [run.cost if column.source == "cost" else run.scores.get(part, {}) for run in done(cell)]
    return [source[column.key] for source in sources if column.key in source]


def absent_word(cell: Cell) -> str:
    """What stands where the scores of a cell without any would be."""
    states = [run.state for run in cell.runs]
    state = next(state for state in ("running", "failed", "unfinished", "unsupported") if state in states)
    return "n/a" if state == "unsupported" else state


def _absent(cell: Cell, *, width: int) -> list[Entry]:
    return [Entry(absent_word(cell), cell_folder(cell)), *[Entry("")] * (width - 1)]


def cell_folder(cell: Cell) -> Path:
    """The run's folder, or with several seeds the folder that holds them."""
    return cell.runs[0].folder if len(cell.runs) == 1 else cell.runs[0].folder.parent


def _entry(cell: Cell, *, part: str, column: Column, best: str | None) -> Entry:
    numbers = values(cell, part=part, column=column)
    if not numbers:
        return Entry("–")
    text = column.write(fmean(numbers))
    spread = f" ± {column.write(stdev(numbers))}" if len(numbers) > 1 and column.source == "scores" else ""
    return Entry(text + spread, cell_folder(cell), best=text == best and _competes(cell, column))


def _best(cells: Sequence[Cell], *, part: str, column: Column) -> str | None:
    """The best mean of a column as written, so that what reads equal is marked equally; None when all are equal."""
    rivals = [values(cell, part=part, column=column) for cell in cells if _competes(cell, column)]
    means = sorted((fmean(numbers) for numbers in rivals if numbers), reverse=column.better > 0)
    return column.write(means[0]) if means and column.write(means[0]) != column.write(means[-1]) else None


def _competes(cell: Cell, column: Column) -> bool:
    """The untouched base costs nothing: it is no rival where costs are compared."""
    return column.source != "cost" or all(run.cost.get("trainable_parameters", 1) > 0 for run in done(cell))
