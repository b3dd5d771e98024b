"""Room for cells: a share of the machine, and the process that its jobs come from."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from finetune.launch import KILL_SECONDS, Job, command, has_gpu, kill_session, started

Way = Literal["new", "fork", "stay"]  # how a cell gets its process


def process_of(launch: Mapping[str, Any], *, several: bool, deterministic: bool = False) -> Way:
    """How a cell gets its process: a "new" one, a "fork" of one with the imports, or to "stay" in the one before.

    `several` cells share a device. Determinism is decided before a CUDA context is made.
    """
    if launch["worker"] == "always" or (launch["worker"] == "auto" and several and has_gpu()):
        return "new" if deterministic else "stay"
    return "new" if has_gpu() else "fork"


class Slot:
    """A share of the machine, for one job after the other; the worker may have begun to import before the first."""

    def __init__(self, share: Mapping[str, str]) -> None:
        self.share = share
        self.worker: Worker | None = None
        self.base: str | None = None  # that its process keeps

    def start(self, run: Path, launch: Mapping[str, Any], *, way: Way) -> Job:
        """Start the job of a claimed folder."""
        if launch["num_processes"] == 1:
            if self.worker and self.worker.over(way):
                self.close()
            worker = self.begun()
            worker.start(run, way=way)
            return Job(run, worker)
        if self.worker and self.worker.stays:  # it holds memory of the device
            self.close()
        with (run / "run.log").open("ab") as log:
            return Job(run, started(command(run, launch), self.share, stdout=log, stderr=subprocess.STDOUT))

    def begun(self) -> Worker:
        """The worker, which imports from now on if it did not before."""
        self.worker = self.worker or Worker(self.share)
        return self.worker

    def close(self) -> None:
        """End the worker."""
        if self.worker:
            self.worker.close()
        self.worker = None


class Worker:
    """A `finetune.serve`, and the job that it runs now."""

    def __init__(self, share: Mapping[str, str]) -> None:
        self.threads = int(share.get("OMP_NUM_THREADS", 0))  # 0: as many as torch likes
        # Its own words; a job of it writes into run.log. Closed with the slot.
        self.said = tempfile.TemporaryFile()  # noqa: SIM115
        words = [sys.executable, "-m", "finetune.serve"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = started(words, share, **pipes, bufsize=0)  # a buffered line is none that `select` sees
        self.answers: list[int] = []
        self.way: Way | None = None  # of the job that it was asked for last
        self.ended = False  # was it killed? It may not be gone yet

    def check(self, parts: Sequence[Mapping[str, Any]]) -> Any:
        """`preflight.findings`; None if there are none, see `last_words`."""
        self._ask({"check": parts})
        assert self.process.stdout
        line = self.process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def over(self, way: Way) -> bool:
        """Can it take no further job of that kind?"""
        used = self.way is not None
        busy = used and len(self.answers) < 2  # with a job that could not be killed
        return self.ended or busy or self.process.poll() is not None or (way == "new" and used)

    def start(self, run: Path, *, way: Way) -> None:
        """Ask for a job; its process id follows when the worker is ready."""
        self.answers, self.way = [], way
        self._ask({"run": str(run.resolve()), "threads": self.threads, "stays": self.stays})

    def _ask(self, what: Mapping[str, Any]) -> None:
        assert self.process.stdin
        left = memoryview(json.dumps(what).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):  # a dead worker is seen by `poll`
            while left:
                left = left[self.process.stdin.write(left) :]

    @property
    def stays(self) -> bool:
        """Does the job run in the worker itself?"""
        return self.way in ("new", "stay")

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
        if self.way == "new" or (self.stays and self.answers[1] != 0):  # what failed may have left anything behind
            self._kill()
        return self.answers[1]

    @property
    def lives_on(self) -> bool:
        """Does the process of the job that ended wait for the next?"""
        return self.stays and not self.ended and self.process.poll() is None

    def close(self) -> None:
        """End it, and its job with it."""
        self._kill()
        self.said.close()

    def _kill(self) -> None:
        self.ended = True
        if self.process.poll() is None:
            kill_session(self.process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):  # in a system call of a dead device
                self.process.wait(KILL_SECONDS)

    def last_words(self) -> str:
        """The last line that a worker wrote which died before it began the job."""
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").split("\n") if not self.answers else []
        return next((line for line in reversed(lines) if line.strip()), "")
