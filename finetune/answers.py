"""The validation rows -> predictions.jsonl: as they are, and some of them in other words."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object

from finetune import evaluate, outcome, runs
from finetune.data import rows
from finetune.job import Job, asked_of
from finetune.models.tokenizer import Example

log = logging.getLogger("finetune")


def decoding(job: Job) -> evaluate.Decoding:
    """How answers are generated."""
    options = job.config["evaluate"]
    return evaluate.Decoding(
        max_new_tokens=options["max_new_tokens"] or evaluate.answer_limit(job.train_rows),
        batch_rows=options["batch_rows"],
        end_ids=job.base.end_ids,
        pad_id=job.base.tokenizer.pad_token_id,
        padding_side=options["padding_side"],
    )


def predict_rows(job: Job, model: Any) -> list[dict[str, Any]]:
    """The lines of predictions.jsonl, written: every validation row, then some of them in other words."""
    lines = outcome.lines(job.split.valid, _replies(job, model, job.asked))
    for number, template in enumerate(job.config["task"]["rewordings"], start=1):
        part = _reworded(job, template)
        asked = asked_of(part, job.split.train, method=job.method, base=job.base, config=job.config)
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
    for batch in evaluate.predict(model, prompts, decoding(job)):
        found += [(mine[answer.number], answer) for answer in batch]
        log.info("answered %d of %d rows", len(found), len(mine))
    return dict(gather_object(found) if ranks > 1 else found)
