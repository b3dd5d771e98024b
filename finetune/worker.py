"""A worker: it has imported what a job needs, serves a sweep, line by line, and dies with it. See finetune.serve.

{"check": [parts]} asks for `preflight.findings`, one JSON line; null if there are none. {"run": folder, "threads": N,
"stays": bool} asks for a job: its process id follows, and at its end its exit status. A job is a fork with a session of
its own; one that `stays` runs in this process, which keeps the CUDA context (a context does not fork) and the base for
the next, and ends after a job that failed, whatever that left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch
from accelerate.state import AcceleratorState

from finetune import train
from finetune.launch import die_with_parent
from finetune.memory import forget_peaks, free
from finetune.preflight import findings
from finetune.shelf import Shelf
from finetune.stop import SIGNALS


def main() -> None:
    """Serve until the input ends."""
    bases = Shelf()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        job = json.loads(line)
        if "check" in job:
            print(_found(job["check"]), file=answers, flush=True)
            continue
        run, threads = Path(job["run"]), job["threads"]
        code = _stay(run, bases, answers, threads=threads) if job["stays"] else _fork(run, answers, threads=threads)
        print(code, file=answers, flush=True)
        if job["stays"] and code != 0:
            return


def _found(parts: Sequence[Mapping[str, Any]]) -> str:
    """The findings of a fork, so that data and the number of GPUs leave nothing behind here."""
    here, (reader, writer) = os.getpid(), os.pipe()
    if os.fork() == 0:
        code = 1
        try:
            die_with_parent(here)
            with os.fdopen(writer, "w") as file:
                file.write(json.dumps(findings(parts)))
            code = 0
        except BaseException:  # the sweep shows its last line
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    return text if os.wait()[1] == 0 else "null"


def _fork(run: Path, answers: TextIO, *, threads: int) -> int:
    """The exit status of a job in a process of its own."""
    here, pid = os.getpid(), os.fork()
    if pid == 0:
        die_with_parent(here)
        become(run, threads=threads)

    def tell(number: int, _: object) -> None:
        """Whoever asks may not know the job's id yet; we stay, or the job would die with us."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    before = {number: signal.signal(number, tell) for number in SIGNALS}
    print(pid, file=answers, flush=True)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for number, handler in before.items():
        signal.signal(number, handler)
    return code


def become(run: Path, *, threads: int) -> NoReturn:
    """Turn this fork into the job."""
    os.setsid()
    code = 1
    try:
        with _log_of(run):
            code = _status(run, threads=threads)
    finally:
        os._exit(code)


def _stay(run: Path, bases: Shelf, answers: TextIO, *, threads: int) -> int:
    """The exit status of a job in this process, which is afterwards as it was."""
    print(os.getpid(), file=answers, flush=True)
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    with _log_of(run):
        forget_peaks()
        code = _status(run, bases, threads=threads)
        bases.check()
    free()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state()  # it refuses another precision
    torch.compiler.reset()  # each run's layers are new ones: compiled code of the last would count against a limit
    return code


def _status(run: Path, bases: Shelf | None = None, *, threads: int) -> int:
    if threads:
        torch.set_num_threads(threads)
    try:
        train.main(run, bases)
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


@contextlib.contextmanager
def _log_of(run: Path) -> Iterator[None]:
    """Within, what is said goes into run.log, and there is no input."""
    before = [os.dup(number) for number in range(3)]
    with (run / "run.log").open("ab") as log, Path(os.devnull).open("rb") as nothing:
        for number, file in enumerate((nothing, log, log)):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for number, old in enumerate(before):
            os.dup2(old, number)
            os.close(old)
