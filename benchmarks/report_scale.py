"""How long the report of many runs takes, and how much memory; and how long scoring many predictions again does.

    python -m benchmarks.report_scale FOLDER        # of an empty folder; 1 GB is written into it

Answers are drawn from a pool of random Chinese sentences of about 60 characters, with scores drawn to match: what is
measured is reading, comparing and writing. Scoring again is measured on other runs, with the real scorer.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import yaml

from finetune import runs
from finetune.report import main as report

BASES, METHODS, SEEDS, ROWS = 5, 30, 2, 2000  # 300 runs
SCORED_RUNS = 50  # of 2000 predictions: 100 000
SYLLABLES = "患者发热咳嗽三天体温正常血压偏高建议口服药物复查心电图胸片头痛腹泻恶心既往史无过敏诊断肺炎高血压糖尿病"
SCORES = [f"rouge-{kind}{end}" for kind in "12l" for end in ("", "-multiset", "-char", "-char-multiset")]


def main() -> int:
    """Make the runs, measure, print one Markdown table."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        print(f"{folder} is not empty", file=sys.stderr)
        return 2
    names = [
        (f"base{b}", f"method{m:02}", s) for b in range(BASES) for m in range(METHODS) for s in range(1, SEEDS + 1)
    ]
    write_study(folder / "report", names)
    write_study(folder / "scored", names[:SCORED_RUNS])
    measure(f"report of {len(names)} runs x {ROWS} predictions", [str(folder / "report")])
    measure(f"--rescore of {SCORED_RUNS * ROWS} predictions", [str(folder / "scored"), "--rescore"])
    return 0


def write_study(root: Path, names: list[tuple[str, str, int]]) -> None:
    """Done runs with predictions, under `root`/main."""
    dice = random.Random(0)
    pool = ["".join(dice.choices(SYLLABLES, k=dice.randint(45, 75))) for _ in range(500)]
    for base, method, seed in names:
        run = root / "main" / "clinic" / base / method / f"seed{seed}"
        run.mkdir(parents=True)
        config = {"study": "main", "seed": seed, "task": {"name": "clinic"}, "model": {"name": base}}
        runs.write_text(run / "config.yaml", yaml.safe_dump({**config, "method": {"name": method}}))
        runs.write_json(run / "environment.json", {"hashes": {"data": "d", "templates": "t", "weights": base}})
        runs.write_text(run / "predictions.jsonl", "".join(lines(pool, seed=f"{base}{method}{seed}")))
        curve = [{"step": n, "loss": 3 / n, "valid_loss": 3 / n} for n in range(1, 400)]
        runs.append_lines(run / "steps.jsonl", curve)
        scores = dict.fromkeys(SCORES, dice.uniform(20, 90)) | {"num_rows": ROWS}
        cost = {"trainable_parameters": dice.randrange(10**6), "train_seconds": 60.0, "peak_memory_gib": 2.0}
        runs.write_json(
            run / "scores.json", {"scores": {"mean": scores, "tasks": {"A": scores, "B": scores}}, "cost": cost}
        )


def lines(pool: list[str], *, seed: str) -> Iterator[str]:
    """Lines of predictions.jsonl; a run of a method is right as often as its own rate says."""
    dice = random.Random(seed)
    rate = dice.random()
    for number in range(ROWS):
        reference = pool[number % len(pool)]
        is_right = dice.random() < rate
        scores = dict.fromkeys(SCORES, 100.0 if is_right else dice.uniform(0, 60)) | {"overlap": [9] * 30}
        row = {
            "id": str(number),
            "task": "AB"[number % 2],
            "kind": "response_generation",
            "prompt": f"{number}：{pool[-1 - number % len(pool)]}",
            "template": 0,
            "choices": None,
            "reference": reference,
            "prediction": reference if is_right else dice.choice(pool),
            "finish_reason": "stop",
            "scores": scores,
        }
        yield json.dumps(row, ensure_ascii=False) + "\n"


def measure(what: str, arguments: list[str]) -> None:
    """One line of the table: seconds, and the memory of this process and of its largest child once for every core."""
    began = time.perf_counter()
    status = report(arguments)
    seconds = time.perf_counter() - began
    assert status == 0
    cores = len(os.sched_getaffinity(0))
    own, child = (resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    page = Path(arguments[0]) / "main" / "report.html"
    size = page.stat().st_size / 1e6
    print(f"| {what} | {cores} | {seconds:.1f} | {own:.2f} + {cores} x {child:.2f} | {size:.1f} |", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
