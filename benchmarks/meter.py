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

    It ends after so many seconds, or after exactly `num_steps` steps.
    """

    def __init__(self, seconds: float, *, cycle: int = 1, num_steps: int | None = None) -> None:
        self.seconds, self.cycle, self.num_steps = seconds, cycle, num_steps
        self.began = time.perf_counter()
        self.phases: dict[str, float] = {}
        self.start = self.took = 0.0
        self.steps = self.tokens = self.all_tokens = 0
        self.first_loss = 0.0

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
        elif self.steps > WARM_UP:
            self.tokens += num_tokens
            whole = (self.steps - WARM_UP) % self.cycle == 0
            timed = whole and time.perf_counter() - self.start > self.seconds
            if self.steps == self.num_steps or (timed and not self.num_steps):
                self.took = now() - self.start
                return True
        return False

    def result(self) -> dict[str, Any]:
        """What a table shows."""
        cuda = torch.cuda.is_available()
        return {
            "tokens_per_second": self.tokens / self.took,
            "steps_per_second": (self.steps - WARM_UP) / self.took,
            "num_steps": self.steps,
            "num_tokens": self.all_tokens,
            "start_up_seconds": self.phases["start_up"],
            "first_loss": self.first_loss,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
        }


def now() -> float:
    """Seconds, when the device is idle."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
