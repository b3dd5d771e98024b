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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
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
from finetune.models.attention import packable
from finetune.models.load import Base, load
from finetune.models.tokenizer import Example, encode_rows
from finetune.scores import aggregate, score_rows
from finetune.track import Tracker

log = logging.getLogger("finetune")


def train(run: Path) -> None:
    """Load, tune, predict, score; scores.json comes last."""
    began = time.perf_counter()
    config = runs.read_config(run)
    accelerator, precision = _accelerator(config)
    main = accelerator.is_main_process
    split = rows.load(config["task"])
    method = build(config["method"])
    base = _base(config, accelerator.device, precision=precision if method.leaves_base_intact else "float32")
    train_rows, valid_rows = (_encode(part, base, config) for part in (split.train, split.valid))
    optim = config["optim"]
    steps = _plan(method, len(train_rows), optim, seed=config["seed"])
    log.info("%d training rows, %d to validate, %d steps", len(train_rows), len(valid_rows), len(steps))
    if main:
        hashes = {"data": split.data_hash, "templates": split.templates_hash, "weights": base.weights_hash}
        record = {**environment(**hashes), "notes": split.notes, "source": base.source, "precision": precision}
        runs.write_json(run / "environment.json", record)

    set_seed(config["seed"])
    model = method.attach(base.model, tokenizer=base.tokenizer, num_steps=len(steps), train_rows=split.train)
    feeder = Feeder(
        packed=method.padding_free and packable(base.model),
        pad_id=base.tokenizer.pad_token_id,
        loss_on=optim["loss_on"],
        device=accelerator.device,
    )
    _checkpoint_activations(base.model, config, method)
    tracker = Tracker(run, config) if main else None

    def validate(tuned: Any) -> float:
        return mean_loss(tuned, valid_rows, feeder=feeder, accelerator=accelerator)

    def record_step(line: dict[str, Any]) -> None:
        line["peak_memory_gib"] = peak_memory_gib(accelerator.device)
        if main and tracker:
            runs.append_lines(run / "steps.jsonl", [line])
            tracker.step(line)
        history.append(line)

    history: list[dict[str, Any]] = []
    counts = _count(model)
    model.to(accelerator.device)
    if steps:
        lr = settings.learning_rate(config)
        loop = Loop(method, accelerator, feeder, train_rows, steps, optim, lr)
        model = loop.run(model, validate=validate, record=record_step)
        log.info("trained %d steps in %.1f s, loss %.3f", len(steps), history[-1]["seconds"], history[-1]["loss"])
    if main:
        method.save(model, run / "adapter")

    started = time.perf_counter()
    answers = _predict(model, train_rows, valid_rows, base, config, accelerator)
    if not main:
        return
    predictions = [_line(row, *answers[n], tokenizer=base.tokenizer) for n, row in enumerate(split.valid)]
    for line, scores in zip(predictions, score_rows(predictions), strict=True):
        line["scores"] = scores
    (run / "predictions.jsonl").unlink(missing_ok=True)
    runs.append_lines(run / "predictions.jsonl", predictions)
    now = time.perf_counter()
    result = {
        "version": 1,
        "scores": aggregate(predictions),
        "cost": {
            **counts,
            "peak_memory_gib": peak_memory_gib(accelerator.device),
            "train_seconds": history[-1]["seconds"] if history else 0.0,
            "predict_seconds": now - started,
            "total_seconds": now - began,
            "tokens_per_second": _tokens(train_rows, steps) / history[-1]["seconds"] if history else 0.0,
            "adapter_mb": sum(f.stat().st_size for f in (run / "adapter").glob("*.safetensors")) / 1e6,
        },
        "loss": _losses(history) if history else {"valid": validate(model)},
        "num_steps": len(steps),
        "padding_free": feeder.packed,
        "precision": precision,
    }
    assert tracker is not None
    tracker.finish(result, predictions)
    tracker.close(failed=False)
    runs.write_json(run / "scores.json", result)
    log.info("done in %.1f s", time.perf_counter() - began)


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


def _encode(part: Sequence[rows.Row], base: Base, config: Mapping[str, Any]) -> list[Example]:
    limits = {key: config["task"][key] for key in ("max_prompt_tokens", "max_target_tokens")}
    return encode_rows(part, base.tokenizer, **limits)


def _plan(method: Method, num_rows: int, optim: Mapping[str, Any], *, seed: int) -> list[list[int]]:
    if not method.trains:
        return []
    sizes = {key: optim[key] for key in ("epochs", "batch_rows", "max_steps")}
    return plan(num_rows, **sizes, seed=seed)


def _checkpoint_activations(model: Any, config: Mapping[str, Any], method: Method) -> None:
    """Recompute activations in the backward pass, where that is asked for and the method allows it."""
    if not config["model"]["checkpoint_activations"]:
        return
    if method.checkpointable:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        log.warning("%s cannot checkpoint activations: trained without", config["method"]["name"])


def _count(model: Any) -> dict[str, Any]:
    """Parameters; a 4-bit base counts what it stands for, not its packed bytes."""
    named = list(model.named_parameters())
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    total = sum(p.numel() * (2 if type(p).__name__ == "Params4bit" else 1) for _, p in named)
    return {"trainable_parameters": trained, "total_parameters": total, "trainable_percent": 100 * trained / total}


def _predict(
    model: Any,
    train_rows: Sequence[Example],
    valid_rows: Sequence[Example],
    base: Base,
    config: Mapping[str, Any],
    accelerator: Accelerator,
) -> dict[int, tuple[list[int], str]]:
    """New tokens and finish reason of every validation row; each process answers its share."""
    options = config["evaluate"]
    limit = options["max_new_tokens"] or evaluate.answer_limit(train_rows)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = range(rank, len(valid_rows), ranks)
    prompts = [valid_rows[n].ids[: valid_rows[n].num_prompt] for n in mine]
    found: list[tuple[int, tuple[list[int], str]]] = []
    batches = evaluate.predict(
        model,
        prompts,
        max_new_tokens=limit,
        batch_rows=options["batch_rows"],
        ends=base.end_ids,
        pad_id=base.tokenizer.pad_token_id,
        padding_side=options["padding_side"],
    )
    for batch in batches:
        found += [(mine[n], (ids, reason)) for n, ids, reason in batch]
        log.info("answered %d of %d rows", len(found), len(mine))
    return dict(gather_object(found) if ranks > 1 else found)


def _line(row: rows.Row, ids: list[int], reason: str, *, tokenizer: Any) -> dict[str, Any]:
    """One line of predictions.jsonl, without its scores."""
    return {
        "id": row.id,
        "task": row.task,
        "kind": row.kind,
        "prompt": row.prompt,
        "template": 0,
        "choices": list(row.choices) or None,
        "reference": row.target,
        "prediction": tokenizer.decode(ids, skip_special_tokens=True).strip(),
        "finish_reason": reason,
    }


def _tokens(examples: Sequence[Example], steps: Sequence[Sequence[int]]) -> int:
    return sum(len(examples[row].ids) for step in steps for row in step)


def _losses(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Training loss over the last twenty steps; validation loss at the end and at its best."""
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
