"""Signals to the sweep: the first asks it to end politely, a second one to end at once.

SIGTERM, SIGUSR1 (Slurm's warning) and SIGHUP (the terminal is gone) end it with status 75, Ctrl-C with 130.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from finetune import stop

SIGNALS = (*stop.SIGNALS, signal.SIGHUP)


class Ended(BaseException):
    """A signal asked the sweep to end: no error, so that nothing on the way catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 130 if number == signal.SIGINT else stop.STATUS


def listen() -> None:
    """Raise `Ended` wherever a signal finds the program; Ctrl-C and SIGHUP stay ignored where a shell says so."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _raise)


@contextlib.contextmanager
def held() -> Iterator[list[int]]:
    """Collect the signals instead: what is done inside is never left half done."""
    asked: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: asked.append(number))
    try:
        yield asked
    except BaseException:
        deaf()
        raise
    for number, handler in before.items():
        signal.signal(number, handler)


def deaf() -> None:
    """Nothing is left to be ended."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _raise(number: int, _: object) -> None:
    raise Ended(number)
