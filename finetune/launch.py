"""Cells as processes of their own: start them on their folders, stop them, and write down how they died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
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


class Job:
    """A claimed folder's job at work: a process with a session of its own that dies with this one, its log run.log."""

    def __init__(self, run: Path, launch: Mapping[str, Any], *, share: Mapping[str, str]) -> None:
        self.run = run
        with (run / "run.log").open("ab") as log:
            self.process = subprocess.Popen(
                command(run, launch),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=_environment(share),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

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
    until = time.monotonic() + GRACE_SECONDS
    for number in (signal.SIGTERM, signal.SIGKILL):
        for job in jobs:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            for job in jobs:
                job.process.wait(timeout=max(0.0, until - time.monotonic()))
            break
        until = time.monotonic() + GRACE_SECONDS
    for job in jobs:
        runs.fail(job.run, kind="interrupted", message="interrupted; the same command runs it again")


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


def _die_with_parent() -> None:
    """Ask Linux to kill the job when its supervisor dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
