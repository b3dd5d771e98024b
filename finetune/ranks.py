"""`python -m finetune.ranks N FOLDER`: torch's launcher for a run in N processes, and each of these processes.

A rank dies with its launcher: asked for before torch is imported, which takes seconds.
"""

from __future__ import annotations

import os
import sys
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
        codes = [failure.exitcode for failure in error.failures.values()]
        if killed := [128 - code for code in codes if code < 0]:
            (Path(run) / "failure.json").unlink(missing_ok=True)  # by a rank that lost the dead one: no reason
            sys.exit(killed[0])
        sys.exit(error.get_first_failure()[1].exitcode)  # it has said why


def _rank() -> None:
    die_with_parent(int(os.environ[LAUNCHER]))
    from finetune import train

    train.main(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
