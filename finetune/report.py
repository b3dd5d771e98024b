"""`python -m finetune.report multirun`: run folders -> report.md, report.csv beside the runs, and a table to look at.

It reads folders and nothing else, and never imports torch.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.text import Text

from finetune import runs
from finetune.reporting.columns import CONVENTIONS
from finetune.reporting.html import html_page
from finetune.reporting.pages import csv_page, markdown_page
from finetune.reporting.read import LeftOut, Run, find, read_all
from finetune.reporting.rescore import rescore
from finetune.reporting.study import Study, make_study, summary, tables
from finetune.reporting.terminal import print_table
from finetune.reporting.tex import tex_page
from finetune.reporting.text import one_line

Mode = Literal["online", "offline"]  # of W&B


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m finetune.report", description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="the folder of the runs, or one below it")
    parser.add_argument("--study", help="only this study")
    parser.add_argument("--rescore", action="store_true", help="first compute every score again from predictions.jsonl")
    parser.add_argument("--convention", choices=CONVENTIONS, default="words", help="how the report counts ROUGE")
    parser.add_argument(
        "--wandb", choices=("offline", "online"), help="also log the numbers to W&B, as one run a study"
    )
    chosen = parser.parse_args(arguments)
    console = Console(highlight=False)
    try:
        if chosen.rescore:
            rescore_study(chosen.root, study=chosen.study, console=console)
        studies = make_studies(chosen.root, study=chosen.study, convention=chosen.convention)
        return report(studies, root=chosen.root, wandb=chosen.wandb, console=console)
    except BrokenPipeError:  # `... | head`
        return 0
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1


def report(studies: Sequence[Study], *, root: Path, wandb: Mode | None, console: Console) -> int:
    """Print and write the report of each study; returns the exit status."""
    if not studies:
        console.print(Text(f"no runs yet: {root} holds no folder with a config.yaml"))
    for study in studies:
        print_study(study, console=console)
        pages = write_pages(study)
        console.print(Text(f"{summary(study)} -> {', '.join(map(str, pages))}"), soft_wrap=True)
        if wandb:
            _log(study, mode=wandb, console=console)
    return 0


def make_studies(root: Path, *, study: str | None, convention: str) -> list[Study]:
    """Read every study below the root, or the one named. Raises ValueError for a root or a name that does not exist."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder; runs are written to multirun")
    found, left_out = read_all(root)
    folders = by_study(found, left_out=left_out, root=root)
    chosen = {folder: parts for folder, parts in folders.items() if study in (None, folder.name)}
    if folders and not chosen:
        raise ValueError(f"no study {study!r} in {root}; there are: {', '.join(sorted(f.name for f in folders))}")
    return [
        make_study(folder, runs=own, left_out=unreadable, convention=convention)
        for folder, (own, unreadable) in chosen.items()
    ]


def _log(study: Study, *, mode: Mode, console: Console) -> None:
    from finetune.reporting.summary_run import log_study

    try:
        log_study(study, mode=mode)
    except Exception as error:  # whatever W&B raises: the report is written
        console.print(Text(one_line(f"W&B: {error}; the report is in the folder all the same")), soft_wrap=True)


def rescore_study(root: Path, *, study: str | None, console: Console) -> None:
    """Score the predictions of all done runs again, of one study or of all, saying which folders could not be."""
    done = [folder for folder in find(root) if runs.state(folder) == "done"]
    chosen = [folder for folder in done if study in (None, study_folder(folder, root=root).name)]
    problems = [(folder, problem) for folder, problem in rescore(chosen) if problem]
    for folder, problem in problems:
        console.print(Text(one_line(f"not scored again: {folder}: {problem}")), soft_wrap=True)
    console.print(Text(f"scored again: {len(chosen) - len(problems)} of {len(chosen)} done runs"))


def by_study(
    found: Sequence[Run], *, left_out: Sequence[LeftOut], root: Path
) -> dict[Path, tuple[list[Run], list[LeftOut]]]:
    """The runs and unreadable folders of each study's folder, which is where its report goes."""
    studies: dict[Path, tuple[list[Run], list[LeftOut]]] = defaultdict(lambda: ([], []))
    for run in found:
        studies[study_folder(run.folder, root=root)][0].append(run)
    for item in left_out:
        studies[study_folder(item.folder, root=root)][1].append(item)
    return dict(sorted(studies.items()))


def study_folder(folder: Path, *, root: Path) -> Path:
    """The folder four levels above a run's (<study>/<task>/<model>/<method>/seed<k>), but never one above the root."""
    above = list(folder.parents)
    return above[3] if len(above) > 3 and above[3].is_relative_to(root) else root


def print_study(study: Study, *, console: Console) -> None:
    """Print the tables, without details, and the folders that cannot be read."""
    for table in tables(study):
        if not table.is_detail:
            print_table(table, console=console)
    for item in study.left_out:
        console.print(Text(one_line(f"left out: {item.folder}: {item.reason}")), soft_wrap=True)


def write_pages(study: Study) -> list[Path]:
    """Write the report's files into the study's folder, each by rename; returns their paths."""
    pages = {"report.md": markdown_page, "report.csv": csv_page, "report.tex": tex_page, "report.html": html_page}
    for name, make in pages.items():
        runs.write_text(study.folder / name, make(study))
    return [study.folder / name for name in pages]


if __name__ == "__main__":
    sys.exit(main())
