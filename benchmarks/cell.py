"""How long does a whole cell take, and a grid? Short real ones of this project and its peers; see benchmarks.formula.

    python -m benchmarks.cell --shape 0.5B --who worker,process,trl,trl-tuned,trainer,peft --out FILE.jsonl

`process` and `worker` are this project's command, `python -m finetune -m method=...`, with that `launch`; peers load
the same weights from the same folder, train LoRA, answer by `generate` and score. --check trains exactly so many rows
for three epochs instead: what the formula says can then be compared with it. --step is this project's launch.step, and
the end of its name in the lines: process-graph.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contest import child, details, show
from benchmarks.formula import EPOCHS, ROWS
from benchmarks.meter import WARM_UP

OURS = ("process", "worker")
GRID = "lora,qlora,prefix,prompt,ptuning"


def main() -> None:
    """Run contenders, each a command of its own; one JSON line each."""
    args = _arguments()
    if args.inside:
        print(json.dumps(peer(args)))
        return
    child(["benchmarks.cell", "--shape", args.shape, "--inside", "store"])  # writing the weights is nobody's time
    about = details()
    for who in args.who.split(","):
        name, found = (f"{who}-{args.step}", ours(args, who)) if who in OURS else (who, _child(args, who))
        line = {"what": "check" if args.check else "cell", "shape": args.shape, "who": name, **about}
        show(line | {"rows": args.check} | found, args.out)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="0.5B")
    parser.add_argument("--who", default="worker,process,trl,trl-tuned,trainer,peft")
    parser.add_argument("--methods", default="lora", help=f"of this project; a grid: {GRID}")
    parser.add_argument("--step", default="graph", help="launch.step of this project; auto's for one whole cell")
    parser.add_argument("--steps", type=int, default=250, help="of this project")
    parser.add_argument("--seconds", type=float, default=10, help="of a peer's steady steps")
    parser.add_argument("--answers", type=int, default=500, help="rows that this project answers")
    parser.add_argument("--peer-answers", type=int, default=128, help="rows that a peer answers")
    parser.add_argument("--check", type=int, default=0, help="training rows of a real cell")
    parser.add_argument("--out", type=Path, default=Path("benchmarks.jsonl"))
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(args: argparse.Namespace, who: str) -> dict[str, Any]:
    names = ("shape", "seconds", "peer_answers", "check")
    words = [word for name in names for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    return child(["benchmarks.cell", "--inside", who, *words])


def peer(args: argparse.Namespace) -> dict[str, Any]:
    """One peer's cell, in this process."""
    began = time.perf_counter()
    from benchmarks import answers as answering
    from benchmarks.meter import Meter
    from benchmarks.peers import cycle
    from benchmarks.rows import rows
    from benchmarks.shapes import stored, vocab_size
    from benchmarks.training import contenders

    if args.inside == "store":
        return {"folder": str(stored(args.shape))}
    size, imported = vocab_size(args.shape), time.perf_counter() - began
    steps = math.ceil(args.check * EPOCHS / (4 if args.inside.startswith("peft") else 8)) or None
    meter = Meter(args.seconds, cycle=cycle(args.inside), num_steps=steps)
    examples = rows(args.check or ROWS, vocab_size=size)
    model = contenders()[args.inside](args.shape, meter, examples, folder=True)
    asked = rows(args.peer_answers, vocab_size=size, seed=1, announced=True)
    half = len(asked) // 2  # the steady seconds of an answer are those of the second half
    with meter.phase("evaluate"):
        said = answering.answers(model, asked[:half])
    with meter.phase("steady"):
        said += answering.answers(model, asked[half:])
    with meter.phase("score"):
        answering.score(said[:half], asked[:half])
    with meter.phase("steady"):
        answering.score(said[half:], asked[half:])
    found = meter.result() | {"answers": len(asked), "as_given": answering.as_given(said, asked)}
    phases = {f"{name}_seconds": value for name, value in meter.phases.items()}
    found |= {**phases, "import_seconds": imported, "train_seconds": meter.took}
    return {"cells": {"lora": found | {"seconds_an_answer": meter.phases["steady"] / (len(asked) - half)}}}


def ours(args: argparse.Namespace, launch: str) -> dict[str, Any]:
    """This project's command in an empty folder, and what its runs recorded."""
    from benchmarks.rows import rows, write
    from benchmarks.shapes import stored, vocab_size

    size = vocab_size(args.shape)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train = write(folder / "train.jsonl", rows(args.check or ROWS, vocab_size=size))
        valid = write(folder / "valid.jsonl", rows(args.answers, vocab_size=size, seed=1, announced=True))
        length = f"optim.epochs={EPOCHS}" if args.check else f"optim.max_steps={args.steps}"
        words = [
            "-m", f"method={args.methods}", "model=qwen", f"model.path={stored(args.shape)}", "scale=small",
            "task=jsonl", f"task.source.path={train}", f"task.source.valid_path={valid}",
            "task.max_prompt_tokens=1077", "task.max_target_tokens=160", "optim.batch_rows=8", length,
            "optim.lr=1e-7", f"launch={launch}", "launch.jobs=1", f"launch.step={args.step}", "wandb.mode=disabled",
        ]  # fmt: skip
        found = child(["finetune", *words], folder=folder)
        runs = sorted(folder.glob("multirun/*/*/*/*/seed*"))
        if "failed" in found:
            found["failed"] += "".join(f"\n{run.parent.name}: {_last(run)}" for run in runs)
        return {**found, "cells": {run.parent.name.partition("+")[0]: read(run) for run in runs if _done(run)}}


def read(run: Path) -> dict[str, Any]:
    """What a line needs of a run: the steady rate after the warm-up, answers, seconds, memory."""
    cost = json.loads((run / "scores.json").read_text())["cost"]
    steps = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
    said = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    start, end = steps[WARM_UP - 1], steps[-1]
    took = end["seconds"] - start["seconds"]
    return {
        "tokens_per_second": (end["num_tokens"] - start["num_tokens"]) / took,
        "steps_per_second": (len(steps) - WARM_UP) / took,
        "num_steps": len(steps),
        "num_tokens": end["num_tokens"],
        "start_up_seconds": start["seconds"],
        "first_loss": steps[0]["loss"],
        "peak_gib": cost["peak_memory_gib"],
        "way": cost["way"],
        "answers": len(said),
        "answer_seconds": cost["predict_seconds"],
        "seconds_an_answer": cost["predict_seconds"] / len(said),
        "as_given": sum(_num_words(line["prediction"]) == _num_words(line["reference"]) for line in said) / len(said),
        "check_seconds": cost["check_seconds"],
        "job_seconds": cost["total_seconds"],
    }


def _num_words(answer: str) -> int:
    return len(answer.split())


def _done(run: Path) -> bool:
    return (run / "scores.json").exists()


def _last(run: Path) -> str:
    """The end of a run's log."""
    file = run / "run.log"
    return file.read_text()[-600:] if file.exists() else "no log"


if __name__ == "__main__":
    main()
