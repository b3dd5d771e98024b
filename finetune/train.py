"""`python -m finetune.train FOLDER`: one run, from its config.yaml to its scores.json.

An Accelerate program; several processes are started by torch.distributed.run. It reads nothing but the folder (and
the data and weights that the configuration names) and fills it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from accelerate.utils import set_seed

from finetune import checks, general, outcome, runs
from finetune import config as settings
from finetune.answers import Answering, decoding
from finetune.budget import planned
from finetune.environment import peak_memory_gib, usable_precision
from finetune.feeder import mean_loss
from finetune.job import Job, base_of, load_job
from finetune.loop import Loop
from finetune.memory import out_of_memory
from finetune.methods.build import build
from finetune.models.load import Base
from finetune.probe import Probe, State, Subject
from finetune.resume import Keeper, refuse_small_disk
from finetune.scores import aggregate
from finetune.shelf import Shelf
from finetune.stop import STATUS, Stop, Stopped
from finetune.track import Tracker

log = logging.getLogger("finetune")

PROBE_ROWS = 8  # validation rows of which the checks compare logits and answers
LOSS_ROWS = 16  # training rows of which they compare the loss


def train(run: Path, stop: Stop, bases: Shelf) -> None:
    """Load, tune, predict, score; scores.json comes last. What an earlier process left is gone on with."""
    began = time.perf_counter()
    config = runs.read_config(run)
    job = load_job(run, config, bases)
    if not job.asked:
        return _unsupported(job)
    steps, batch_tokens = planned(job)
    log.info("%d training rows, %d to validate, %d steps", len(job.train_rows), len(job.valid_rows), len(steps))
    tracker = Tracker(run, config if job.main else None)
    probe, general_loss = _probe(job, steps), _general_loss(job, job.base.model)
    base_states, base_seconds = _measured(job, probe, job.base.model)
    model, counts = _attach(job, num_steps=len(steps))
    start_states, start_seconds = _measured(job, probe, model)
    keeper = _keeper(job, num_steps=len(steps), stop=stop)
    answering = Answering(job, model, stop)
    history = _tune(job, model, steps, tracker, keeper)
    if job.main:
        _save(job, model)
    forgetting = general_loss | _general_loss(job, model, key="tuned")
    started = time.perf_counter()
    predictions = answering.lines()
    predicted = time.perf_counter()
    own = {} if history or job.method.answers else {"valid": job.valid_loss(model)}
    checking = time.perf_counter()
    if job.main:
        memory = max([peak_memory_gib(job.accelerator.device), *(line["peak_memory_gib"] for line in history)])
        subject = Subject(job.method, model, job.base.model)
        before = (*base_states, *start_states)
        found = checks.examine(probe, subject, before, reload=lambda: _reload(job), optim=config["optim"])
        now = time.perf_counter()
        seconds = {
            "predict_seconds": predicted - started + answering.earlier,
            "check_seconds": base_seconds + start_seconds + now - checking,
            "total_seconds": now - began + keeper.earlier + answering.earlier,
        }
        sizes = {"prediction_batch_halvings": answering.halvings}
        sizes |= {"batch_tokens": batch_tokens} if batch_tokens else {}
        result = _result(job, predictions, history, cost={**counts, **seconds, **sizes, "peak_memory_gib": memory})
        result |= {"loss": outcome.losses(history) or own, "checks": found, "resumed": keeper.resumed()}
        result |= {"forgetting": forgetting} if forgetting else {}
        runs.write_json(run / "scores.json", outcome.finite(result))
        keeper.forget()
        tracker.finish(result, predictions)  # an upload may take long, and is only a copy
        log.info("done in %.1f s: ROUGE-1 %.1f", now - began, result["scores"]["mean"]["rouge-1"])


def _unsupported(job: Job) -> None:
    """No row can be answered: say why, and end."""
    reasons = "; ".join(sorted(set(job.unanswerable.values())))
    log.info("unsupported: %s", reasons)
    if job.main:
        runs.write_json(job.run / "unsupported.json", {"reason": f"{job.config['method']['name']} {reasons}"})


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


def _keeper(job: Job, *, num_steps: int, stop: Stop) -> Keeper:
    """What this run goes on from, and keeps."""
    minutes = job.config["launch"]["checkpoint_minutes"]
    return Keeper(job.run, accelerator=job.accelerator, num_steps=num_steps, minutes=minutes, stop=stop)


def _tune(
    job: Job, model: Any, steps: Sequence[Sequence[int]], tracker: Tracker, keeper: Keeper
) -> list[dict[str, Any]]:
    """Train, with a line of steps.jsonl for every step; those lines, also of earlier processes."""

    def record(line: dict[str, Any]) -> None:
        line["peak_memory_gib"] = peak_memory_gib(job.accelerator.device)
        line = outcome.finite(line)
        if job.main:
            runs.append_lines(job.run / "steps.jsonl", [line])
            resumed = keeper.history if len(keeper.history) == keeper.num_resumed else ()
            for shown in (*resumed, line):  # the tracker's run is a new one
                tracker.step(shown)
        keeper.history.append(line)

    if not steps:
        keeper.begin_without_steps()
        return []
    refuse_small_disk(job.run, model)
    lr, ids = settings.learning_rate(job.config), [row.id for row in job.split.train]
    data = (job.feeder, job.train_rows, steps)
    loop = Loop(job.method, job.accelerator, *data, job.config["optim"], lr, ids, job.config["launch"]["step"])
    with keeper.stop.held():
        loop.run(model, validate=job.valid_loss, record=record, keeper=keeper)
    if job.main and len(keeper.history) == keeper.num_resumed:  # no step was left, so that none was recorded
        for line in keeper.history:
            tracker.step(line)
    last = keeper.history[-1]
    loss = "no number" if last["loss"] is None else f"{last['loss']:.3f}"
    log.info("trained %d steps in %.1f s, loss %s", len(steps), last["seconds"], loss)
    return keeper.history


def _save(job: Job, model: Any) -> None:
    """The trained weights in `adapter/`, whole or not at all."""
    part, folder = job.run / ".adapter", job.run / "adapter"
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    try:
        job.method.save(model, part)
        if any(part.iterdir()):
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _probe(job: Job, steps: Sequence[Sequence[int]]) -> Probe:
    """What the checks ask: the first validation rows, and the rows of the first steps."""
    seen = list(dict.fromkeys(row for step in steps for row in step))[:LOSS_ROWS]
    examples = [job.train_rows[row] for row in seen]
    loss_on = job.config["optim"]["loss_on"]
    rows_asked = job.asked[:PROBE_ROWS]
    valid = job.valid_rows[:PROBE_ROWS]
    return Probe(job.accelerator, valid, examples, decoding(job), loss_on, job.feeder.packed, rows_asked, job.encode)


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
    intact = job.method.leaves_base_intact
    fresh = base_of(job.config, job.accelerator.device, job.bases, precision=precision, intact=intact)
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
            **({"way": last["way"]} if history else {}),
            "adapter_mb": sum(file.stat().st_size for file in files) / 1e6,
            "micro_batch_halvings": last.get("micro_batch_halvings", 0),
        },
        "num_steps": len(history),
        "skipped_steps": sum("skipped" in line for line in history),
    }


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


def _kind(error: BaseException) -> str:
    """The kind of failure.json that an error is."""
    text = str(error)
    if out_of_memory(error):
        return "out of memory"
    if isinstance(error, FloatingPointError):
        return "not-a-number"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "inline_container" in text or "No space left" in text:  # how torch and safetensors say it
        return "no space"
    return "error"


def main(run: Path, bases: Shelf | None = None) -> None:
    """Run a folder; a failure is written into it and exits with status 1, a polite end with 75.

    `bases` are those that this process keeps between its runs.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout, force=True)
    log.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")  # libraries' deprecations; what a person must know is logged
    stop = Stop()
    try:
        stop.listen()
        train(run, stop, bases or Shelf())
    except (Stopped, Exception) as error:
        # Of several processes one may see the others' end first, as an error.
        if stop.asked and (isinstance(error, Stopped) or int(os.environ.get("WORLD_SIZE", "1")) > 1):
            log.info("stopped as asked; the same command goes on")
            sys.exit(STATUS)
        _fail(run, error)
        sys.exit(1)


def _fail(run: Path, error: BaseException) -> None:
    """failure.json, and the last lines of run.log."""
    if not isinstance(error, ValueError):
        traceback.print_exception(error)
    message = " ".join(f"{error}".split()) or type(error).__name__
    if _kind(error) == "no space":
        message = f"no space left for {run}: {message}"
    print(f"{type(error).__name__}: {message}", flush=True)
    runs.fail(run, kind=_kind(error), message=message[:2000])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
