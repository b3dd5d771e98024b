"""How fast does a step run? This project and its peers, side by side on one GPU, random weights of true shapes.

    python -m benchmarks.training --shapes 0.5B,1.5B,7B --who compiled,trl,trl-tuned,peft,trainer --seconds 30

Every contender is a process of its own; all get the same rows and LoRA of rank 8 on all linear layers. A rate counts
real tokens between two moments at which the device is idle, after the warm-up. The first loss is that of the base: it
must be equal. One JSON line a contender is printed and added to --out; `python -m benchmarks.tables` makes a table.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contest import child, details, show
from benchmarks.formula import ROWS

METHODS = ("qlora", "adalora", "prefix", "prompt", "ptuning", "ptuning_v2", "full", "adapter", "dora")
WAYS = ("compiled", "graph", "eager")
OPTIMIZERS = ("adamw", "adamw_8bit", "paged_adamw_8bit")


def contenders() -> dict[str, Callable[..., Any]]:
    """By name; called with a shape, a meter and rows, each returns the trained model."""
    from benchmarks.ours import ours
    from benchmarks.peers import comparison_loop, trainer, trl

    found: dict[str, Callable[..., Any]] = {
        "trl": functools.partial(trl, tuned=False, batch_rows=8),
        "trl-tuned": functools.partial(trl, tuned=True, batch_rows=8),
        **{f"trl-tuned-{number}": functools.partial(trl, tuned=True, batch_rows=number) for number in (16, 32, 64)},
        "trainer": functools.partial(trainer, batch_rows=8, cpu=False),
        "peft": functools.partial(comparison_loop, batch_rows=4),
    }
    found = {who: functools.partial(peer, folder=False) for who, peer in found.items()}
    found |= {f"{who}-no-cudnn": functools.partial(_without_plans, peer) for who, peer in found.items()}
    for way in WAYS:
        found[way] = functools.partial(ours, method="lora", step=way, batch_rows=8)
        found |= {f"{m}-{way}": functools.partial(ours, method=m, step=way, batch_rows=8) for m in METHODS}
    for number in (4, 16, 32, 64, 128):
        for way in ("compiled", "graph"):
            found[f"{way}-{number}"] = functools.partial(ours, method="lora", step=way, batch_rows=number)
    for method, who in (("lora", "eager-1"), ("qlora", "qlora-eager-1")):  # where weights, not activations, fill memory
        found[who] = functools.partial(ours, method=method, step="eager", batch_rows=1)
    for name in OPTIMIZERS:  # their states are those of full tuning
        found[f"full-{name}"] = functools.partial(ours, method="full", step="eager", batch_rows=8, optim=name)
    return found


def _without_plans(peer: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A peer without the attention of cuDNN, which plans each new length of a batch."""
    from finetune.environment import without_plans

    without_plans()
    return peer(*args, **options)


def inside(shape: str, who: str, seconds: float, times: float) -> dict[str, Any]:
    """One contender, in this process."""
    from benchmarks.meter import Meter
    from benchmarks.peers import cycle
    from benchmarks.rows import rows
    from benchmarks.shapes import vocab_size

    meter = Meter(seconds, cycle=cycle(who))
    contenders()[who](shape, meter, rows(ROWS, vocab_size=vocab_size(shape), times=times))
    return meter.result()


def main() -> None:
    """Run contenders, each in its own process; one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="0.5B")
    parser.add_argument("--who", default="compiled,trl,trl-tuned,peft,trainer,eager")
    parser.add_argument("--seconds", type=float, default=30, help="of steady steps")
    parser.add_argument("--times", type=float, default=1, help="rows so many times as long")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.jsonl"))
    parser.add_argument("--inside", nargs=2, metavar=("SHAPE", "WHO"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        shape, who = args.inside
        print(json.dumps(inside(shape, who, args.seconds, args.times)))
        return
    about = details()
    for shape in args.shapes.split(","):
        for who in args.who.split(","):
            line = {"what": "training", "shape": shape, "who": who, "times": args.times, **about}
            words = ["benchmarks.training", "--inside", shape, who, "--seconds", str(args.seconds)]
            words += ["--times", str(args.times)]
            show(line | child(words), args.out)


if __name__ == "__main__":
    main()
