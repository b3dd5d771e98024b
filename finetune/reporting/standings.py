"""Comparisons -> tables: intervals, ties and gains; which differences are real; whether the winner transfers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

from finetune.reporting.compare import Comparison, Interval, Pair, Standing, transfer
from finetune.reporting.tables import UNKNOWN, Entry, Table, cell_folder
from finetune.scores.statistics import LEVEL

MOST_METHODS = 12  # a wider matrix of differences is for report.html


def standing_tables(comparisons: Sequence[Comparison]) -> list[Table]:
    """For every task: its cells with intervals, its matrices of differences; last how well ranks transfer."""
    tables = []
    for task in dict.fromkeys(comparison.task for comparison in comparisons):
        chosen = [comparison for comparison in comparisons if comparison.task == task]
        tables.append(_standings(task, chosen))
        tables += [_differences(comparison) for comparison in chosen if 2 <= len(comparison.standings) <= MOST_METHODS]
    return tables + _transfer(comparisons)


def _standings(task: str, comparisons: Sequence[Comparison]) -> Table:
    header = (
        "model",
        "method",
        "rows",
        name(comparisons[0]),
        "95 %",
        "place",
        "gain over none",
        "95 %",
        "% of full's gain",
    )
    rows = [_standing(comparison, standing) for comparison in comparisons for standing in comparison.standings]
    told = [any(row[column].text != UNKNOWN for row in rows) for column in range(len(header))]
    shown = tuple(tuple(compress(row, told)) for row in rows)
    return Table(task, "what is distinguishable", tuple(compress(header, told)), shown, num_names=2)


def _standing(comparison: Comparison, standing: Standing) -> tuple[Entry, ...]:
    folder = cell_folder(standing.cell)
    return (
        Entry(comparison.model),
        Entry(standing.cell.method),
        Entry(str(comparison.num_rows)),
        Entry(f"{standing.mean:.2f}", folder, best=standing.place == "best"),
        Entry(_between(standing.interval)),
        Entry(standing.place),
        Entry(UNKNOWN if standing.delta is None else f"{standing.delta:+.2f}"),
        Entry(UNKNOWN if standing.delta_interval is None else _between(standing.delta_interval)),
        Entry(UNKNOWN if standing.share is None else f"{standing.share:.0f}"),
    )


def _differences(comparison: Comparison) -> Table:
    """Row less column, with an asterisk where the corrected p-value is below 5 %."""
    methods = [standing.cell.method for standing in comparison.standings]
    signed = {(pair.left.method, pair.right.method): _difference(pair, 1) for pair in comparison.pairs}
    signed |= {(pair.right.method, pair.left.method): _difference(pair, -1) for pair in comparison.pairs}
    rows = [(Entry(row), *(Entry(signed.get((row, column), "")) for column in methods)) for row in methods]
    subject = f"{comparison.task}, {comparison.model}"
    return Table(subject, "row less column", (name(comparison), *methods), tuple(rows), num_names=1, is_detail=True)


def _difference(pair: Pair, sign: int) -> str:
    return f"{sign * pair.difference:+.2f}{'*' if pair.p < LEVEL else ''}"


def _transfer(comparisons: Sequence[Comparison]) -> list[Table]:
    rows = [
        (Entry(task), Entry(left), Entry(right), Entry(str(num_methods)), Entry(f"{value:.2f}"))
        for task, left, right, num_methods, value in transfer(comparisons)
    ]
    header = ("task", "base", "base", "methods", "rank correlation")
    return [Table("", "Does the winner transfer?", header, tuple(rows), num_names=3)] if rows else []


def name(comparison: Comparison) -> str:
    """`rouge-l-char` -> `ROUGE-L (char)`."""
    score, ending = comparison.score[:7].upper(), comparison.score[8:]
    return f"{score} ({ending})" if ending else score


def _between(interval: Interval) -> str:
    return f"{interval[0]:.2f} – {interval[1]:.2f}"
