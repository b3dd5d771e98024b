"""The demo cell on a CPU beside a padded float32 loop: the same miniature, rows, LoRA, batches and number of steps.

    python -m benchmarks.demo_cell --rounds 5 --steps 40

The peer is transformers' Trainer with its padding collator, then `generate` in batches of 8. Rounds alternate, each a
training of so many steps from a fresh LoRA; a rate is of real tokens, after the warm-up. One thread unless told.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from accelerate import Accelerator

from benchmarks.contest import details, show
from benchmarks.meter import WARM_UP, Meter
from benchmarks.ours import settings
from benchmarks.peers import Watch, counted, plain_trainer
from benchmarks.rows import num_tokens
from finetune.data import rows
from finetune.data.batches import plan
from finetune.evaluate import Decoding, answer_limit, predict
from finetune.feeder import Feeder
from finetune.loop import Loop
from finetune.methods.build import build
from finetune.models.load import Base, load
from finetune.models.tokenizer import Example, encode_rows


def main() -> None:
    """Alternate; print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40, help="of a round")
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks.jsonl"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    config = settings("model=qwen", "task=clinic", method="lora")
    limits = {key: config["task"][key] for key in ("max_prompt_tokens", "max_target_tokens")}
    found = rows.load(config["task"])
    base = fresh(config)
    train, valid = (encode_rows(part, base.tokenizer, **limits) for part in (found.train, found.valid[: args.answers]))
    rates: dict[str, list[dict[str, float]]] = {"ours": [], "trainer": []}
    for _ in range(args.rounds):
        for who, contender in (("ours", ours), ("trainer", trainer)):
            rates[who].append(contender(config, train, valid, num_steps=args.steps))
    line = {"what": "demo cell", "threads": args.threads, "steps": args.steps, "rounds": args.rounds, **details()}
    ways = ("tokens_per_second", "answers_per_second")
    medians = {f"{who} {way}": median(x[way] for x in rates[who]) for who in rates for way in ways}
    ratios = {f"ratio {way}": median(a[way] / b[way] for a, b in zip(*rates.values(), strict=True)) for way in ways}
    losses = {f"{who} first_loss": rates[who][0]["first_loss"] for who in rates}
    whole = {who: _cell_seconds(config, train, found.valid, rates[who]) for who in rates}
    cell = {f"{who} cell_seconds": value for who, value in whole.items()}
    show(line | medians | ratios | losses | cell | {"ratio cell": whole["trainer"] / whole["ours"]}, args.out)


def _cell_seconds(config: Any, train: Any, valid: Any, found: list[dict[str, float]]) -> float:
    """Training and answering of the whole demo cell at the median rates."""
    tokens = num_tokens(train) * config["optim"]["epochs"]
    rate, answers = (median(x[way] for x in found) for way in ("tokens_per_second", "answers_per_second"))
    return float(tokens / rate + len(valid) / answers)


def fresh(config: Any) -> Base:
    """The miniature, untouched."""
    limits = config["task"]["max_prompt_tokens"] + config["task"]["max_target_tokens"]
    return load(config["model"], scale="tiny", quantize=None, device="cpu", max_tokens=limits, log=lambda _: None)


def ours(config: Any, train: list[Example], valid: list[Example], *, num_steps: int) -> dict[str, float]:
    """This project's loop and answers."""
    base, tuner = fresh(config), build(config["method"])
    torch.manual_seed(1)
    model = tuner.attach(base.model, tokenizer=base.tokenizer, num_steps=num_steps, train_rows=())
    accelerator = Accelerator(cpu=True)
    feeder = Feeder(packed=True, pad_id=base.tokenizer.pad_token_id, loss_on="target", device=accelerator.device)
    steps = plan(len(train), epochs=1, batch_rows=8, max_steps=num_steps, seed=1)
    meter = Meter(0, num_steps=num_steps)

    def record(line: dict[str, Any]) -> None:
        meter.first_loss = meter.first_loss or line["loss"]
        meter.step(num_tokens([train[row] for row in steps[line["step"] - 1]]))

    optim = {**config["optim"], "validations": 0}
    Loop(tuner, accelerator, feeder, train, steps, optim, 1e-4).run(model, validate=lambda _: 0.0, record=record)
    prompts = [row.ids[: row.num_prompt] for row in valid]
    pad_id = base.tokenizer.pad_token_id
    how = Decoding(answer_limit(train), config["evaluate"]["batch_rows"], base.end_ids, pad_id, in_places=True)
    began = time.perf_counter()
    said = [answer for batch in predict(model, prompts, how) for answer in batch]
    return _result(meter, answers=len(said) / (time.perf_counter() - began))


def trainer(config: Any, train: list[Example], valid: list[Example], *, num_steps: int) -> dict[str, float]:
    """transformers' Trainer, padded, float32; then `generate`."""
    base, tuner = fresh(config), build(config["method"])
    torch.manual_seed(1)
    model = tuner.attach(base.model, tokenizer=base.tokenizer, num_steps=num_steps, train_rows=())
    meter = Meter(0, num_steps=num_steps)
    with tempfile.TemporaryDirectory() as place:
        args = transformers.TrainingArguments(
            output_dir=place, per_device_train_batch_size=8, max_steps=num_steps, learning_rate=1e-4, use_cpu=True,
            report_to=[], save_strategy="no", logging_first_step=True, disable_tqdm=True, dataloader_pin_memory=False,
        )  # fmt: skip
        loop = plain_trainer(model, args, train, base.tokenizer)
        loop.remove_callback(transformers.PrinterCallback)
        loop.add_callback(Watch(meter, counted(loop)))
        loop.train()
    began = time.perf_counter()
    model.eval()
    prompts = [row.ids[: row.num_prompt] for row in valid]
    how = Decoding(answer_limit(train), 8, base.end_ids, base.tokenizer.pad_token_id)
    for first in range(0, len(prompts), 8):  # in the order of the rows; `predict` would sort them
        list(predict(model, prompts[first : first + 8], how))
    return _result(meter, answers=len(prompts) / (time.perf_counter() - began))


def _result(meter: Meter, *, answers: float) -> dict[str, float]:
    assert meter.steps > WARM_UP
    return {**meter.result(), "answers_per_second": answers}


if __name__ == "__main__":
    main()
