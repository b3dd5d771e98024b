"""Cells as processes of their own: start them on their folders, stop them, and write down how they died."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from finetune import runs

GRACE_SECONDS = 30  # between the request to end and the kill
BYTES_A_CELL = 2 * 2**30  # a cell on a miniature peaks at 1.0 to 1.3 GiB
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def command(run: Path, launch: Mapping[str, Any]) -> list[str]:
    """The job's command line: a plain child for one process, torch's launcher for several."""
    job = ["-m", "finetune.train", str(run.resolve())]
    if launch["num_processes"] == 1:
        return [sys.executable, *job]
    ranks = ["--standalone", f"--nproc-per-node={launch['num_processes']}"]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, *job]


def has_gpu() -> bool:
    """Does this host show a GPU? Asked without torch, before anything starts."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def shares(launch: Mapping[str, Any], *, num_gpus: int, miniature: bool) -> list[dict[str, str]]:
    """What each of the cells that run at once sees of the machine, as environment variables.

    `launch.jobs` cells; without it one for each group of GPUs that a cell wants or, on a CPU, one for each core if the
    bases are miniatures (their small operations gain little from a second thread), else one.
    """
    ranks, cores = launch["num_processes"], len(os.sched_getaffinity(0))
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if "CUDA_VISIBLE_DEVICES" in os.environ else []
    gpus = gpus or [str(number) for number in range(num_gpus)]
    if launch["device"] != "cpu" and num_gpus:
        groups = [gpus[i : i + ranks] for i in range(0, len(gpus) - ranks + 1, ranks)] or [gpus]
        jobs = launch["jobs"] or len(groups)
        return [{"CUDA_VISIBLE_DEVICES": ",".join(groups[i % len(groups)])} for i in range(jobs)]
    jobs = launch["jobs"] or (
        max(1, min(cores // ranks, psutil.virtual_memory().available // BYTES_A_CELL)) if miniature else 1
    )
    return [{"OMP_NUM_THREADS": str(max(1, cores // (jobs * ranks)))}] * jobs


class Slot:
    """A share of the machine, for one job after the other; `forks`: a worker keeps the imports between them."""

    def __init__(self, share: Mapping[str, str], *, forks: bool) -> None:
        self.share = share
        self.worker = Worker(share) if forks else None

    def start(self, run: Path, launch: Mapping[str, Any]) -> Job:
        """Start the job of a claimed folder."""
        if self.worker and launch["num_processes"] == 1:
            if self.worker.process.poll() is not None:
                self.worker = Worker(self.share)
            self.worker.start(run)
            return Job(run, self.worker)
        with (run / "run.log").open("ab") as log:
            return Job(run, _popen(command(run, launch), self.share, stdout=log, stderr=subprocess.STDOUT))

    def close(self) -> None:
        """End the worker."""
        if self.worker:
            self.worker.process.kill()
            self.worker.process.wait()


class Worker:
    """A `finetune.worker`, and the job that it runs now."""

    def __init__(self, share: Mapping[str, str]) -> None:
        self.threads = int(share["OMP_NUM_THREADS"])
        words = [sys.executable, "-m", "finetune.worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = _popen(words, share, **pipes, bufsize=0)  # a buffered line is none that `select` sees
        self.answers: list[int] = []

    def start(self, run: Path) -> None:
        """Ask for a job; its process id follows when the worker is ready."""
        self.answers = []
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # a dead worker is seen by `poll`
            self.process.stdin.write(json.dumps({"run": str(run.resolve()), "threads": self.threads}).encode() + b"\n")

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
        return self.answers[1] if len(self.answers) == 2 else None


@dataclass(frozen=True)
class Job:
    """A claimed folder's job at work: a process with a session of its own that dies with this one, its log run.log."""

    run: Path
    process: subprocess.Popen[bytes] | Worker

    def ended(self) -> bool:
        """Has it come to its end? One without scores leaves failure.json."""
        code = self.process.poll()
        if code is None:
            return False
        if code != 0 or not (self.run / "scores.json").exists():
            runs.fail(self.run, **_death(self.run, code))
        return True


def stop(jobs: Collection[Job]) -> None:
    """Ask the jobs' whole sessions to end, then end them; each folder says that it was interrupted."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, number)
        until = time.monotonic() + GRACE_SECONDS
        with contextlib.suppress(KeyboardInterrupt):
            while time.monotonic() < until and any(job.process.poll() is None for job in jobs):
                time.sleep(0.05)
    for job in jobs:
        runs.fail(job.run, kind="interrupted", message="interrupted; the same command runs it again")


def _popen(words: list[str], share: Mapping[str, str], **files: Any) -> subprocess.Popen[bytes]:
    how = {"stdin": subprocess.DEVNULL, "start_new_session": True, "preexec_fn": die_with_parent}
    return subprocess.Popen(words, env=_environment(share), **{**how, **files})


def _environment(share: Mapping[str, str]) -> dict[str, str]:
    """This package is found from any folder; idle threads do not burn the other cells' processors."""
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    polite = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    gpus = {key: value for key, value in share.items() if key.startswith("CUDA")}
    return {**polite, **share, **os.environ, **gpus, "PYTHONPATH": path}


def _death(run: Path, code: int) -> dict[str, str]:
    """Kind and message of a job that ended without scores and without a word of its own."""
    last = next(reversed(runs.tail(run / "run.log", 1)), "")
    if code == -signal.SIGKILL:
        return {"kind": "killed", "message": "killed (out of memory?)"}
    if code < 0:
        return {"kind": "signal", "message": f"signal {-code} ({signal.Signals(-code).name})"}
    return {"kind": "error", "message": f"exit status {code}: {last[:300]}"}


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
