"""`python -m finetune.worker`: imports what a job needs once, then forks a job for every folder it reads.

One JSON line in: {"run": folder, "threads": N}. Two lines out: the job's process id, and its exit status. The job has a
session of its own; it dies with this process, as this one dies with the sweep. For CPUs: a CUDA context does not fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch

from finetune import train
from finetune.launch import die_with_parent

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # that ask a job for a checkpoint


def main() -> None:
    """Serve until the input ends."""
    for line in sys.stdin:
        job = json.loads(line)
        here, pid = os.getpid(), os.fork()
        if pid == 0:
            die_with_parent(here)
            _become(Path(job["run"]), threads=job["threads"])
        before = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}  # the job would die with us
        print(pid, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        for number, handler in before.items():
            signal.signal(number, handler)
        print(code, flush=True)


def _become(run: Path, *, threads: int) -> None:
    """Turn this fork into the job: its log is run.log, its input is empty."""
    os.setsid()
    with (run / "run.log").open("ab") as log, Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(threads)
    code = 1
    try:
        train.main(run)
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
