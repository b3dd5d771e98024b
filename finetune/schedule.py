"""What a training step goes by: the learning rate, the steps at which the loss is validated, the time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def schedule_factor(step: int, num_steps: int, optim: Mapping[str, Any]) -> float:
    """The share of the learning rate at a step (from 0): linear warm-up, then cosine, linear or constant."""
    warmup = round(optim["warmup"] * num_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, num_steps - warmup)
    factors = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    return factors[optim["schedule"]]


def spaced(count: int, num_steps: int) -> set[int]:
    """Evenly spaced step numbers, the last included."""
    return {round(num_steps * (i + 1) / count) for i in range(count)} - {0}


class Clock:
    """Seconds of training alone, and real tokens per second over the last twenty steps; goes on after `history`."""

    def __init__(self, history: Sequence[Mapping[str, Any]] = ()) -> None:
        self.marks: list[tuple[float, int]] = [(0.0, 0), *((x["seconds"], x["num_tokens"]) for x in history)]
        self.start = time.perf_counter() - self.marks[-1][0]
        self.idle = 0.0

    @property
    def seconds(self) -> float:
        """Of training, without pauses."""
        return time.perf_counter() - self.start - self.idle

    @property
    def num_tokens(self) -> int:
        """Trained so far, each as often as it was."""
        return self.marks[-1][1]

    def add(self, num_tokens: int) -> None:
        """A step of so many tokens is done."""
        self.marks.append((self.seconds, self.marks[-1][1] + num_tokens))

    def rate(self) -> float:
        """Tokens per second."""
        (first, before), (last, after) = self.marks[-21 if len(self.marks) > 20 else 0], self.marks[-1]
        return (after - before) / max(last - first, 1e-9)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within, no time passes."""
        began = time.perf_counter()
        yield
        self.idle += time.perf_counter() - began
