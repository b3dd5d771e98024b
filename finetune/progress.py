"""What a person sees while a grid runs: a bar for the sweep and one for the cell; plain lines when not a terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

from finetune import runs

STYLES = {"done": "green", "failed": "bold red", "unsupported": "yellow"}  # how a cell of a sweep can end


class Progress:
    """One bar for the sweep and one for every cell at work."""

    def __init__(self, *, num_cells: int) -> None:
        self.console = Console(stderr=True)
        self.total = num_cells
        self.count = 0
        name = Column(no_wrap=True, overflow="ellipsis", max_width=self.console.width // 3)  # leaves room for the bar
        columns = (
            TextColumn("{task.description}", table_column=name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        tail = (TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))
        self.bars = Bars(*columns, *tail, console=self.console, disable=not self.console.is_terminal)
        self.sweep = self.bars.add_task("sweep", total=num_cells, note="")
        self.cells: dict[str, TaskID] = {}

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bars.stop()

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def watch(self, name: str, run: Path) -> None:
        """Show where the job in `run` stands, from its own files."""
        if self.bars.disable:
            return
        if name not in self.cells:
            self.cells[name] = self.bars.add_task(escape(name.partition("/")[2]), total=None, note="")
        step: dict[str, Any] = {}
        with contextlib.suppress(ValueError, IndexError):
            step = json.loads(runs.tail(run / "steps.jsonl", 1)[-1])
        line = next(reversed(runs.tail(run / "run.log", 1)), "")
        total = step.get("num_steps")
        note = line[:80]
        if step and step["step"] < step["num_steps"]:
            loss = "skipped" if step["loss"] is None else f"loss {step['loss']:.3f}"
            note = f"{loss}  {step['tokens_per_second']:.0f} tokens/s"
        self.bars.update(self.cells[name], total=total, completed=step.get("step", 0), note=note)

    def advance(self, name: str, outcome: str, *, before: bool = False) -> None:
        """A cell has ended, or had `before` anybody looked."""
        self.count += 1
        self.bars.update(self.sweep, advance=1)
        if name in self.cells:
            self.bars.remove_task(self.cells.pop(name))
        style = STYLES[outcome]
        told = f"[{style}]{outcome}[/]{' before' if before else ''}"
        self.console.print(f"{self.count}/{self.total} {escape(name)} {told}", highlight=False, soft_wrap=True)


def summary(outcomes: Sequence[tuple[str, Path, str]]) -> None:
    """A line for every kind of end, and one for every cell that has no scores, or failed checks: why, and where."""
    console = Console(stderr=True)
    counts = {kind: sum(outcome == kind for _, _, outcome in outcomes) for kind in STYLES}
    console.print(", ".join(f"{number} {kind}" for kind, number in counts.items() if number), highlight=False)
    for name, run, outcome in outcomes:
        word, why = ("failed checks", _failed_checks(run)) if outcome == "done" else (outcome, _reason(run))
        if why:
            style = STYLES.get(word, "yellow")
            console.print(f"  [{style}]{word}[/] {escape(f'{name}: {why}')}", highlight=False, soft_wrap=True)


def _reason(run: Path) -> str:
    """Why there are no scores."""
    record = {**runs.read_json(run / "unsupported.json"), **runs.read_json(run / "failure.json")}
    why = str(record.get("message") or record.get("reason") or "no record of it could be written, see above")
    return f"{why} (see {run / 'run.log'})" if "message" in record and (run / "run.log").exists() else why


def _failed_checks(run: Path) -> str:
    """Their names, and where what they found stands."""
    checks: dict[str, Any] = {}
    with contextlib.suppress(ValueError, OSError):  # scores of an older version, or changed by hand
        checks = dict(runs.read_json(run / "scores.json").get("checks") or {})
    names = [name for name, found in checks.items() if isinstance(found, dict) and found.get("ok") is False]
    return f"{', '.join(names)} (see {run / 'scores.json'})" if names else ""
