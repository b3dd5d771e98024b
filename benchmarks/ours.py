"""This project's own training loop, for as long as the meter says."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from benchmarks.meter import Meter, Over
from benchmarks.rows import Row, num_tokens
from benchmarks.shapes import base, quantized
from finetune.cells import CONF
from finetune.data.batches import plan
from finetune.feeder import Feeder
from finetune.loop import Loop
from finetune.methods.build import build

RANK = ("method.adapter.r=8", "method.adapter.lora_alpha=16")  # as every peer


def settings(*words: str, method: str) -> dict[str, Any]:
    """The composed configuration of a cell."""
    changes = RANK if method in ("lora", "qlora") else ()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        found: Any = OmegaConf.to_container(compose("config", [f"method={method}", *changes, *words]), resolve=True)
    return dict(found)


def ours(  # noqa: PLR0913
    shape: str, meter: Meter, examples: Sequence[Row], *, method: str, step: str, batch_rows: int, optim: str = "adamw"
) -> Any:
    """Steps of one way: eager, graph or compiled."""
    config = settings("model=qwen", f"optim={optim}", method=method)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    tuner = build(config["method"])
    with meter.phase("load"):
        network = base(shape, dtype=torch.bfloat16 if tuner.leaves_base_intact else torch.float32)
    if config["method"]["quantize"]:
        network = quantized(network)
    if torch.cuda.is_available():  # a base that is read from files is quantised layer by layer, not made whole first
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = tuner.attach(network, tokenizer=None, num_steps=1000, train_rows=())
    feeder = Feeder(packed=True, pad_id=0, loss_on="target", device=accelerator.device)
    steps = plan(len(examples), epochs=40, batch_rows=batch_rows, max_steps=meter.num_steps, seed=1)
    loop = Loop(tuner, accelerator, feeder, examples, steps, {**config["optim"], "validations": 0}, 1e-5, way=step)

    def record(line: dict[str, Any]) -> None:
        meter.first_loss = meter.first_loss or line["loss"]
        if meter.step(num_tokens([examples[row] for row in steps[line["step"] - 1]])):
            raise Over

    with contextlib.suppress(Over):
        loop.run(model, validate=lambda _: 0.0, record=record)
    return model
