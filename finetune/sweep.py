"""The cells of one command, brought to their ends: claimed, started, watched, waited for, stopped.

Several sweeps may work on one tree: each cell is trained by the one that claims it, and the others wait for it. A cell
whose owner dies is taken over.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune import claims, runs
from finetune.cells import Cell, refusals
from finetune.config import unsupported
from finetune.interrupts import Ended, held
from finetune.launch import Job, end, shares, stop
from finetune.progress import Progress
from finetune.slots import Slot, Worker, process_of

LOOK_SECONDS = 0.2  # between two looks at the jobs
ELSEWHERE_SECONDS = 2.0  # between two looks at the cells of other sweeps

Failures = Mapping[Path, tuple[int, int] | None]  # what tells each folder's failure.json from another


def slots(
    todo: Sequence[Cell], num_gpus: int, stack: contextlib.ExitStack, *, first: Worker | None = None
) -> list[Slot]:
    """Room for the cells that run at once, with workers that begin to import; `first` may be that of the first."""
    room = [Slot(share) for share in _shares(todo, num_gpus)[: max(1, len(todo))]]
    for slot in room:
        stack.enter_context(contextlib.closing(slot))
    # `first` was started on the whole machine, whose GPUs its driver has counted: with one it is the same.
    if first and num_gpus == 1 and "CUDA_VISIBLE_DEVICES" in room[0].share:
        room[0].worker = first
    if any(cell.config["launch"]["num_processes"] == 1 for cell in todo):  # others have processes of their own
        for slot in room:
            slot.begun()
    if first and room[0].worker is not first:
        first.close()
    return room


def failures(todo: Sequence[Cell]) -> Failures:
    """Those that are there before a command does anything: they are tried again, unlike those of a sweep beside it."""
    return {cell.folder: _failure(cell.folder) for cell in todo}


def run_all(todo: Sequence[Cell], free: list[Slot], progress: Progress, before: Failures) -> dict[Path, str]:
    """Bring every cell to an end, as many at once as there are slots; how each ended, by folder. Raises `Ended`."""
    sweep = Sweep(todo, free, progress, before)
    with held() as asked:
        try:
            while sweep.goes_on():
                if asked:
                    raise Ended(asked[0])
                time.sleep(LOOK_SECONDS)
        except BaseException:
            sweep.stop(asked)
            raise
    return sweep.outcomes


class Sweep:
    """Where the cells of a command stand."""

    def __init__(self, todo: Sequence[Cell], free: list[Slot], progress: Progress, before: Failures) -> None:
        self.free, self.progress = free, progress
        self.waiting = deque(_bases_first(todo) if len(free) > 1 else todo)
        left = [cell for cell in todo if runs.state(cell.folder) not in runs.FINAL]
        self.several = len(left) > len(free)  # do cells follow one another on a device?
        self.at_work: dict[Path, tuple[Cell, Job, Slot]] = {}
        self.elsewhere: list[Cell] = []  # at work in another sweep
        self.outcomes: dict[Path, str] = {}
        self.failures = before
        self.seen: claims.Seen = {}
        self.told: set[Path] = set()
        self.next_beat = self.next_look = 0.0

    def goes_on(self) -> bool:
        """Start what there is room for, see what ended; is there more to do?"""
        now = time.monotonic()
        if now >= self.next_look:
            self.next_look = now + ELSEWHERE_SECONDS
            self.waiting.extend(self.elsewhere)
            self.elsewhere.clear()
        while self.waiting and self.free:
            self._start(self._next(self.free[-1]))
        if now >= self.next_beat:
            self.next_beat = now + claims.BEAT_SECONDS
            for folder in [folder for folder in self.at_work if not claims.beat(folder)]:
                self._lose(folder)
        for cell, job, _ in list(self.at_work.values()):
            if job.ended():
                self._finish(cell)
            else:
                self.progress.watch(cell.name, cell.folder)
        return bool(self.waiting or self.at_work or self.elsewhere)

    def stop(self, asked: list[int]) -> None:
        """End what is at work; a further signal in `asked` ends it at once."""
        before = len(asked)
        jobs = [job for _, job, _ in self.at_work.values()]
        if asked and jobs:
            self.progress.say(f"stopping {len(jobs)} cells at their next checkpoint; once more ends them at once")
        stop(jobs, hurried=lambda: len(asked) > before)
        for folder in self.at_work:
            claims.release(folder)

    def _next(self, slot: Slot) -> Cell:
        """The first cell on the base that the slot's process keeps, else the first."""
        cell = next((cell for cell in self.waiting if _base(cell) == slot.base), self.waiting[0])
        self.waiting.remove(cell)
        return cell

    def _start(self, cell: Cell) -> None:
        begun = self._begin(cell, self.free[-1])
        if isinstance(begun, Job):
            self.at_work[cell.folder] = (cell, begun, self.free.pop())
        elif begun == "running":
            self.elsewhere.append(cell)
            if cell.folder not in self.told:
                self.told.add(cell.folder)
                self.progress.say(f"{cell.name} is at work in another sweep, waiting for it")
        else:
            self._end(cell, begun, before=begun == "done")

    def _begin(self, cell: Cell, slot: Slot) -> Job | str:
        """Start a cell's job; or what became of the cell without one: done, unsupported, failed, or running."""
        state = runs.state(cell.folder)
        if state in runs.FINAL:
            return state
        if state == "failed" and self._failed_elsewhere(cell.folder):
            return "failed"
        try:
            cell.folder.mkdir(parents=True, exist_ok=True)
            claims.take(cell.folder, seen=self.seen)
        except claims.Taken:
            return "running"
        except OSError as error:
            return _refuse(cell, str(error))
        try:
            return _claimed(cell, slot, several=self.several)
        except OSError as error:
            claims.release(cell.folder)
            return _refuse(cell, str(error))

    def _failed_elsewhere(self, folder: Path) -> bool:
        """Has another sweep tried this cell since we began, and failed?"""
        return _failure(folder) != self.failures[folder]

    def _finish(self, cell: Cell) -> None:
        _, _, slot = self.at_work.pop(cell.folder)
        self.free.append(slot)
        outcome = runs.ended(cell.folder)  # before another sweep can take it
        claims.release(cell.folder)
        self._end(cell, "failed" if outcome == "unfinished" else outcome)  # a full disk takes no failure.json
        if not (self.waiting or self.elsewhere):
            slot.close()  # what it keeps is memory that those still at work may want

    def _lose(self, folder: Path) -> None:
        """We were away for so long that another sweep took the cell: ours must not write any more."""
        cell, job, slot = self.at_work.pop(folder)
        end(job)
        self.free.append(slot)
        self.elsewhere.append(cell)
        self.progress.say(f"{cell.name} was taken over by another sweep, which thought this one dead")

    def _end(self, cell: Cell, outcome: str, *, before: bool = False) -> None:
        self.outcomes[cell.folder] = outcome
        self.progress.advance(cell.name, outcome, before=before)


