"""`python -m finetune.train FOLDER`: one run, from its config.yaml to its scores.json.

An Accelerate program; several processes are started by torch.distributed.run. It reads nothing but the folder (and
the data and weights that the configuration names) and fills it.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from finetune import config as settings
from finetune import evaluate, runs
from finetune.data import rows
from finetune.data.batches import plan
from finetune.environment import environment, peak_memory_gib, pick_device, usable_precision
from finetune.loop import Feeder, Loop, mean_loss
from finetune.methods.build import build
from finetune.methods.method import Method
from finetune.models.attention import packs
from finetune.models.load import Base, load
from finetune.models.tokenizer import Example, encode_rows, template_hash
from finetune.scores import aggregate, score_rows
from finetune.track import Tracker

log = logging.getLogger("finetune")


@dataclass(frozen=True)
class Job:
    """One run, loaded: what every part of it needs."""

    run: Path
    config: Mapping[str, Any]
    accelerator: Accelerator
    method: Method
    base: Base
    split: rows.Split
    train_rows: Sequence[Example]
    valid_rows: Sequence[Example]
    feeder: Feeder

    @property
    def main(self) -> bool:
        """Is this the process that writes?"""
        return self.accelerator.is_main_process

    def valid_loss(self, model: Any) -> float:
        """Mean cross-entropy in nats per supervised token of the validation rows."""
        return mean_loss(model, self.valid_rows, feeder=self.feeder, accelerator=self.accelerator)


def train(run: Path) -> None:
    """Load, tune, predict, score; scores.json comes last."""
    began = time.perf_counter()
    config = runs.read_config(run)
    job = _load(run, config)
    steps = _plan(job)
    log.info("%d training rows, %d to validate, %d steps", len(job.train_rows), len(job.valid_rows), len(steps))
    tracker = Tracker(run, config if job.main else None)
    model, counts = _attach(job, num_steps=len(steps))
    model, history = _tune(job, model, steps, tracker)
    if job.main:
        job.method.save(model, run / "adapter")
    started = time.perf_counter()
    answers = _answers(job, model)
    if job.main:
        predictions = _predictions(job, answers)
        now = time.perf_counter()
        seconds = {"predict_seconds": now - started, "total_seconds": now - began}
        losses = _losses(history) or {"valid": job.valid_loss(model)}
        result = _result(job, predictions, history, cost=counts | seconds) | {"loss": losses}
        tracker.finish(result, predictions)
        runs.write_json(run / "scores.json", result)
        log.info("done in %.1f s: ROUGE-1 %.1f", now - began, result["scores"]["mean"]["rouge-1"])


def _load(run: Path, config: Mapping[str, Any]) -> Job:
    """Data, base and method, and environment.json that records them."""
    accelerator, precision = _accelerator(config)
    split = rows.load(config["task"])
    method = build(config["method"])
    base = _base(config, accelerator.device, precision=precision if method.leaves_base_intact else "float32")
    feeder = Feeder(
        packed=method.padding_free and "packing" in config["model"]["has"] and packs(accelerator.device),
        pad_id=base.tokenizer.pad_token_id,
        loss_on=config["optim"]["loss_on"],
        device=accelerator.device,
    )
    limits = {key: config["task"][key] for key in ("max_prompt_tokens", "max_target_tokens")}

    def encode(part: Sequence[rows.Row]) -> list[Example]:
        return encode_rows(part, base.tokenizer, **limits)

    asked = method.rows(split.valid, split.train, fits=lambda row: not encode([row])[0].prompt_cut)
    train_rows, valid_rows = encode(split.train), encode(asked)
    if accelerator.is_main_process:
        cut = {f"{name}s_cut": sum(getattr(e, f"{name}_cut") for e in train_rows) for name in ("prompt", "target")}
        forms = split.templates_hash + template_hash(base.tokenizer)
        hashes = {"data": split.data_hash, "templates": forms, "weights": base.weights_hash}
        record = {
            "source": base.source,
            "precision": precision,
            "padding_free": feeder.packed,
            "notes": split.notes | cut | method.notes(),
        }
        runs.write_json(run / "environment.json", environment(**hashes) | record)
    return Job(run, config, accelerator, method, base, split, train_rows, valid_rows, feeder)


def _attach(job: Job, *, num_steps: int) -> tuple[Any, dict[str, Any]]:
    """The model to train, and its parameter counts."""
    set_seed(job.config["seed"])
    before = {id(parameter) for parameter in job.base.model.parameters()}
    model = job.method.attach(
        job.base.model, tokenizer=job.base.tokenizer, num_steps=num_steps, train_rows=job.split.train
    )
    _checkpoint_activations(job)
    return model.to(job.accelerator.device), _count(model, job.base, before=before)


def _tune(job: Job, model: Any, steps: Sequence[Sequence[int]], tracker: Tracker) -> tuple[Any, list[dict[str, Any]]]:
    """Train, with a line of steps.jsonl for every step; the tuned model and those lines."""
    history: list[dict[str, Any]] = []

    def record(line: dict[str, Any]) -> None:
        line["peak_memory_gib"] = peak_memory_gib(job.accelerator.device)
        history.append(line)
        if job.main:
            runs.append_lines(job.run / "steps.jsonl", [line])
            tracker.step(line)

    if steps:
        lr = settings.learning_rate(job.config)
        loop = Loop(job.method, job.accelerator, job.feeder, job.train_rows, steps, job.config["optim"], lr)
        model = loop.run(model, validate=job.valid_loss, record=record)
        log.info("trained %d steps in %.1f s, loss %.3f", len(steps), history[-1]["seconds"], history[-1]["loss"])
    return model, history


def _result(
    job: Job, predictions: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], *, cost: dict[str, Any]
) -> dict[str, Any]:
    """The content of scores.json, the losses excepted."""
    last = history[-1] if history else {"seconds": 0.0, "num_tokens": 0}
    files = (job.run / "adapter").glob("*.safetensors")
    return {
        "version": 1,
        "scores": aggregate(predictions),
        "cost": {
            **cost,
            "peak_memory_gib": peak_memory_gib(job.accelerator.device),
            "train_seconds": last["seconds"],
            "tokens_per_second": last["num_tokens"] / last["seconds"] if history else 0.0,
            "adapter_mb": sum(file.stat().st_size for file in files) / 1e6,
        },
        "num_steps": len(history),
    }


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


def _base(config: Mapping[str, Any], device: torch.device, *, precision: str) -> Base:
    model = {**config["model"], "precision": precision}
    tokens = config["task"]["max_prompt_tokens"] + config["task"]["max_target_tokens"]
    quantize = config["method"]["quantize"]
    base = load(model, scale=config["scale"], quantize=quantize, device=str(device), max_tokens=tokens, log=log.info)
    log.info("base %s from %s", config["model"]["name"], base.source)
    return base


def _plan(job: Job) -> list[list[int]]:
    """Row numbers of every optimizer step."""
    optim = job.config["optim"]
    sizes = {key: optim[key] for key in ("epochs", "batch_rows", "max_steps")}
    return plan(len(job.train_rows), **sizes, seed=job.config["seed"]) if job.method.trains else []


def _checkpoint_activations(job: Job) -> None:
    """Recompute activations in the backward pass, where that is asked for and the method allows it."""
    if not job.config["model"]["checkpoint_activations"]:
        return
    if job.method.checkpointable:
        job.base.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        log.warning("%s cannot checkpoint activations: trained without", job.config["method"]["name"])


def _count(model: Any, base: Base, *, before: set[int]) -> dict[str, Any]:
    """Parameters; a 4-bit base counts what it stands for, not its packed bytes."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = base.num_parameters + sum(p.numel() for p in model.parameters() if id(p) not in before)
    return {"trainable_parameters": trained, "total_parameters": total, "trainable_percent": 100 * trained / total}


