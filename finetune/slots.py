"""Room for cells: a share of the machine, and the process that its jobs come from."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.launch import Job, command, has_gpu, kill_session, started


def way(launch: Mapping[str, Any], *, several: bool, deterministic: bool = False) -> str:
    """How a cell gets its process: "new" one, "fork" of one with the imports, or "stay" in that of the cell before.

    `several` cells share a device. Determinism is decided before a CUDA context is made.
    """
    if launch["num_processes"] > 1:
        return "new"
    if launch["worker"] == "always" or (launch["worker"] == "auto" and several and has_gpu()):
        return "new" if deterministic else "stay"
    return "new" if has_gpu() else "fork"


class Slot:
    """A share of the machine, for one job after the other; `forks`: a worker begins to import before the first."""

    def __init__(self, share: Mapping[str, str], *, forks: bool) -> None:
        self.share = share
        self.worker = Worker(share) if forks else None
        self.base: str | None = None  # that its process keeps

    def start(self, run: Path, launch: Mapping[str, Any], *, way: str) -> Job:
        """Start the job of a claimed folder."""
        if way != "new":
            if self.worker is None or self.worker.process.poll() is not None:
                self.close()
                self.worker = Worker(self.share)
            self.worker.start(run, stays=way == "stay")
            return Job(run, self.worker)
        if self.worker and self.worker.stays:  # it holds memory of the device
            self.close()
        with (run / "run.log").open("ab") as log:
            return Job(run, started(command(run, launch), self.share, stdout=log, stderr=subprocess.STDOUT))

    def close(self) -> None:
        """End the worker."""
        if self.worker:
            self.worker.close()
        self.worker = None


class Worker:
    """A `finetune.worker`, and the job that it runs now."""

    def __init__(self, share: Mapping[str, str]) -> None:
        self.threads = int(share.get("OMP_NUM_THREADS", 0))  # 0: as many as torch likes
        # Its own words; a job of it writes into run.log. Closed with the slot.
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        words = [sys.executable, "-m", "finetune.worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = started(words, share, **pipes, bufsize=0)  # a buffered line is none that `select` sees
        self.answers: list[int] = []
        self.stays = False  # does the job run in the worker itself?

    def start(self, run: Path, *, stays: bool) -> None:
        """Ask for a job; its process id follows when the worker is ready."""
        self.answers, self.stays = [], stays
        asked = {"run": str(run.resolve()), "threads": self.threads, "stays": stays}
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # a dead worker is seen by `poll`
            self.process.stdin.write(json.dumps(asked).encode() + b"\n")

    @property
    def pid(self) -> int:
        """The job's process id; the worker's own while there is no job yet."""
        return self.answers[0] if self.answers else self.process.pid

    def poll(self) -> int | None:
        """The job's exit status, negative for a signal; None while it runs."""
        assert self.process.stdout
        while len(self.answers) < 2 and select.select([self.process.stdout], [], [], 0)[0]:
            line = self.process.stdout.readline()
            if not line:
                return self.process.wait()
            self.answers.append(int(line))
        if len(self.answers) < 2:
            return None
        if self.stays and self.answers[1] != 0:  # it ends by itself, but perhaps not before the next job is asked for
            self._kill()
        return self.answers[1]

    @property
    def lives_on(self) -> bool:
        """Does the process of the job that ended wait for the next?"""
        return self.stays and self.process.poll() is None

    def close(self) -> None:
        """End it, and its job with it."""
        self._kill()
        self.said.close()

    def _kill(self) -> None:
        kill_session(self.process.pid)
        self.process.wait()

    def last_words(self) -> str:
        """The last line that a worker wrote which died before it began the job."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").split("\n") if not self.answers else []
        return next((line for line in reversed(lines) if line.strip()), "")