def _claimed(cell: Cell, slot: Slot, *, several: bool) -> Job | str:
    """What becomes of a cell that is ours: another sweep may have ended it since we looked."""
    if (outcome := runs.ended(cell.folder)) in runs.FINAL:
        claims.release(cell.folder)
        return outcome
    if problems := refusals(cell):
        claims.release(cell.folder)
        return _refuse(cell, "; ".join(problems))
    runs.begin(cell.folder, cell.config)
    runs.clear(cell.folder)
    reason = unsupported(cell.config)
    if not reason:
        launch = cell.config["launch"]
        how = process_of(launch, several=several, deterministic=cell.config["deterministic"])
        slot.base = _base(cell) if how == "stay" else None
        return slot.start(cell.folder, launch, way=how)
    runs.write_json(cell.folder / "unsupported.json", {"reason": reason})
    claims.release(cell.folder)
    return "unsupported"


def _refuse(cell: Cell, why: str) -> str:
    print(f"{cell.name}: {why}", file=sys.stderr)
    return "failed"


def _failure(folder: Path) -> tuple[int, int] | None:
    """What tells one failure.json from another."""
    with contextlib.suppress(OSError):
        found = (folder / "failure.json").stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _shares(todo: Sequence[Cell], num_gpus: int) -> list[dict[str, str]]:
    """What each of the cells that run at once may use: as few at once as the most demanding cell wants."""
    asked = (
        shares(
            cell.config["launch"],
            num_gpus=num_gpus,
            miniature=cell.config["model"]["path"] is None
            and cell.config["model"]["weights"].get(cell.config["scale"]) == "miniature",
        )
        for cell in todo
    )
    return min(asked, key=len, default=[{"OMP_NUM_THREADS": "1"}])


def _base(cell: Cell) -> str:
    return cell.folder.parts[-3]


def _bases_first(todo: Sequence[Cell]) -> list[Cell]:
    """The first cell of every base, then the second of each: bases that must be built are built side by side."""
    seen: Counter[str] = Counter()
    rank: dict[Path, int] = {}
    for cell in todo:
        rank[cell.folder] = seen[_base(cell)]
        seen[_base(cell)] += 1
    return sorted(todo, key=lambda cell: rank[cell.folder])
