"""One run, loaded from its folder: data, method, base and batches, before anything is trained."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from finetune import runs
from finetune.config import refuse
from finetune.data import rows
from finetune.environment import environment, only_deterministic, pick_device, usable_precision, without_plans
from finetune.feeder import Feeder, mean_loss
from finetune.methods.build import build
from finetune.methods.method import Method
from finetune.models.attention import packs
from finetune.models.encoded import encoded_rows
from finetune.models.load import Base
from finetune.models.tokenizer import Example, encode_rows, template_hash
from finetune.probe import Subject
from finetune.shelf import Shelf

log = logging.getLogger("finetune")

# Of environment.json: what a run that is gone on with must not decide again.
KEPT = ("batch_tokens", "checkpoint_activations")


@dataclass(frozen=True)
class Job:
    """One run, loaded: what every part of it needs."""

    run: Path
    config: Mapping[str, Any]
    accelerator: Accelerator
    method: Method
    bases: Shelf
    base: Base
    split: rows.Split  # only the rows that the method can answer validate
    asked: Sequence[rows.Row]  # the validation rows as the method asks them
    unanswerable: Mapping[str, str]  # task -> why the method cannot answer it
    train_rows: Sequence[Example]
    valid_rows: Sequence[Example]
    feeder: Feeder

    @property
    def main(self) -> bool:
        """Is this the process that writes?"""
        return self.accelerator.is_main_process

    def encode(self, part: Sequence[rows.Row]) -> list[Example]:
        """Rows as token ids, within the task's limits."""
        return encoded_rows(part, self.base.tokenizer, **_limits(self.config))

    def valid_loss(self, model: Any) -> float:
        """Mean cross-entropy in nats per supervised token of the validation rows."""
        return mean_loss(model, self.valid_rows, feeder=self.feeder, accelerator=self.accelerator)


def load_job(run: Path, config: Mapping[str, Any], bases: Shelf) -> Job:
    """Data, base and method, and environment.json that records them."""
    refuse(config)
    if config["deterministic"]:
        only_deterministic()
    without_plans()
    accelerator, precision = _accelerator(config)
    split = rows.load(config["task"])
    for place in split.bad[:20]:
        log.warning("left out %s", place)
    method = build(config["method"])
    base = _base(config, accelerator.device, bases, intact=method.leaves_base_intact)
    feeder = Feeder(
        packed=method.padding_free and "packing" in config["model"]["has"] and packs(accelerator.device),
        pad_id=base.tokenizer.pad_token_id,
        loss_on=config["optim"]["loss_on"],
        device=accelerator.device,
    )
    unanswerable = method.unanswerable(split.train)
    kept = replace(split, valid=tuple(row for row in split.valid if row.task not in unanswerable))
    asked = asked_of(kept.valid, split.train, method=method, base=base, config=config)
    train_rows, valid_rows = (encoded_rows(part, base.tokenizer, **_limits(config)) for part in (split.train, asked))
    if accelerator.is_main_process:
        cut = {f"{name}s_cut": sum(getattr(e, f"{name}_cut") for e in train_rows) for name in ("prompt", "target")}
        cut |= {"beyond_positions": beyond_positions(base, [*train_rows, *valid_rows])}
        forms = split.templates_hash + template_hash(base.tokenizer)
        hashes = {"data": split.data_hash, "templates": forms, "weights": base.weights_hash}
        before = runs.read_environment(run)  # of an earlier process
        what = {"data": _data(config), "templates": "", "weights": base.source}
        _refuse_other_inputs(run, hashes, known=before["hashes"], what=what)
        record = {
            "source": base.source,
            "precision": precision,
            "padding_free": feeder.packed,
            "notes": split.notes | cut | method.notes(),
            **{key: before[key] for key in KEPT if key in before},
        }
        runs.write_json(run / "environment.json", environment(**hashes) | record)
    return Job(run, config, accelerator, method, bases, base, kept, asked, unanswerable, train_rows, valid_rows, feeder)


def beyond_positions(base: Base, examples: Sequence[Example]) -> int:
    """How many rows are longer than the positions that the base knows, stretched ones included."""
    known = getattr(base.model.config, "max_position_embeddings", None)
    return sum(len(example.ids) > known for example in examples) if known else 0


def _refuse_other_inputs(
    run: Path, hashes: Mapping[str, str], *, known: Mapping[str, Any], what: Mapping[str, str]
) -> None:
    """Raise ValueError if an earlier process of this run read other data, prompt forms or weights."""
    changed = [
        f"the {name} {f'({what[name]}) ' if what[name] else ''}changed ({str(known[name])[:12]} -> {now[:12]})"
        for name, now in hashes.items()
        if str(known.get(name, now)) != now
    ]
    if changed:
        raise ValueError(
            f"{'; '.join(changed)} since this run began: put back what it began with, or remove {run} to begin anew"
        )


def _data(config: Mapping[str, Any]) -> str:
    """Where the rows come from."""
    source = config["task"]["source"]
    return str(source.get("path") or source["_target_"])


def asked_of(
    part: Sequence[rows.Row],
    train_rows: Sequence[rows.Row],
    *,
    method: Method,
    base: Base,
    config: Mapping[str, Any],
) -> Sequence[rows.Row]:
    """The rows as the method asks them, no prompt longer than the task's limit."""
    return method.rows(part, train_rows, fits=lambda row: not _encode([row], base, config)[0].prompt_cut)


def _encode(part: Sequence[rows.Row], base: Base, config: Mapping[str, Any]) -> list[Example]:
    return encode_rows(part, base.tokenizer, **_limits(config))


def _limits(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: config["task"][key] for key in ("max_prompt_tokens", "max_target_tokens")}


def _accelerator(config: Mapping[str, Any]) -> tuple[Accelerator, str]:
    """The Accelerate side of the run, compared with what was asked; and the precision it computes in."""
    device = pick_device(config["launch"]["device"])
    precision, why = usable_precision(config["model"]["precision"], device)
    if why:
        log.warning("model.precision=%s: %s", config["model"]["precision"], why)
    mixed = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[precision]
    accelerator = Accelerator(mixed_precision=mixed, cpu=device.type == "cpu")
    asked, got = config["launch"]["num_processes"], accelerator.num_processes
    if asked != got:
        raise ValueError(f"launch.num_processes={asked}, but {got} were started")
    return accelerator, precision


def reloaded(job: Job) -> Subject:
    """The saved model on a fresh base."""
    fresh = _base(job.config, job.accelerator.device, job.bases, intact=job.method.leaves_base_intact)
    method = build(job.config["method"])
    model = method.load(fresh.model, job.run / "adapter")
    return Subject(method, model.to(job.accelerator.device), fresh.model)


def _base(config: Mapping[str, Any], device: torch.device, bases: Shelf, *, intact: bool) -> Base:
    """A base as no method has touched it; in float32 if the run does not leave its weights `intact`."""
    precision = usable_precision(config["model"]["precision"], device)[0] if intact else "float32"
    model = {**config["model"], "precision": precision}
    tokens = config["task"]["max_prompt_tokens"] + config["task"]["max_target_tokens"]
    quantize = config["method"]["quantize"]
    how = {"scale": config["scale"], "quantize": quantize, "device": str(device), "max_tokens": tokens, "log": log.info}
    base = bases.load(model, intact=intact, **how)
    log.info("base %s from %s", config["model"]["name"], base.source)
    return base
