"""A worker: it has imported what a job needs, serves a sweep, line by line, and dies with it. See finetune.serve.

{"check": [parts]} asks for `preflight.findings`, one JSON line; null if there are none. {"run": folder, "threads": N,
"alike": N, "stays": bool} asks for a job: its process id follows, and at its end its exit status. A job is a fork with
a session of its own; one that `stays` runs in this process, which keeps the CUDA context (a context does not fork) and
the base for the next, and ends after a job that failed, whatever that left behind.
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
from typing import Any, NamedTuple, NoReturn, TextIO

import torch
from accelerate.state import AcceleratorState

from finetune import train
from finetune.launch import die_with_parent
from finetune.memory import forget_peaks, free
from finetune.preflight import findings
from finetune.shelf import Shelf
from finetune.stop import SIGNALS


class Asked(NamedTuple):
    """A job."""

    run: Path
    threads: int  # 0: as many as torch likes
    alike: int  # cells of the command, this one included, whose layers are compiled to the same code


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
        asked = Asked(Path(job["run"]), job["threads"], job["alike"])
        code = _stay(asked, bases, answers) if job["stays"] else _fork(asked, answers)
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


def _fork(asked: Asked, answers: TextIO) -> int:
    """The exit status of a job in a process of its own."""
    here, pid = os.getpid(), os.fork()
    if pid == 0:
        die_with_parent(here)
        become(asked)

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


def become(asked: Asked) -> NoReturn:
    """Turn this fork into the job."""
    os.setsid()
    code = 1
    try:
        with _log_of(asked.run):
            code = _status(asked)
    finally:
        os._exit(code)


def _stay(asked: Asked, bases: Shelf, answers: TextIO) -> int:
    """The exit status of a job in this process, which is afterwards as it was."""
    print(os.getpid(), file=answers, flush=True)
    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGALRM)}
    with _log_of(asked.run):
        forget_peaks()
        code = _status(asked, bases)
        bases.check()
    free()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    AcceleratorState._reset_state()  # it refuses another precision
    torch.compiler.reset()  # each run's layers are new ones: compiled code of the last would count against a limit
    return code


def _status(asked: Asked, bases: Shelf | None = None) -> int:
    if asked.threads:
        torch.set_num_threads(asked.threads)
    try:
        train.main(asked.run, bases, alike=asked.alike)
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
