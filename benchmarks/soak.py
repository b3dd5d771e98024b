"""`python -m benchmarks.soak FOLDER [--cells N]`: a sweep whose jobs and whose own process are killed at random.

The same cells are run twice: undisturbed, and with SIGKILL at random moments, the command being started again until it
ends by itself. Then every cell must have the same losses and the same answers, and the sweep must not have grown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
WORDS = (
    "-m", "method=lora", "model=qwen", "optim.max_steps=5", "optim.batch_rows=4", "optim.validations=1",
    "task.train_rows=40", "task.valid_rows=6", "task.max_target_tokens=64", "evaluate.max_new_tokens=8",
    "evaluate.forgetting_text=null", "evaluate.rewording_rows=0", "wandb.mode=disabled",
)  # fmt: skip
SAME = ("step", "loss", "lr", "gradient_norm", "valid_loss")  # of a line of steps.jsonl; the others are clocks


def main() -> None:
    """Run both, compare, print a summary; exit status 1 where anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--every", type=float, default=8.0, help="seconds between two kills, on average")
    parser.add_argument("words", nargs="*", help="more overrides")
    args = parser.parse_args()
    words = [*WORDS, f"seed=range(1,{args.cells + 1})", *args.words]
    calm, wild = args.folder / "calm", args.folder / "wild"
    began = time.monotonic()
    calmly = undisturbed(calm, words)
    told(f"undisturbed: {calmly:.0f} s")
    kills = disturbed(wild, words, draw=random.Random(args.seed), every=args.every)
    seconds = time.monotonic() - began - calmly
    differing = compare(calm, wild, count=args.cells)
    grown = growth(kills["memory"])
    told(f"disturbed: {seconds:.0f} s, {kills['jobs']} jobs and {kills['sweeps']} sweeps killed")
    told(f"{args.cells - len(differing)} of {args.cells} cells equal; the sweep grew by {grown:.1f} MiB at the most")
    for line in differing[:20]:
        told(f"  {line}")
    sys.exit(1 if differing or grown > 32 else 0)


def undisturbed(folder: Path, words: list[str]) -> float:
    """The cells as they should be; the seconds that took."""
    began = time.monotonic()
    sweep = start(folder, words)
    if sweep.wait():
        sys.exit(f"the undisturbed sweep ended with status {sweep.returncode}, see {folder / 'sweep.log'}")
    return time.monotonic() - began


def disturbed(folder: Path, words: list[str], *, draw: random.Random, every: float) -> dict:
    """Start the command until all cells are done, killing a job or the sweep from time to time."""
    found: dict = {"jobs": 0, "sweeps": 0, "memory": []}
    for _ in range(1000):
        sweep, memory = start(folder, words), []
        found["memory"].append(memory)
        next_kill = time.monotonic() + draw.expovariate(1 / every)
        while sweep.poll() is None:
            time.sleep(0.2)
            with contextlib.suppress(psutil.Error):
                memory.append(psutil.Process(sweep.pid).memory_info().rss / 2**20)
                if time.monotonic() >= next_kill:
                    next_kill = time.monotonic() + draw.expovariate(1 / every)
                    kill_one(sweep, draw, found)
        if sweep.returncode == 0:
            return found
    sys.exit("the disturbed sweep did not come to an end")


def kill_one(sweep: subprocess.Popen, draw: random.Random, found: dict) -> None:
    """One of four kills hits the sweep, the others a job or a worker."""
    below = psutil.Process(sweep.pid).children(recursive=True)
    if not below or draw.random() < 0.25:
        sweep.kill()
        sweep.wait()
        gone = psutil.wait_procs(below, timeout=5)[1] == []
        if not gone:
            sys.exit("orphans: processes outlived the sweep by five seconds")
        found["sweeps"] += 1
    else:
        draw.choice(below).kill()
        found["jobs"] += 1


def start(folder: Path, words: list[str]) -> subprocess.Popen:
    """The command, in a folder of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    known = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "finetune", *words]
    with (folder / "sweep.log").open("ab") as log:
        return subprocess.Popen(line, cwd=folder, env=known, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def compare(calm: Path, wild: Path, *, count: int) -> list[str]:
    """What differs, a line for each cell."""
    lines = []
    cells = sorted(path.parent.relative_to(calm) for path in calm.rglob("scores.json"))
    if len(cells) != count:
        lines.append(f"{len(cells)} of {count} undisturbed cells have scores")
    for cell in cells:
        lines += [f"{cell}: {what} differ" for what in differences(calm / cell, wild / cell)]
    return lines


def differences(one: Path, other: Path) -> Iterator[str]:
    """Which results of two runs are not the same."""
    if not (other / "scores.json").exists():
        yield "scores"
        return
    if steps(one) != steps(other):
        yield "losses"
    if (one / "predictions.jsonl").read_bytes() != (other / "predictions.jsonl").read_bytes():
        yield "predictions"
    scores, others = (json.loads((run / "scores.json").read_text())["scores"] for run in (one, other))
    if scores != others:
        yield "scores"


def steps(run: Path) -> list[dict]:
    """The lines of steps.jsonl without what clocks say."""
    lines = map(json.loads, (run / "steps.jsonl").read_text().splitlines())
    return [{key: line.get(key) for key in SAME} for line in lines]


def growth(samples: list[list[float]]) -> float:
    """MiB by which one sweep's memory rose after its first seconds, the most of all sweeps."""
    settled = [memory[25:] for memory in samples if len(memory) > 50]
    return max((max(memory[-10:]) - min(memory[:10]) for memory in settled), default=0.0)


def told(line: str) -> None:
    """A line of the summary."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
