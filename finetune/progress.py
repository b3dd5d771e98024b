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

    def advance(self, name: str, outcome: str) -> None:
        """A cell has ended."""
        self.count += 1
        self.bars.update(self.sweep, advance=1)
        if name in self.cells:
            self.bars.remove_task(self.cells.pop(name))
        style = STYLES[outcome]
        self.console.print(
            f"{self.count}/{self.total} {escape(name)} [{style}]{outcome}[/]", highlight=False, soft_wrap=True
        )


def summary(outcomes: Sequence[tuple[str, Path, str]]) -> None:
    """A line for every kind of end, and one for every cell that has no scores: why, and its log."""
    console = Console(stderr=True)
    counts = {kind: sum(outcome == kind for _, _, outcome in outcomes) for kind in STYLES}
    console.print(", ".join(f"{number} {kind}" for kind, number in counts.items() if number), highlight=False)
    for name, run, outcome in outcomes:
        if outcome != "done":
            record = {**runs.read_json(run / "unsupported.json"), **runs.read_json(run / "failure.json")}
            why = str(record.get("message") or record.get("reason") or "no record of it could be written, see above")
            log = f" (see {run / 'run.log'})" if outcome == "failed" else ""
            style = STYLES[outcome]
            console.print(f"  [{style}]{outcome}[/] {escape(f'{name}: {why}{log}')}", highlight=False, soft_wrap=True)
