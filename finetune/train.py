"""`python -m finetune.train FOLDER`: one run, from its config.yaml to its scores.json.

An Accelerate program; several processes are started by torch.distributed.run. It reads nothing but the folder (and
the data and weights that the configuration names) and fills it.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from finetune import checks, failure, general, outcome, runs
from finetune import config as settings
from finetune.answers import Answering, decoding
from finetune.attach import attached
from finetune.budget import planned
from finetune.environment import peak_memory_gib
from finetune.feeder import mean_loss
from finetune.job import Job, load_job, reloaded
from finetune.loop import Loop
from finetune.probe import Probe, State, Subject
from finetune.resume import Keeper, refuse_small_disk
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
    model, counts = attached(job, steps)
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
        found = checks.examine(probe, subject, before, reload=lambda: reloaded(job), optim=config["optim"])
        now = time.perf_counter()
        seconds = {
            "predict_seconds": predicted - started + answering.earlier,
            "check_seconds": base_seconds + start_seconds + now - checking,
            "total_seconds": now - began + keeper.earlier + answering.earlier,
        }
        sizes = {"prediction_batch_halvings": answering.halvings}
        sizes |= {"batch_tokens": batch_tokens} if batch_tokens else {}
        cost = {**counts, **seconds, **sizes, "peak_memory_gib": memory}
        result = outcome.result(predictions, history, adapter=run / "adapter", unsupported=job.unanswerable, cost=cost)
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
    launch = job.config["launch"]
    way, alike = launch["step"], launch.get("alike") or 1
    loop = Loop(job.method, job.accelerator, *data, job.config["optim"], lr, ids, way, alike=alike)
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
        failure.tell(run, error)
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
