"""One cell as a process of its own: start it on its folder, watch it, and write down how it died."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finetune import runs

GRACE_SECONDS = 30  # between the request to end and the kill
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def command(run: Path, launch: Mapping[str, Any]) -> list[str]:
    """The job's command line: a plain child for one process, torch's launcher for several."""
    job = ["-m", "finetune.train", str(run.resolve())]
    if launch["num_processes"] == 1:
        return [sys.executable, *job]
    ranks = ["--standalone", f"--nproc-per-node={launch['num_processes']}"]
    return [sys.executable, "-m", "torch.distributed.run", *ranks, *job]


def supervise(run: Path, launch: Mapping[str, Any], *, watch: Callable[[], None]) -> bool:
    """Run the job of a claimed folder to its end, calling `watch` twice a second; True when it left its scores.

    The job has a session of its own and dies with this process; its output goes to run.log.
    """
    with (run / "run.log").open("ab") as log:
        child = subprocess.Popen(
            command(run, launch),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(timeout=0.5)
                break
            watch()
    except BaseException:
        _stop(child)
        runs.fail(run, kind="interrupted", message="interrupted; the same command runs it again")
        raise
    done = child.returncode == 0 and (run / "scores.json").exists()
    if not done:
        runs.fail(run, **_death(run, child.returncode))
    return done


def _environment() -> dict[str, str]:
    """This package is found from any folder; idle threads do not burn the other cells' processors."""
    here = str(Path(__file__).parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", **os.environ, "PYTHONPATH": path}


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ask the job's whole session to end, then end it."""
    for number, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            child.wait(timeout=seconds)
            return


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
