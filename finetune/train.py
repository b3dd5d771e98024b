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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

from finetune import checks, evaluate, general, outcome, runs
from finetune import config as settings
from finetune.data import rows
from finetune.data.batches import plan
from finetune.environment import environment, peak_memory_gib, pick_device, usable_precision
from finetune.loop import Feeder, Loop, mean_loss
from finetune.methods.build import build
from finetune.methods.method import Method
from finetune.models.attention import packs
from finetune.models.load import Base, load
from finetune.models.tokenizer import Example, encode_rows, template_hash
from finetune.probe import Probe, State, Subject
from finetune.scores import aggregate
from finetune.track import Tracker

log = logging.getLogger("finetune")

PROBE_ROWS = 8  # validation rows of which the checks compare logits and answers
LOSS_ROWS = 16  # training rows of which they compare the loss


@dataclass(frozen=True)
class Job:
    """One run, loaded: what every part of it needs."""

    run: Path
    config: Mapping[str, Any]
    accelerator: Accelerator
    method: Method
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
        return _encode(part, self.base, self.config)

    def valid_loss(self, model: Any) -> float:
        """Mean cross-entropy in nats per supervised token of the validation rows."""
        return mean_loss(model, self.valid_rows, feeder=self.feeder, accelerator=self.accelerator)


def train(run: Path) -> None:
    """Load, tune, predict, score; scores.json comes last."""
    began = time.perf_counter()
    config = runs.read_config(run)
    job = _load(run, config)
    if not job.asked:
        return _unsupported(job)
    steps = _plan(job)
    log.info("%d training rows, %d to validate, %d steps", len(job.train_rows), len(job.valid_rows), len(steps))
    tracker = Tracker(run, config if job.main else None)
    probe, general_loss = _probe(job, steps), _general_loss(job, job.base.model)
    base_states, base_seconds = _measured(job, probe, job.base.model)
    model, counts = _attach(job, num_steps=len(steps))
    start_states, start_seconds = _measured(job, probe, model)
    model, history = _tune(job, model, steps, tracker)
    if job.main:
        job.method.save(model, run / "adapter")
    forgetting = general_loss | _general_loss(job, model, key="tuned")
    started = time.perf_counter()
    predictions = _predictions(job, model)
    predicted = time.perf_counter()
    own = {} if history or job.method.answers else {"valid": job.valid_loss(model)}
    checking = time.perf_counter()
    if job.main:
        memory = peak_memory_gib(job.accelerator.device)
        subject = Subject(job.method, model, job.base.model)
        before = (*base_states, *start_states)
        found = checks.examine(probe, subject, before, reload=lambda: _reload(job), optim=config["optim"])
        now = time.perf_counter()
        seconds = {
            "predict_seconds": predicted - started,
            "check_seconds": base_seconds + start_seconds + now - checking,
            "total_seconds": now - began,
        }
        result = _result(job, predictions, history, cost={**counts, **seconds, "peak_memory_gib": memory})
        result |= {"loss": outcome.losses(history) or own, "checks": found}
        result |= {"forgetting": forgetting} if forgetting else {}
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
    unanswerable = method.unanswerable(split.train)
    kept = replace(split, valid=tuple(row for row in split.valid if row.task not in unanswerable))
    asked = _asked(kept.valid, split.train, method=method, base=base, config=config)
    train_rows, valid_rows = (_encode(part, base, config) for part in (split.train, asked))
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
    return Job(run, config, accelerator, method, base, kept, asked, unanswerable, train_rows, valid_rows, feeder)


def _unsupported(job: Job) -> None:
    """No row can be answered: say why, and end."""
    reasons = "; ".join(sorted(set(job.unanswerable.values())))
    log.info("unsupported: %s", reasons)
    if job.main:
        runs.write_json(job.run / "unsupported.json", {"reason": f"{job.config['method']['name']} {reasons}"})


