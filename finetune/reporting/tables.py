"""Cells -> tables of text, the same for every format. Means over seeds; the best of each column is marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from finetune.reporting.cells import Cell, done
from finetune.reporting.columns import COST, HEALTH, LOSS, OTHER, ROBUST, Column, rewording, rouge

if TYPE_CHECKING:
    from pandas import DataFrame

UNKNOWN = "–"  # no such number


@dataclass(frozen=True)
class Entry:
    """One table cell: text (untrusted), the folder it was read from, whether it is the best or one to worry about."""

    text: str
    folder: Path | None = None
    best: bool = False
    alarm: bool = False


@dataclass(frozen=True)
class Table:
    """The first columns of every row are names, `num_names` of them. A detail is not printed in a terminal."""

    subject: str  # a task, a base: a name
    topic: str  # what the table says of it; `words.py` can translate it
    header: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    num_names: int = 2
    is_detail: bool = False

    @property
    def title(self) -> str:
        """`clinic: health of the output`."""
        return ": ".join(part for part in (self.subject, self.topic) if part)


def to_frame(table: Table, *, show: Callable[[Entry], str] = lambda entry: entry.text, title: Any = str) -> DataFrame:
    """The table as pandas has it, each entry and title as `show` and `title` write it."""
    import pandas

    rows = [[show(entry) for entry in row] for row in table.rows]
    return pandas.DataFrame(rows, columns=[title(name) for name in table.header], dtype=object)


def study_tables(cells: Sequence[Cell], *, convention: str) -> list[Table]:
    """For every task of the study: ROUGE with the costs, then the other numbers, then each kind of rows."""
    tables = []
    for task in dict.fromkeys(cell.task for cell in cells):
        chosen = [cell for cell in cells if cell.task == task]
        tables.append(make_table(task, "", chosen, part="mean", columns=rouge(convention) + COST))
        for topic, more in topics(chosen).items():
            table = make_table(task, topic, chosen, part="mean", columns=known(more, chosen, part="mean"))
            worrying = any(entry.alarm for row in table.rows for entry in row)
            tables.append(replace(table, is_detail=not worrying))
        for part in sorted({part for cell in chosen for run in done(cell) for part in run.scores} - {"mean"}):
            kept = known(OTHER + HEALTH, chosen, part=part)
            table = make_table(task, part, chosen, part=part, columns=rouge(convention) + kept)
            tables.append(replace(table, is_detail=True))
    return [table for table in tables if len(table.header) > table.num_names]


def topics(cells: Sequence[Cell]) -> dict[str, tuple[Column, ...]]:
    """What is told of a task beside its ROUGE and its costs."""
    names = dict.fromkeys(name for cell in cells for run in done(cell) for name in run.rewording)
    robust = ROBUST + rewording(names)
    return {
        "health of the output": HEALTH,
        "overfitting": LOSS,
        "forgetting and rewording": robust,
        "other scores": OTHER,
    }


def known(columns: Sequence[Column], cells: Sequence[Cell], *, part: str) -> tuple[Column, ...]:
    """The columns that have a number in some cell."""
    return tuple(column for column in columns if any(values(cell, part=part, column=column) for cell in cells))


def make_table(subject: str, topic: str, cells: Sequence[Cell], *, part: str, columns: Sequence[Column]) -> Table:
    """One row per cell with the means of one kind of rows (`part`; "mean" for the mean over the kinds)."""
    best = {column: _best(cells, part=part, column=column) for column in columns}
    rows = []
    for cell in cells:
        names = (Entry(cell.model), Entry(cell.method), Entry(num_seeds(cell)))
        numbers = [_entry(cell, part=part, column=column, best=best[column]) for column in columns]
        rows.append((*names, *(numbers if done(cell) else _absent(cell, width=len(columns)))))
    header = ("model", "method", "seeds", *(column.title for column in columns))
    return Table(subject, topic, header, tuple(rows), num_names=3)


def reasons_tables(cells: Sequence[Cell]) -> list[Table]:
    """One table that says why each run without scores has none; no table when all have."""
    rows = [
        (Entry(cell.task), Entry(cell.model), Entry(cell.method), Entry(run.seed), Entry(run.state, run.folder),
         Entry(run.reason or "no reason given"))
        for cell in cells for run in cell.runs if run.state != "done"
    ]  # fmt: skip
    header = ("task", "model", "method", "seed", "state", "reason")
    return [Table("", "Without scores", header, tuple(rows), num_names=len(header))] if rows else []


def checks_tables(cells: Sequence[Cell]) -> list[Table]:
    """One table of the checks that failed in done runs, and what they found; no table when none did."""
    rows = [
        (Entry(cell.task), Entry(cell.model), Entry(cell.method), Entry(run.seed), Entry(name, run.folder), Entry(note))
        for cell in cells for run in done(cell) for name, note in run.failed_checks.items()
    ]  # fmt: skip
    header = ("task", "model", "method", "seed", "check", "what it found")
    return [Table("", "Failed checks", header, tuple(rows), num_names=len(header))] if rows else []


DATA = {
    "train": "training rows",
    "valid": "validation rows",
    "bad": "wrong, left out",
    "skipped": "empty, left out",
    "duplicates": "duplicates",
    "leaks": "validation rows seen in training",
    "dropped": "of these left out",
    "prompts_cut": "prompts cut",
    "targets_cut": "targets cut",
    "beyond_positions": "rows beyond the base's positions",
}


def data_tables(cells: Sequence[Cell]) -> list[Table]:
    """One table of what was counted of the data; bases and methods that read them alike share a line."""
    lines: dict[tuple[str, ...], Path] = {}
    for run in (run for cell in cells for run in cell.runs if run.notes):
        counts = tuple(f"{run.notes[key]:.0f}" if key in run.notes else UNKNOWN for key in DATA)
        lines.setdefault((run.task, run.model, *counts), run.folder)
    rows = [
        (Entry(task), Entry(model, folder), *map(Entry, counts)) for (task, model, *counts), folder in lines.items()
    ]
    header = ("task", "model", *DATA.values())
    return [Table("", "Data", header, tuple(rows), is_detail=True)] if rows else []


def num_seeds(cell: Cell) -> str:
    """`3`, or `2 of 3` when a seed is not done."""
    total, finished = len(cell.runs), len(done(cell))
    return str(total) if finished in (0, total) else f"{finished} of {total}"


def values(cell: Cell, *, part: str, column: Column) -> list[float]:
    """The number in each done run that has it; only scores are told by kind of rows."""
    if column.source != "scores" and part != "mean":
        return []
    is_score = column.source == "scores"
    sources = [run.scores.get(part, {}) if is_score else getattr(run, column.source) for run in done(cell)]
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
        return Entry(UNKNOWN)
    mean = fmean(numbers)
    text, alarm = column.write(mean), column.alarm is not None and mean > column.alarm
    spread = f" ± {column.write(stdev(numbers))}" if len(numbers) > 1 and column.source == "scores" else ""
    return Entry(text + spread, cell_folder(cell), best=text == best and _competes(cell, column), alarm=alarm)


def _best(cells: Sequence[Cell], *, part: str, column: Column) -> str | None:
    """The best mean of a column as written, so that what reads equal is marked equally; None when all are equal."""
    if not column.better or column.alarm is not None:
        return None
    rivals = [values(cell, part=part, column=column) for cell in cells if _competes(cell, column)]
    means = sorted((fmean(numbers) for numbers in rivals if numbers), reverse=column.better > 0)
    return column.write(means[0]) if means and column.write(means[0]) != column.write(means[-1]) else None


def _competes(cell: Cell, column: Column) -> bool:
    """The untouched base costs nothing: it is no rival where costs are compared."""
    return column.source != "cost" or all(run.cost.get("trainable_parameters", 1) > 0 for run in done(cell))
