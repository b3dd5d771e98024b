"""Tables -> report.md and report.csv."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import runs
from finetune.reporting.read import LeftOut, Run
from finetune.reporting.tables import Entry, Table
from finetune.reporting.text import markdown, markdown_path, spreadsheet

NOTES = """\
ROUGE is F1 in percent by jieba words, n-grams counted as sets (the convention of `rouge_chinese`); `report.csv` has the
multiset variant and every other score. Scores are means over the kinds of rows. With several seeds a score is mean ±
sample standard deviation over them, a cost the mean. The best of each column is bold; among costs the least is, and a
base that trains nothing does not compete. Numbers link to the runs they come from."""


def write_pages(
    folder: Path, *, tables: Sequence[Table], found: Sequence[Run], left_out: Sequence[LeftOut]
) -> list[Path]:
    """Write report.md and report.csv into the folder, each by rename; returns their paths."""
    pages = {
        "report.md": markdown_page(tables, found=found, left_out=left_out, folder=folder),
        "report.csv": "\ufeff" + csv_page(found, folder=folder),  # the mark makes spreadsheets read Chinese
    }
    for name, page in pages.items():
        runs.write_text(folder / name, page)
    return [folder / name for name in pages]


def markdown_page(tables: Sequence[Table], *, found: Sequence[Run], left_out: Sequence[LeftOut], folder: Path) -> str:
    """The whole report of a study; links are relative to its folder."""
    parts = [f"# {markdown(found[0].study) if found else 'Report'}", summary(found, left_out=left_out), NOTES]
    for table in tables:
        parts += [f"## {markdown(table.title)}", markdown_table(table, folder=folder)]
    if left_out:
        lines = [f"- {_link(markdown(_below(item.folder, folder)), item.folder, folder)}: {markdown(item.reason)}"
                 for item in left_out]  # fmt: skip
        parts += ["## Left out", "These folders cannot be read:", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def summary(found: Sequence[Run], *, left_out: Sequence[LeftOut]) -> str:
    """`12 runs: 9 done, 2 failed, 1 unsupported; 1 folder left out`."""
    states = ("done", "running", "unfinished", "failed", "unsupported")
    counts = {state: sum(run.state == state for run in found) for state in states}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    return f"{_plural(len(found), 'run')}: {told}" + (
        f"; {_plural(len(left_out), 'folder')} left out" if left_out else ""
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def markdown_table(table: Table, *, folder: Path) -> str:
    """A GitHub table; names left, numbers right."""
    rules = [":--"] * table.num_names + ["--:"] * (len(table.header) - table.num_names)
    body = [[_markdown_entry(entry, folder) for entry in row] for row in table.rows]
    lines = [[markdown(title) for title in table.header], rules, *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_entry(entry: Entry, folder: Path) -> str:
    text = markdown(entry.text)
    linked = _link(text, entry.folder, folder) if entry.folder else text
    return f"**{linked}**" if entry.best else linked


def _link(text: str, target: Path, folder: Path) -> str:
    return f"[{text}]({markdown_path(_below(target, folder))})"


def _below(target: Path, folder: Path) -> str:
    return Path(os.path.relpath(target, folder)).as_posix()


def csv_page(found: Sequence[Run], *, folder: Path) -> str:
    """One line per run and kind of rows (`part`), every number that the run has, unrounded."""
    lines = [line for run in found for line in _csv_lines(run, folder)]
    names = list(dict.fromkeys(name for line in lines for name in line))
    page = io.StringIO()
    writer = csv.DictWriter(page, names, lineterminator="\n")
    writer.writerow({name: spreadsheet(name) for name in names})
    writer.writerows({name: spreadsheet(value) for name, value in line.items()} for line in lines)
    return page.getvalue()


def _csv_lines(run: Run, folder: Path) -> list[dict[str, Any]]:
    names = ("study", "task", "model", "method", "seed", "state", "reason", "weights", "data")
    same = {name: getattr(run, name) for name in names} | {"folder": _below(run.folder, folder)}
    numbers = {**run.cost, **{f"loss.{name}": value for name, value in run.loss.items()}}
    parts = sorted(run.scores, key=lambda part: (part != "mean", part)) or [""]
    return [same | {"part": part} | dict(run.scores.get(part, {})) | numbers for part in parts]