def _asked(
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
    limits = {key: config["task"][key] for key in ("max_prompt_tokens", "max_target_tokens")}
    return encode_rows(part, base.tokenizer, **limits)


def _attach(job: Job, *, num_steps: int) -> tuple[Any, dict[str, Any]]:
    """The model to train, and its parameter counts."""
    set_seed(job.config["seed"])
    before = {id(parameter) for parameter in job.base.model.parameters()}
    model = job.method.attach(
        job.base.model, tokenizer=job.base.tokenizer, num_steps=num_steps, train_rows=job.split.train
    )
    _checkpoint_activations(job)
    model = model.to(job.accelerator.device)
    learnt = job.method.fit(model, job.split.train, encode=job.encode, lr=settings.learning_rate(job.config))
    return model, _count(model, job.base, before=before, learnt=learnt)


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


def _probe(job: Job, steps: Sequence[Sequence[int]]) -> Probe:
    """What the checks ask: the first validation rows, and the rows of the first steps."""
    seen = list(dict.fromkeys(row for step in steps for row in step))[:LOSS_ROWS]
    examples = [job.train_rows[row] for row in seen]
    loss_on = job.config["optim"]["loss_on"]
    rows_asked = job.asked[:PROBE_ROWS]
    valid = job.valid_rows[:PROBE_ROWS]
    return Probe(job.accelerator, valid, examples, _decoding(job), loss_on, rows_asked, job.encode)


def _measured(job: Job, probe: Probe, model: Any) -> tuple[tuple[State, ...], float]:
    """The model measured twice, in the process that writes; and the seconds that took."""
    began = time.perf_counter()
    found = checks.twice(probe, model) if job.main else ()
    return found, time.perf_counter() - began


def _general_loss(job: Job, model: Any, *, key: str = "base") -> dict[str, Any]:
    """Cross-entropy on text that is not the task's, nats per token; empty where that is not asked for."""
    name = job.config["evaluate"]["forgetting_text"]
    if name is None:
        return {}
    feeder = replace(job.feeder, loss_on="all")
    with job.accelerator.autocast():
        text = general.examples(name, job.base.tokenizer)
        return {key: mean_loss(model, text, feeder=feeder, accelerator=job.accelerator), "text": Path(name).name}


def _reload(job: Job) -> Subject:
    """The saved model on a fresh base."""
    precision = usable_precision(job.config["model"]["precision"], job.accelerator.device)[0]
    fresh = _base(
        job.config, job.accelerator.device, precision=precision if job.method.leaves_base_intact else "float32"
    )
    method = build(job.config["method"])
    model = method.load(fresh.model, job.run / "adapter")
    return Subject(method, model.to(job.accelerator.device), fresh.model)


def _result(
    job: Job, predictions: Sequence[outcome.Line], history: Sequence[Mapping[str, Any]], *, cost: dict[str, Any]
) -> dict[str, Any]:
    """The content of scores.json that predictions and steps give."""
    last = history[-1] if history else {"seconds": 0.0, "num_tokens": 0}
    files = (job.run / "adapter").glob("*.safetensors")
    rewording = outcome.rewording(predictions)
    return {
        "version": 1,
        "scores": aggregate(predictions),
        **({"rewording": rewording} if rewording else {}),
        **({"unsupported_tasks": dict(job.unanswerable)} if job.unanswerable else {}),
        "cost": {
            **cost,
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


def _count(model: Any, base: Base, *, before: set[int], learnt: int) -> dict[str, Any]:
    """Parameters; a 4-bit base counts what it stands for, not its packed bytes."""
    trained = learnt + sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = learnt + base.num_parameters + sum(p.numel() for p in model.parameters() if id(p) not in before)
    return {"trainable_parameters": trained, "total_parameters": total, "trainable_percent": 100 * trained / total}


def _decoding(job: Job) -> evaluate.Decoding:
    """How answers are generated."""
    options = job.config["evaluate"]
    return evaluate.Decoding(
        max_new_tokens=options["max_new_tokens"] or evaluate.answer_limit(job.train_rows),
        batch_rows=options["batch_rows"],
        end_ids=job.base.end_ids,
        pad_id=job.base.tokenizer.pad_token_id,
        padding_side=options["padding_side"],
    )


def _predictions(job: Job, model: Any) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl, written: every validation row, then some of them in other words."""
    lines = outcome.lines(job.split.valid, _replies(job, model, job.asked))
    for number, template in enumerate(job.config["task"]["rewordings"], start=1):
        part = _reworded(job, template)
        asked = _asked(part, job.split.train, method=job.method, base=job.base, config=job.config)
        lines += outcome.lines(part, _replies(job, model, asked), template=number)
    if job.main:
        (job.run / "predictions.jsonl").unlink(missing_ok=True)
        runs.append_lines(job.run / "predictions.jsonl", lines)
    return lines


def _reworded(job: Job, template: str) -> list[rows.Row]:
    """Validation rows in other words, evenly spaced."""
    count, valid = job.config["evaluate"]["rewording_rows"], job.split.valid
    if not count:
        return []
    found = {row.id: row for row in rows.reworded(job.config["task"], template)}
    return [found[row.id] for row in valid[:: -(-len(valid) // count)] if row.id in found]


def _replies(job: Job, model: Any, asked: Sequence[rows.Row]) -> list[outcome.Reply]:
    """The answer to every row."""
    chosen = job.method.predict(model, asked, encode=job.encode)
    if chosen is not None:
        return [(text, "stop") for text in chosen]
    answers = _answers(job, model, job.encode(asked))
    decode = job.base.tokenizer.decode
    found = [answers[n] for n in range(len(asked))]
    return [(decode(answer.ids, skip_special_tokens=True).strip(), answer.finish_reason) for answer in found]


def _answers(job: Job, model: Any, examples: Sequence[Example]) -> dict[int, evaluate.Answer]:
    """The generated answer to every row, by its number; each process answers its share."""
    rank, ranks = job.accelerator.process_index, job.accelerator.num_processes
    mine = range(rank, len(examples), ranks)
    prompts = [examples[n].ids[: examples[n].num_prompt] for n in mine]
    found: list[tuple[int, evaluate.Answer]] = []
    virtual = job.method.virtual_embeddings(model)
    generator = model if virtual is None else job.base.model
    for batch in evaluate.predict(generator, prompts, _decoding(job), virtual=virtual):
        found += [(mine[answer.number], answer) for answer in batch]
        log.info("answered %d of %d rows", len(found), len(mine))
    return dict(gather_object(found) if ranks > 1 else found)


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


def main(run: Path) -> None:
    """Run a folder; a failure is written into it and exits with status 1."""
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
    main(Path(sys.argv[1]))
