"""A study -> report.md and report.csv."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from finetune.reporting.read import Run
from finetune.reporting.study import Study, notes, summary, tables
from finetune.reporting.tables import Entry, Table
from finetune.reporting.text import markdown, markdown_path, spreadsheet


def markdown_page(study: Study) -> str:
    """The whole report; links are relative to the study's folder."""
    parts = [f"# {markdown(study.folder.absolute().name)}", markdown(summary(study)), *notes(study)]
    for table in tables(study):
        parts += [f"## {markdown(table.title)}", markdown_table(table, folder=study.folder)]
    if study.left_out:
        items = [(below(item.folder, study.folder), item) for item in study.left_out]
        lines = [
            f"- {_link(markdown(path), item.folder, study.folder)}: {markdown(item.reason)}" for path, item in items
        ]
        parts += ["## Left out", "These folders cannot be read:", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


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
    return f"[{text}]({markdown_path(below(target, folder))})"


def below(target: Path, folder: Path) -> str:
    """The path of a run folder as seen from the report."""
    return Path(os.path.relpath(target, folder)).as_posix()


def csv_page(study: Study) -> str:
    """One line per run and kind of rows (`part`), every number that the run has, unrounded."""
    lines = [line for run in study.runs for line in _csv_lines(run, study.folder)]
    names = list(dict.fromkeys(name for line in lines for name in line))
    page = io.StringIO()
    page.write("\ufeff")  # spreadsheets take Chinese for another encoding without it
    writer = csv.DictWriter(page, names, lineterminator="\n")
    writer.writerow({name: spreadsheet(name) for name in names})
    writer.writerows({name: spreadsheet(value) for name, value in line.items()} for line in lines)
    return page.getvalue()


def _csv_lines(run: Run, folder: Path) -> list[dict[str, Any]]:
    names = ("study", "task", "model", "method", "seed", "state", "reason", "weights", "data")
    same = {name: getattr(run, name) for name in names} | {"folder": below(run.folder, folder)}
    numbers = {**run.cost, **{f"loss.{name}": value for name, value in run.loss.items()}}
    parts = sorted(run.scores, key=lambda part: (part != "mean", part)) or [""]
    return [same | {"part": part} | dict(run.scores.get(part, {})) | numbers for part in parts]
