"""Clocks: real tokens per second between two moments at which the device is idle, and the phases of a cell."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

WARM_UP = 8  # steps that no rate counts


class Over(Exception):
    """The time is over."""


class Meter:
    """Real tokens per second of whole cycles of steps, and the seconds of named phases.

    It ends after so many seconds, or after exactly `num_steps` steps. Where the late rate, that of the last half, is
    far above the rate of all, a contender was not steady yet: it prepares, say, each new length of a batch.
    """

    def __init__(self, seconds: float, *, cycle: int = 1, num_steps: int | None = None) -> None:
        self.seconds, self.cycle, self.num_steps = seconds, cycle, num_steps
        self.began = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.start = self.took = 0.0
        self.steps = self.tokens = self.all_tokens = 0
        self.first_loss = 0.0
        self.cycles: list[tuple[float, int]] = []  # at the end of each: when its last step was launched, and tokens

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Within, seconds count for `name`."""
        began = now()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + now() - began

    def step(self, num_tokens: int) -> bool:
        """Count a step; True when the time is over."""
        self.steps += 1
        self.all_tokens += num_tokens
        if self.steps == WARM_UP:
            self.start, self.tokens = now(), 0
            self.phases["start_up"] = self.start - self.began
            self.cycles = [(self.start, 0)]
        elif self.steps > WARM_UP:
            self.tokens += num_tokens
            whole, moment = (self.steps - WARM_UP) % self.cycle == 0, time.perf_counter()
            last = self.steps == self.num_steps
            if whole or last:
                self.cycles.append((moment, self.tokens))
            if last or (whole and not self.num_steps and moment - self.start > self.seconds):
                self.took = now() - self.start
                return True
        return False

    def result(self) -> dict[str, Any]:
        """What a table shows."""
        cuda = torch.cuda.is_available()
        return {
            "tokens_per_second": self.tokens / self.took,
            "late_tokens_per_second": self._late(),
            "steps_per_second": (self.steps - WARM_UP) / self.took,
            "num_steps": self.steps,
            "num_tokens": self.all_tokens,
            "start_up_seconds": self.phases["start_up"],
            "first_loss": self.first_loss,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        }

    def _late(self) -> float:
        """Of the last half of the cycles, or more where they are odd in number."""
        (began, before), (ended, after) = self.cycles[(len(self.cycles) - 1) // 2], self.cycles[-1]
        return (after - before) / (ended - began)


def now() -> float:
    """Seconds, when the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
