"""`python -m benchmarks.soak FOLDER [--cells N]`: a sweep whose jobs and whose own process are killed at random.

The same cells are run twice: undisturbed, and with SIGKILL at random moments, the command being started again until it
ends by itself. Then every cell must have the same losses, answers, scores and weights, and the sweep must not have
grown. A line a minute says how far it is; all lines are also in FOLDER/soak.log. What an earlier soak of the folder
left is gone on with: its undisturbed cells need not be run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from finetune import claims

log = logging.getLogger("soak")
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
    parser.add_argument("--every", type=float, default=12.0, help="seconds between two kills, on average")
    parser.add_argument("words", nargs="*", help="more overrides")
    args = parser.parse_intermixed_args()
    words = [*WORDS, f"seed=range(1,{args.cells + 1})", *args.words]
    calm, wild = args.folder / "calm", args.folder / "wild"
    args.folder.mkdir(parents=True, exist_ok=True)
    outputs = logging.StreamHandler(sys.stdout), logging.FileHandler(args.folder / "soak.log")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=outputs)
    began = time.monotonic()
    memories = [undisturbed(calm, words)]
    calmly = time.monotonic() - began
    log.info("undisturbed: %.0f s", calmly)
    kills = disturbed(wild, words, draw=random.Random(args.seed), every=args.every, memories=memories)
    seconds = time.monotonic() - began - calmly
    differing = compare(calm, wild, count=args.cells)
    grown = growth(memories)
    log.info("disturbed: %.0f s, %d jobs or workers and %d sweeps killed", seconds, kills["jobs"], kills["sweeps"])
    num_equal = args.cells - len({line.partition(":")[0] for line in differing})
    log.info("%d of %d cells equal; the sweep grew by %.1f MiB at the most", num_equal, args.cells, grown)
    for line in differing[:20]:
        log.info("  %s", line)
    sys.exit(1 if differing or grown > 32 else 0)


def undisturbed(folder: Path, words: list[str]) -> list[float]:
    """The cells as they should be; the memory that took."""
    sweep = start(folder, words)
    memory = list(watched(sweep, folder))
    if sweep.returncode:
        sys.exit(f"the undisturbed sweep ended with status {sweep.returncode}, see {folder / 'sweep.log'}")
    return memory


def disturbed(
    folder: Path, words: list[str], *, draw: random.Random, every: float, memories: list[list[float]]
) -> dict[str, int]:
    """Start the command until all cells are done, killing a job or the sweep now and then; how many were killed."""
    found = {"jobs": 0, "sweeps": 0}
    for _ in range(1000):
        sweep = start(folder, words)
        next_kill = time.monotonic() + draw.expovariate(1 / every)
        memories.append([])
        for sample in watched(sweep, folder):
            memories[-1].append(sample)
            if time.monotonic() >= next_kill:
                next_kill = time.monotonic() + draw.expovariate(1 / every)
                with contextlib.suppress(psutil.Error):
                    kill_one(sweep, draw, found)
        if sweep.returncode == 0:
            return found
    sys.exit("the disturbed sweep did not come to an end")


def watched(sweep: subprocess.Popen[bytes], folder: Path) -> Iterator[float]:
    """The memory of the sweep in MiB, five times a second until it ends; a line a minute of how far it is."""
    next_line = time.monotonic() + 60
    while sweep.poll() is None:
        time.sleep(0.2)
        with contextlib.suppress(psutil.Error):
            yield psutil.Process(sweep.pid).memory_info().rss / 2**20
        if time.monotonic() >= next_line:
            next_line += 60
            log.info("%s: %d cells done", folder.name, sum(1 for _ in folder.rglob("scores.json")))


def kill_one(sweep: subprocess.Popen[bytes], draw: random.Random, found: dict[str, int]) -> None:
    """One of four kills hits the sweep, the others a job or a worker."""
    below = psutil.Process(sweep.pid).children(recursive=True)
    if not below or draw.random() < 0.25:
        sweep.kill()
        sweep.wait()
        left = psutil.wait_procs(below, timeout=5)[1]  # also those that have ended and wait for init to notice it
        if any(claims.process_start(process.pid) is not None for process in left):
            sys.exit("orphans: processes outlived the sweep by five seconds")
        found["sweeps"] += 1
    else:
        draw.choice(below).kill()
        found["jobs"] += 1


def start(folder: Path, words: list[str]) -> subprocess.Popen[bytes]:
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
    if weights(one) != weights(other):
        yield "weights"


def weights(run: Path) -> list[bytes]:
    """The files of the trained weights."""
    return [file.read_bytes() for file in sorted((run / "adapter").glob("*.safetensors"))]


def steps(run: Path) -> list[dict[str, Any]]:
    """The lines of steps.jsonl without what clocks say."""
    lines = map(json.loads, (run / "steps.jsonl").read_text().splitlines())
    return [{key: line.get(key) for key in SAME} for line in lines]


def growth(samples: list[list[float]]) -> float:
    """MiB by which one sweep's memory rose after its first quarter, in which it composes the cells; the most of all."""
    settled = [memory[len(memory) // 4 :] for memory in samples if len(memory) > 50]
    return max((max(memory[-10:]) - min(memory[:10]) for memory in settled), default=0.0)


if __name__ == "__main__":
    main()
