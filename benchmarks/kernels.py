"""Where do the milliseconds of a step go? The kernels of steady steps on a GPU by kind, and the gaps between them.

    python -m benchmarks.kernels --shapes 0.5B,1.5B,7B --rows 8,64

A step of benchmarks.training's `compiled` contenders, traced by torch's profiler after the warm-up; one JSON line each.
A gap is time in which no kernel runs. Tracing itself adds gaps, and steps have more or fewer tokens, so the untraced
steps before stand beside them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler_util import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.contest import child, details, show
from benchmarks.meter import Meter, now

KINDS = {  # of kernels, by their names; the first that is found counts
    "attention": r"flash|fmha|attention",
    "optimizer": r"adam|multi_tensor|foreach",
    "products": r"gemm|nvjet|cutlass|cublas|splitk|gemv|xmma",
    "compiled": r"^triton_",
    "copies": r"memcpy|memset|copy|catarray|fill",
}
STEADY, TRACED = 40, 10  # steps: untraced ones behind the warm-up, then traced ones
Kernel = tuple[str, float, float]  # name, start and end in microseconds


class Tracing(Meter):
    """A meter that goes on with steps that are traced."""

    def __init__(self) -> None:
        super().__init__(0, cycle=STEADY)
        self.kernels: list[Kernel] = []
        self.traced = self.tokens_traced = 0
        self.seconds_traced = 0.0  # of all traced steps
        self.trace: Any = None

    def step(self, num_tokens: int) -> bool:
        """Count a step; True when the traced ones are over."""
        if self.trace is None:
            if super().step(num_tokens):
                self.trace = profile(activities=[ProfilerActivity.CUDA])
                self.trace.start()
                self.began_tracing = now()
            return False
        self.traced += 1
        self.tokens_traced += num_tokens
        if self.traced < TRACED:
            return False
        self.seconds_traced = now() - self.began_tracing
        self.trace.stop()
        events = (event for event in self.trace.events() if event.device_type == DeviceType.CUDA)
        self.kernels = [(event.name, event.time_range.start, event.time_range.end) for event in events]
        return True


def inside(shape: str, batch_rows: int) -> dict[str, Any]:
    """Steps of so many rows, in this process."""
    from benchmarks.formula import ROWS
    from benchmarks.ours import ours
    from benchmarks.rows import rows
    from benchmarks.shapes import vocab_size

    meter = Tracing()
    ours(shape, meter, rows(ROWS, vocab_size=vocab_size(shape)), method="lora", step="compiled", batch_rows=batch_rows)
    untraced = {"step_ms": 1000 / meter.result()["steps_per_second"], "step_tokens": meter.tokens / STEADY}
    traced = {"traced_ms": 1000 * meter.seconds_traced / TRACED, "traced_tokens": meter.tokens_traced / TRACED}
    return {**untraced, **traced, **kinds(meter.kernels)}


def kinds(kernels: Sequence[Kernel], *, steps: int = TRACED) -> dict[str, Any]:
    """Of a step: milliseconds and number of kernels by kind, the time in which none runs, what costs most."""
    spent, names = defaultdict[str, float](float), defaultdict[str, float](float)
    for name, start, end in kernels:
        spent[kind_of(name)] += end - start
        names[name[:80]] += end - start
    number = Counter(kind_of(name) for name, _, _ in kernels)
    first, last = min(start for _, start, _ in kernels), max(end for _, _, end in kernels)
    return {
        "ms": _falling(spent, steps),
        "kernels": {kind: count / steps for kind, count in number.most_common()},
        "gaps_ms": (last - first - busy((start, end) for _, start, end in kernels)) / steps / 1000,
        "most": dict(list(_falling(names, steps).items())[:12]),
    }


def _falling(microseconds: Mapping[str, float], steps: int) -> dict[str, float]:
    """Milliseconds of a step, the most first."""
    return {name: value / steps / 1000 for name, value in sorted(microseconds.items(), key=lambda x: -x[1])}


def kind_of(name: str) -> str:
    """Of KINDS, or `other`."""
    return next((kind for kind, words in KINDS.items() if re.search(words, name, re.IGNORECASE)), "other")


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans: kernels of several streams overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def main() -> None:
    """Trace every shape and number of rows, each in its own process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.5B")
    parser.add_argument("--rows", default="8,64", help="of a step")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.jsonl"))
    parser.add_argument("--inside", nargs=2, metavar=("SHAPE", "ROWS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("it traces kernels of a GPU, and there is none")
    if args.inside:
        print(json.dumps(inside(args.inside[0], int(args.inside[1]))))
        return
    about = details()
    for shape in args.shapes.split(","):
        for number in args.rows.split(","):
            line = {"what": "kernels", "shape": shape, "rows": int(number), **about}
            show(line | child(["benchmarks.kernels", "--inside", shape, number]), args.out)


if __name__ == "__main__":
    main()
