"""Cells as processes of their own: start them on their folders, stop them, and write down how they died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from finetune import runs
from finetune.stop import STATUS

GRACE_SECONDS = 40.0  # a job has 30 s to write its checkpoint, also under torch's launcher, which kills its ranks then
KILL_SECONDS = 5.0  # until what was killed is gone; a process in a system call of a dead file server is not
BYTES_A_CELL = 2 * 2**30  # a cell on a miniature peaks at 1.0 to 1.3 GiB
INTERRUPTED = {"kind": runs.INTERRUPTED, "message": "interrupted; the same command goes on with it"}
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_libc = ctypes.CDLL(None)  # loaded here: a fork in the middle of an import must not import


def command(run: Path, launch: Mapping[str, Any]) -> list[str]:
    """The command line of a job of several processes."""
    return [sys.executable, "-m", "finetune.ranks", str(launch["num_processes"]), str(run.resolve())]


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
    # Who says how many cells run at once may also say how many threads each has; else the cores are shared.
    asked = os.environ.get("OMP_NUM_THREADS", "") if launch["jobs"] else ""
    threads = asked if asked.isdigit() and int(asked) else str(max(1, cores // (jobs * ranks)))
    return [{"OMP_NUM_THREADS": threads}] * jobs


class Served(Protocol):
    """A job that a worker runs; see finetune.slots."""

    @property
    def pid(self) -> int:
        """The job's process id; the worker's own while there is no job yet."""

    def poll(self) -> int | None:
        """The job's exit status, negative for a signal; None while it runs."""

    @property
    def lives_on(self) -> bool:
        """Does the process of the job that ended wait for the next?"""

    def last_words(self) -> str:
        """The last line that a worker wrote which died before it began the job."""


@dataclass(frozen=True)
class Job:
    """A claimed folder's job at work: a process with a session of its own that dies with this one, its log run.log."""

    run: Path
    process: subprocess.Popen[bytes] | Served

    def ended(self) -> bool:
        """Has it come to its end? One without scores leaves failure.json."""
        code = self.process.poll()
        if code is None:
            return False
        worker = None if isinstance(self.process, subprocess.Popen) else self.process
        if not (worker and worker.lives_on):
            kill(self)  # what it may have left in its session
        if code != 0 or runs.ended(self.run) not in runs.FINAL:
            fail(self.run, **_death(self.run, code, worker.last_words() if worker else ""))
        return True


def stop(jobs: Collection[Job], *, hurried: Callable[[], bool] = lambda: False) -> None:
    """Ask the jobs to end, give them time unless we are `hurried`, then end them and all that they started."""
    for job in jobs:
        _signal(job, signal.SIGTERM)
    _wait(jobs, GRACE_SECONDS, hurried=hurried)
    for job in jobs:
        kill(job)
    _wait(jobs, KILL_SECONDS)
    for job in jobs:
        fail(job.run, **INTERRUPTED)


def end(job: Job) -> None:
    """End a job at once and see it gone."""
    kill(job)
    _wait([job], KILL_SECONDS)


def kill(job: Job) -> None:
    """End a job at once, and all that it started."""
    kill_session(job.process.pid)


def kill_session(pid: int) -> None:
    """End a process and its session at once, and the processes that it started in sessions of their own."""
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                process.kill()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def fail(run: Path, *, kind: str, message: str) -> None:
    """`runs.fail`; on a disk that takes no file the message goes to the terminal alone."""
    try:
        runs.fail(run, kind=kind, message=message)
    except OSError as error:
        print(f"{run}: {message} (failure.json cannot be written: {error})", file=sys.stderr)


def _signal(job: Job, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(job.process.pid, number)


def _wait(jobs: Collection[Job], seconds: float, *, hurried: Callable[[], bool] = lambda: False) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and not hurried() and any(job.process.poll() is None for job in jobs):
        time.sleep(0.05)


def started(words: list[str], share: Mapping[str, str], **files: Any) -> subprocess.Popen[bytes]:
    """A process with its share of the machine and a session of its own; it is killed when this one dies, however."""
    here = os.getpid()
    how: dict[str, Any] = {"stdin": subprocess.DEVNULL, **files}
    return subprocess.Popen(
        words, env=_environment(share), start_new_session=True, preexec_fn=lambda: die_with_parent(here), **how
    )


def _environment(share: Mapping[str, str]) -> dict[str, str]:
    """This package is found from any folder; idle threads burn no processor; no bars are drawn into a log."""
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    polite = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    return {**polite, **os.environ, **share, "PYTHONPATH": path}


def _death(run: Path, code: int, said: str) -> dict[str, str]:
    """Kind and message of a job that ended without scores and without a word of its own."""
    last = said or next(reversed(runs.tail(run / "run.log", 1)), "")
    code = 128 - code if 128 < code <= 128 + max(signal.Signals) else code  # how a launcher tells of its rank's signal
    if code == -signal.SIGKILL:
        return {"kind": "killed", "message": "killed (out of memory?)"}
    if code < 0:
        return {"kind": "signal", "message": f"signal {-code} ({signal.Signals(-code).name})"}
    if code == STATUS:
        return INTERRUPTED
    where = "before the job began, " if said else ""
    return {"kind": "error", "message": f"{where}exit status {code}: {last[:300]}"}


def die_with_parent(parent: int) -> None:
    """Ask Linux to kill this process when its parent, a process of that id, dies, however it dies."""
    if sys.platform == "linux":
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it was asked for
        os._exit(1)
