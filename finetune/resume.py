"""A training that goes on where it stopped, as if it never had: what a step changes, kept and put back."""

from __future__ import annotations

import errno
import json
import logging
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from finetune import checkpoint, runs
from finetune.methods.method import Method
from finetune.stop import Stop

log = logging.getLogger("finetune")

Line = dict[str, Any]  # of steps.jsonl
FOLDER, RESUMED = "checkpoint", "resumed.json"
PARTIAL = ".predictions-*.jsonl"  # the answers of finished batches, a file for each process
SPARE_BYTES = 2**20  # for logs, predictions and scores


@dataclass(frozen=True)
class Moving:
    """Everything that an optimizer step changes, but the random states."""

    model: Any  # as the method attached it
    method: Method
    optimizer: Any
    schedule: Any
    scaler: Any  # of float16, or None

    def state(self, *, last: bool) -> dict[str, Any]:
        """What `restore` takes; after the last step no optimizer is needed."""
        found: dict[str, Any] = {"model": changing(self.model), "method": self.method.state()}
        if not last:
            found |= {"optimizer": self.optimizer.state_dict(), "schedule": self.schedule.state_dict()}
            found |= {"scaler": self.scaler.state_dict() if self.scaler else None}
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put a state back, in place; raises ValueError if it is of other weights."""
        _copy(state["model"], changing(self.model))
        self.method.restore(state["method"])
        if "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])


class Keeper:
    """Keeps one training: checkpoints by the clock, at the end and when the job is asked to end."""

    def __init__(self, run: Path, *, accelerator: Accelerator, num_steps: int, minutes: float, stop: Stop) -> None:
        self.run, self.folder = run, run / FOLDER
        self.accelerator, self.stop = accelerator, stop
        self.earlier = 0.0  # seconds of training before this process
        self.num_steps, self.seconds = num_steps, 60 * minutes
        self.history: list[Line] = []  # lines of the steps that are done
        self.num_resumed = 0  # of them by earlier processes
        self.written = time.perf_counter()  # when the last checkpoint was

    def resume(self, moving: Moving) -> list[Line]:
        """Put the newest whole checkpoint back; the lines of the steps that it holds, the only ones left on disk."""
        path = self._choose() if self.accelerator.is_main_process else None
        if self.accelerator.num_processes > 1:
            [path] = broadcast_object_list([path])
        if path is not None:
            state = checkpoint.read(path)
            moving.restore(state)
            put_random_state(state["random"][self.accelerator.process_index], self.accelerator.device)
            self.history = state["history"]
            self.earlier, self.num_resumed = self.history[-1]["seconds"], len(self.history)
            self.note_resumed()
            if self.accelerator.is_main_process:
                lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in self.history)
                runs.write_text(self.run / "steps.jsonl", "".join(lines))
        self.written = time.perf_counter()
        return list(self.history)

    def after(self, step: int, moving: Moving) -> None:
        """Keep the step if it is time; raises `Stopped` if the job was asked to end."""
        last, (stop, due) = step == self.num_steps, self._agreed()
        if last or stop or due:
            states = gather_object([random_state(self.accelerator.device)])
            if self.accelerator.is_main_process:
                state = moving.state(last=last) | {"random": states, "history": self.history}
                checkpoint.write(self.folder, state, step=step, about=self._about())
            self.accelerator.wait_for_everyone()
            self.written = time.perf_counter()
        if stop:
            self.stop.heed()

    def due(self) -> bool:
        """May `after` have something to do?"""
        return self.stop.asked or time.perf_counter() - self.written >= self.seconds

    def begin_without_steps(self) -> None:
        """Nothing is trained: only answers may be left of an earlier process."""
        if any(self.run.glob(PARTIAL)):
            self.note_resumed()

    def resumed(self) -> list[int]:
        """Steps after which the run went on in a new process."""
        try:
            found = json.loads((self.folder / RESUMED).read_bytes())
        except (OSError, ValueError, RecursionError):
            return []
        return [step for step in found if isinstance(step, int)] if isinstance(found, list) else []

    def note_resumed(self) -> None:
        """Remember that this process goes on where another ended."""
        log.info("resumed after step %d of %d", len(self.history), self.num_steps)
        if self.accelerator.is_main_process:
            self.folder.mkdir(exist_ok=True)
            runs.write_text(self.folder / RESUMED, json.dumps([*self.resumed(), len(self.history)]))

    def forget(self) -> None:
        """Remove what only an unfinished run needs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._forget_answers()

    def _choose(self) -> Path | None:
        """The newest checkpoint that is whole and of this run; without one everything is removed."""
        checkpoint.sweep(self.folder)
        for path in reversed(checkpoint.found(self.folder)):
            try:
                self._compare(checkpoint.verify(path))
            except ValueError as error:
                log.warning("%s/%s is passed over: %s", FOLDER, path.name, error)
                continue
            if checkpoint.step(path) < self.num_steps:
                self._forget_answers()
            return path
        if (self.run / "steps.jsonl").exists():
            log.warning("no checkpoint to go on from: starting at the beginning")
        self.forget()
        (self.run / "steps.jsonl").unlink(missing_ok=True)
        return None

    def _forget_answers(self) -> None:
        """Those of other weights."""
        for part in self.run.glob(PARTIAL):
            part.unlink(missing_ok=True)

    def _about(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that goes on from it."""
        precision = str(self.accelerator.mixed_precision)
        return {
            "processes": self.accelerator.num_processes,
            "precision": precision,
            "device": self.accelerator.device.type,
            "steps": self.num_steps,
        }

    def _compare(self, about: Mapping[str, Any]) -> None:
        differing = [f"{key}: {about.get(key)} -> {now}" for key, now in self._about().items() if about.get(key) != now]
        if differing:
            raise ValueError(f"it was made with other settings ({'; '.join(differing)})")

    def _agreed(self) -> tuple[bool, bool]:
        """Shall all processes stop, is a checkpoint due: the first word of any process, the main one's clock."""
        due = time.perf_counter() - self.written >= self.seconds
        if self.accelerator.num_processes == 1:
            return self.stop.asked, due
        mine = torch.tensor([self.stop.asked, due and self.accelerator.is_main_process], dtype=torch.float32)
        stop, due = (count > 0 for count in self.accelerator.reduce(mine.to(self.accelerator.device)).tolist())
        self.stop.asked |= stop
        return stop, due


def changing(model: Any) -> dict[str, Tensor]:
    """What a step may change: the parameters that require gradients, and the buffers."""
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return weights | dict(model.named_buffers())


def refuse_small_disk(run: Path, model: Any) -> None:
    """Raise OSError if the disk has no room for three checkpoints (one is being written) with two moments a weight,
    and the adapter.
    """
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    needed = 3 * (sum(t.nbytes for t in changing(model).values()) + 2 * trained) + trained + SPARE_BYTES
    kept = sum(file.stat().st_size for file in (run / FOLDER).rglob("*") if file.is_file())
    free = shutil.disk_usage(run).free
    if free + kept < needed:
        have, want = (f"{number / 2**20:.0f} MiB" for number in (free, needed - kept))
        raise OSError(errno.ENOSPC, f"training needs {want} on this disk for checkpoints and weights, {have} are free")


def random_state(device: torch.device) -> dict[str, Any]:
    """Python's, NumPy's and torch's random states, and the device's."""
    drawn: Any = np.random.get_state()
    kind, keys, *rest = drawn
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype("int64")), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def put_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Undo `random_state`."""
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@torch.no_grad()
def _copy(saved: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> None:
    """Equal tensors are left alone: some buffers are views in which several numbers are one."""
    if differing := sorted(saved.keys() ^ now.keys()):
        raise ValueError(f"the checkpoint is of another method or base ({', '.join(differing[:3])}); remove {FOLDER}/")
    for name, tensor in now.items():
        kept = saved[name].to(tensor.device)
        if kept.shape != tensor.shape:
            raise ValueError(f"the checkpoint is of another base ({name}: {list(kept.shape)}); remove {FOLDER}/")
        if not torch.equal(kept, tensor):
            tensor.copy_(kept)
