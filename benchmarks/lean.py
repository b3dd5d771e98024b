"""Steps with PEFT's own LoRA layers and with lean ones: rates, first losses, and gradients against float32.

    python -m benchmarks.lean --shape 0.5B --ways eager,compiled --seconds 8

One process, both kinds one after the other on the same packs, of which there are few, so that compiling takes most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig

from benchmarks.training import LINEAR, SHAPES, Over, Row, base, rows
from finetune.data.batches import pack
from finetune.feeder import Feeder, summed_loss
from finetune.loop import Loop
from finetune.methods.method import trainable
from finetune.methods.peft import Peft
from finetune.models.attention import packing

OPTIM = {
    "optimizer": {"_target_": "torch.optim.AdamW", "weight_decay": 0.0},
    **{"schedule": "constant", "warmup": 0.0, "accumulation": 1, "max_grad_norm": 1.0, "loss_on": "target"},
    "validations": 0,
}
KINDS = ("peft", "lean")
NUM_BATCHES = 3  # different ones: each may be a bucket, and so a graph


@dataclass(frozen=True)
class Bench:
    """A base with LoRA of rank 8 on all linear layers, and its rows."""

    method: Peft
    model: Any
    accelerator: Accelerator
    examples: list[Row]
    batch_rows: int


def bench(shape: str, *, batch_rows: int) -> Bench:
    """Random weights; the factors' products are not 0."""
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    method = Peft(LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=LINEAR))
    model = method.attach(base(shape, dtype=torch.bfloat16), tokenizer=None, num_steps=1, train_rows=())
    for weight in trainable(model):
        torch.nn.init.normal_(weight, std=0.02)
    examples = rows(NUM_BATCHES * batch_rows, vocab_size=SHAPES[shape]["vocab_size"])
    return Bench(method, model, accelerator, examples, batch_rows)


@contextlib.contextmanager
def layers(found: Bench, kind: str) -> Iterator[None]:
    """Within, steps are of that kind."""
    if kind == "peft":
        found.method.training = lambda model: contextlib.nullcontext()  # type: ignore[method-assign]
    try:
        yield
    finally:
        vars(found.method).pop("training", None)


def steps(found: Bench, *, way: str, seconds: float) -> dict[str, float]:
    """First loss, seconds until the first step is done, steps per second (median after eight), memory."""
    step = found.batch_rows
    batches = [list(range(i * step, (i + 1) * step)) for i in range(NUM_BATCHES)]
    feeder = Feeder(packed=True, pad_id=0, loss_on="target", device=found.accelerator.device)
    start = {weight: weight.detach().clone() for weight in trainable(found.model)}
    loop = Loop(found.method, found.accelerator, feeder, found.examples, batches * 4000, OPTIM, 1e-5, way=way)
    losses: list[float] = []
    times = [time.perf_counter()]

    def record(line: dict[str, Any]) -> None:
        losses.append(line["loss"])  # which waited for the device
        times.append(time.perf_counter())
        if len(times) > 10 and times[-1] - times[9] > seconds:
            raise Over

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(Over):
        loop.run(found.model, validate=float, record=record)
    for weight, value in start.items():
        weight.data.copy_(value)
        weight.grad = None
    rates = [NUM_BATCHES / (b - a) for a, b in zip(times[9:], times[9 + NUM_BATCHES :], strict=False)]
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    first = {"first_loss": losses[0], "last_loss_of_ten": losses[9], "start_up_seconds": times[1] - times[0]}
    return {**first, "steps_per_second": statistics.median(rates), "peak_gib": peak}


def gradients(found: Bench, *, within: Callable[[], Any]) -> dict[str, torch.Tensor]:
    """Of the first batch's summed loss."""
    found.model.zero_grad()
    batch = pack(found.examples[: found.batch_rows], loss_on="target").to(found.accelerator.device)
    with found.method.lean(found.model), within(), packing(found.model.get_base_model()):
        summed_loss(found.model, batch).backward()
    return {n: p.grad.clone() for n, p in found.model.named_parameters() if p.grad is not None}


def errors(found: Bench) -> dict[str, float]:
    """Each kind's mean relative distance from the gradients in float32."""
    device = found.accelerator.device.type
    frozen = [p for p in found.model.parameters() if not p.requires_grad]
    for weight in frozen:
        weight.data = weight.data.float()
    with layers(found, "peft"):
        exact = gradients(found, within=contextlib.nullcontext)
    for weight in frozen:
        weight.data = weight.data.bfloat16()
    distances = {}
    for kind in KINDS:
        with layers(found, kind):
            rounded = gradients(found, within=lambda: torch.autocast(device, torch.bfloat16))
        distances[kind] = statistics.fmean(float((rounded[n] - g).norm() / g.norm()) for n, g in exact.items())
    found.model.zero_grad()
    return distances


def main() -> None:
    """One JSON line for each way and kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="0.5B")
    parser.add_argument("--ways", default="eager,compiled")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=8)
    args = parser.parse_args()
    found = bench(args.shape, batch_rows=args.rows)
    found.model.to(found.accelerator.device)
    print(json.dumps({"shape": args.shape, "relative_gradient_error": errors(found)}), flush=True)
    for way in args.ways.split(","):
        for kind in KINDS:
            torch.compiler.reset()
            with layers(found, kind):
                line = steps(found, way=way, seconds=args.seconds)
            print(json.dumps({"shape": args.shape, "way": way, "layers": kind, **line}), flush=True)


if __name__ == "__main__":
    main()
