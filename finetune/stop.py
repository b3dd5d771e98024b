"""A polite end: SIGTERM, SIGINT and SIGUSR1 ask the job to keep what it has and to go."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # that ask a job for a checkpoint
STATUS = 75  # EX_TEMPFAIL of sysexits.h, of a job and of a sweep: the same command goes on
PATIENCE = 20.0  # seconds for what is at work to come to a good end; a sweep kills after 40


class Stopped(BaseException):
    """The job was asked to end; no error, so that nothing on the way catches it."""


class Stop:
    """Was this process asked to end?"""

    def __init__(self) -> None:
        self.asked = False
        self.waits = False

    def listen(self) -> None:
        """Take the signals, of which a second SIGINT ends the process at once."""
        for number in SIGNALS:
            signal.signal(number, self._take)
        signal.signal(signal.SIGALRM, self._lose_patience)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, a request waits for `heed`, twenty seconds at the most; elsewhere it raises `Stopped` at once."""
        self.heed()
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        self.heed()

    def heed(self) -> None:
        """A good moment to end."""
        if self.asked:
            raise Stopped

    def _take(self, number: int, _: object) -> None:
        if self.asked:
            if number == signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.asked = True
        os.write(1, f"asked to end by {signal.Signals(number).name}\n".encode())  # past buffers that are in use
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        if not self.waits:
            raise Stopped

    def _lose_patience(self, *_: object) -> None:
        raise Stopped