def _answers(job: Job, model: Any) -> dict[int, evaluate.Answer]:
    """The answer to every validation row, by its number; each process answers its share."""
    options = job.config["evaluate"]
    rank, ranks = job.accelerator.process_index, job.accelerator.num_processes
    decoding = evaluate.Decoding(
        max_new_tokens=options["max_new_tokens"] or evaluate.answer_limit(job.train_rows),
        batch_rows=options["batch_rows"],
        end_ids=job.base.end_ids,
        pad_id=job.base.tokenizer.pad_token_id,
        padding_side=options["padding_side"],
    )
    mine = range(rank, len(job.valid_rows), ranks)
    prompts = [job.valid_rows[n].ids[: job.valid_rows[n].num_prompt] for n in mine]
    found: list[tuple[int, evaluate.Answer]] = []
    virtual = job.method.virtual_embeddings(model)
    generator = model if virtual is None else job.base.model
    for batch in evaluate.predict(generator, prompts, decoding, virtual=virtual):
        found += [(mine[answer.number], answer) for answer in batch]
        log.info("answered %d of %d rows", len(found), len(mine))
    return dict(gather_object(found) if ranks > 1 else found)


def _predictions(job: Job, answers: Mapping[int, evaluate.Answer]) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl, written."""
    lines = [_line(row, answers[n], tokenizer=job.base.tokenizer) for n, row in enumerate(job.split.valid)]
    for line, scores in zip(lines, score_rows(lines), strict=True):
        line["scores"] = scores
    (job.run / "predictions.jsonl").unlink(missing_ok=True)
    runs.append_lines(job.run / "predictions.jsonl", lines)
    return lines


def _line(row: rows.Row, answer: evaluate.Answer, *, tokenizer: Any) -> dict[str, Any]:
    """One line of predictions.jsonl, without its scores."""
    return {
        "id": row.id,
        "task": row.task,
        "kind": row.kind,
        "prompt": row.prompt,
        "template": 0,
        "choices": list(row.choices) or None,
        "reference": row.target,
        "prediction": tokenizer.decode(answer.ids, skip_special_tokens=True).strip(),
        "finish_reason": answer.finish_reason,
    }


def _losses(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training loss over the last twenty steps; validation loss at the end and at its best."""
    if not history:
        return {}
    last = [line["loss"] for line in history[-20:]]
    measured = [(line["valid_loss"], line["step"]) for line in history if "valid_loss" in line]
    found: dict[str, Any] = {"train": sum(last) / len(last)}
    if measured:
        best, step = min(measured)
        found |= {"valid": measured[-1][0], "best_valid": best, "best_step": step}
    return found


def _kind(error: BaseException) -> str:
    """The kind of failure.json that an error is."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    if isinstance(error, FloatingPointError):
        return "not-a-number"
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if full or "inline_container" in text or "No space left" in text:  # how torch and safetensors say it
        return "no space"
    return "error"


def main() -> None:
    """Run the folder on the command line; a failure is written into it."""
    run = Path(sys.argv[1])
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # libraries' deprecations; what a person must know is logged
    try:
        train(run)
    except Exception as error:
        if not isinstance(error, ValueError):
            traceback.print_exc()
        message = " ".join(f"{error}".split()) or type(error).__name__
        print(f"{type(error).__name__}: {message}", flush=True)
        runs.fail(run, kind=_kind(error), message=message[:2000])
        sys.exit(1)


if __name__ == "__main__":
    main()
