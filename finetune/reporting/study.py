"""A study: the runs whose cells compare, what they were found to say, and the tables that say it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.reporting.cells import Cell, to_cells, with_short_names
from finetune.reporting.columns import CONVENTION_TEXTS, CONVENTIONS
from finetune.reporting.compare import Comparison, compare_cells
from finetune.reporting.read import LeftOut, Run
from finetune.reporting.rows import RowScores, read_scores
from finetune.reporting.standings import standing_tables
from finetune.reporting.tables import Table, checks_tables, data_tables, reasons_tables, study_tables
from finetune.reporting.text import one_line

NOTES = """\
ROUGE is F1 in percent {convention}; `report.csv` has the other conventions and every other score. Scores are means over
the kinds of rows. With several seeds a score is mean ± sample standard deviation over them, a cost the mean. The best
of each column is bold; among costs the least is, and a base that trains nothing does not compete. Intervals cover the
choice of validation rows (paired bootstrap); a *tie* is not distinguishable from the best (5 %, Holm's correction for
all pairs of a base). Numbers link to the runs they come from."""


@dataclass(frozen=True)
class Study:
    """What every page of the report is made from."""

    folder: Path
    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
    convention: str
    cells: tuple[Cell, ...]
    rows: dict[Path, RowScores]  # by run folder
    comparisons: tuple[Comparison, ...]
    shared: tuple[str, ...]  # what was changed on the command line for every method, and so is in no name


def make_study(folder: Path, *, runs: Sequence[Run], left_out: Sequence[LeftOut], convention: str) -> Study:
    """Group the runs and compare them by ROUGE-L of their rows."""
    (cells, shared), score = with_short_names(to_cells(runs)), f"rouge-l{CONVENTIONS[convention]}"
    rows = read_scores([run.folder for run in runs if run.state == "done"], score=score)
    comparisons = compare_cells(cells, rows=rows, score=score)
    return Study(
        folder, tuple(runs), tuple(left_out), convention, tuple(cells), rows, tuple(comparisons), tuple(shared)
    )


def tables(study: Study) -> list[Table]:
    """Every table, in the order of the report."""
    scores = study_tables(study.cells, convention=study.convention)
    found = [*scores, *standing_tables(study.comparisons), *data_tables(study.cells)]
    return [*found, *checks_tables(study.cells), *reasons_tables(study.cells)]


def summary(study: Study) -> str:
    """`12 runs: 9 done, 2 failed, 1 unsupported; all with optim.epochs=1; 1 folder left out`."""
    told = ", ".join(f"{count} {state}" for state, count in state_counts(study).items())
    left_out = f"; {_plural(len(study.left_out), 'folder')} left out" if study.left_out else ""
    shared = f"; all with {one_line(', '.join(study.shared))}" if study.shared else ""
    return f"{_plural(len(study.runs), 'run')}: {told}{shared}{left_out}"


def state_counts(study: Study) -> dict[str, int]:
    """How many runs are done, running, …; only states that occur."""
    states = ("done", "running", "unfinished", "failed", "unsupported")
    counts = {state: sum(run.state == state for run in study.runs) for state in states}
    return {state: count for state, count in counts.items() if count}


def has_other_scorers(study: Study) -> bool:
    """Whether the done runs were scored by more than one scorer."""
    return len({run.scorer for run in study.runs if run.state == "done"}) > 1


def notes(study: Study) -> list[str]:
    """How to read the tables, and what keeps their numbers from being compared."""
    found = [NOTES.format(convention=CONVENTION_TEXTS[study.convention])]
    if has_other_scorers(study):
        found.append("**The runs were scored by different scorers.** `--rescore` computes every score again.")
    return found


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
