"""`python -m finetune.ranks N FOLDER`: torch's launcher for a run in N processes, and each of these processes.

A rank dies with its launcher: asked for before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

from finetune.launch import die_with_parent
from finetune.stop import STATUS

RANK_SECONDS = 33  # between torch's SIGTERM to the ranks and its SIGKILL: a job has 30 s, launch.GRACE_SECONDS are more
LAUNCHER = "FINETUNE_LAUNCHER"  # its process id, for the ranks


def main() -> None:
    """The launcher starts this module again as its ranks."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _rank()
    num_processes, run = sys.argv[1:]
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(RANK_SECONDS)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as launch

    try:
        launch(["--standalone", f"--nproc-per-node={num_processes}", "-m", "finetune.ranks", num_processes, run])
    except SignalException:
        sys.exit(STATUS)
    except ChildFailedError as error:
        found = [(failure.timestamp, failure.exitcode) for failure in error.failures.values()]
        if (code := cause(found)) < 0:
            (Path(run) / "failure.json").unlink(missing_ok=True)  # by a rank that lost the dead one: no reason
        sys.exit(code if code > 0 else 128 - code)


def cause(failures: Collection[tuple[int, int]]) -> int:
    """The exit status of the rank that the others fell with, of (second, status): negative if a signal killed it.

    torch ends the other ranks itself, by SIGTERM and after `RANK_SECONDS` by SIGKILL; NCCL's watchdog aborts.
    """
    theirs = (-signal.SIGTERM, -signal.SIGABRT)
    began, first = min(failures, key=lambda failure: (failure[0], failure[1] in theirs))
    killed = [
        code for second, code in failures if code < 0 and code not in theirs and second < began + RANK_SECONDS - 2
    ]
    return killed[0] if killed else first


def _rank() -> None:
    die_with_parent(int(os.environ[LAUNCHER]))
    from finetune import train

    train.main(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
