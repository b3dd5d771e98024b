"""The validation rows -> predictions.jsonl: as they are, and some of them in other words."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from finetune import evaluate, outcome, runs
from finetune.data import rows
from finetune.environment import usable_precision
from finetune.job import Job, asked_of
from finetune.memory import free, out_of_memory, too_much
from finetune.models.tokenizer import Example
from finetune.resume import PARTIAL
from finetune.scores.conventions import count_reference
from finetune.stop import Stop
from finetune.vllm_engine import Engine

log = logging.getLogger("finetune")

Said = tuple[list[int], str]  # new tokens, finish reason


@dataclass(frozen=True)
class Batch:
    """Answers that were generated together."""

    answers: Sequence[evaluate.Answer]
    seconds: float


def decoding(job: Job) -> evaluate.Decoding:
    """How answers are generated."""
    options = job.config["evaluate"]
    return evaluate.Decoding(
        max_new_tokens=options["max_new_tokens"] or evaluate.answer_limit(job.train_rows),
        batch_rows=options["batch_rows"],
        end_ids=job.base.end_ids,
        pad_id=job.base.tokenizer.pad_token_id,
        padding_side=options["padding_side"],
        in_places=job.feeder.packed,
        replayed="decode" in job.method.replayable and job.config["method"]["quantize"] != "int8",  # looks for outliers
    )


def _engine(job: Job) -> Engine:
    """vLLM on the base as it lies on the disk and the adapter as it was saved; neither is read before the first row."""
    config, adapter = job.config, job.run / "adapter"
    tokens = config["task"]["max_prompt_tokens"] + decoding(job).max_new_tokens
    positions = getattr(job.base.model.config, "max_position_embeddings", None)
    llm = {
        "model": str(job.base.folder),
        "trust_remote_code": config["model"]["trust_remote_code"],
        "dtype": usable_precision(config["model"]["precision"], job.accelerator.device)[0],
        "max_model_len": min(tokens, positions or tokens),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # no penalties of the base's own
        "seed": config["seed"],
    }
    return Engine(llm, adapter=adapter if job.method.trains else None)


class Answering:
    """The answers of one model to the validation rows; batches that an earlier process finished are not repeated."""

    def __init__(self, job: Job, model: Any, stop: Stop) -> None:
        self.job, self.model, self.stop = job, model, stop
        self.file = job.run / PARTIAL.replace("*", str(job.accelerator.process_index))
        self.batch_rows: int = job.config["evaluate"]["batch_rows"]
        self.halvings = 0  # of `batch_rows`, where memory ran out
        self.earlier = 0.0  # seconds of answering before this process
        self.engine: Engine | None = None

    def lines(self) -> list[dict[str, Any]]:
        """The lines of predictions.jsonl, written: every validation row, then some of them in other words."""
        with contextlib.ExitStack() as stack:
            if self.job.config["evaluate"].get("backend") == "vllm":
                free()  # what training has left is vLLM's to use
                self.engine = stack.enter_context(contextlib.closing(_engine(self.job)))
            return self._lines()

    def _predict(self, prompts: Sequence[Sequence[int]], how: evaluate.Decoding) -> Iterator[list[evaluate.Answer]]:
        """By vLLM where that is asked for, else by the model itself, in the operations of its training."""
        if self.engine:
            yield from self.engine.predict(prompts, how)
            return
        with self.job.method.lean(self.model):
            yield from evaluate.predict(self.model, prompts, how)

    def _lines(self) -> list[dict[str, Any]]:
        job = self.job
        with _counting([row.target for row in job.split.valid] if job.main else []):
            replies = self._replies(job.asked, template=0)
        found = outcome.lines(job.split.valid, replies)
        for number, template in enumerate(job.config["task"]["rewordings"], start=1):
            part = _reworded(job, template)
            asked = asked_of(part, job.split.train, method=job.method, base=job.base, config=job.config)
            found += outcome.lines(part, self._replies(asked, template=number), template=number)
        if job.main:
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found)
            runs.write_text(job.run / "predictions.jsonl", text)
        return found

    def _replies(self, asked: Sequence[rows.Row], *, template: int) -> list[outcome.Reply]:
        """The answer to every row."""
        chosen = self.job.method.predict(self.model, asked, encode=self.job.encode)
        if chosen is not None:
            return [(text, "stop") for text in chosen]
        answers = self._answers(self.job.encode(asked), template=template)
        decode = self.job.base.tokenizer.decode
        found = [answers[n] for n in range(len(asked))]
        return [(decode(ids, skip_special_tokens=True).strip(), reason) for ids, reason in found]

    def _answers(self, examples: Sequence[Example], *, template: int) -> dict[int, Said]:
        """The generated answer to every row, by its number; each process answers its share."""
        rank, ranks = self.job.accelerator.process_index, self.job.accelerator.num_processes
        mine = range(rank, len(examples), ranks)
        where = f"{self.job.accelerator.device.type} {self.job.accelerator.mixed_precision}"
        about = {"template": template, "rows": len(mine), "processes": ranks, "where": where}
        found = self._earlier(about)
        with self.stop.held():
            while left := [n for n in mine if n not in found]:
                prompts = [examples[n].ids[: examples[n].num_prompt] for n in left]
                for batch in self._batches(prompts):
                    part = {left[answer.number]: (answer.ids, answer.finish_reason) for answer in batch.answers}
                    size = {"batch_rows": self.batch_rows, "halvings": self.halvings}
                    _append(self.file, {**about, **size, "seconds": batch.seconds, "answers": list(part.items())})
                    found |= part
                    log.info("answered %d of %d rows", len(found), len(mine))
                    self.stop.heed()
        return dict(gather_object(list(found.items())) if ranks > 1 else found)

    def _batches(self, prompts: Sequence[Sequence[int]]) -> Iterator[Batch]:
        """Finished batches and their seconds; ends early, with smaller batches to come, where memory runs out."""
        began = time.perf_counter()
        try:
            how = replace(decoding(self.job), batch_rows=self.batch_rows)
            for answers in self._predict(prompts, how):
                yield Batch(answers, time.perf_counter() - began)
                began = time.perf_counter()
            return
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            said = str(error)
        if self.batch_rows == 1 or len(prompts) == 1:
            raise too_much(max(map(len, prompts)), doing="answering:", said=said)
        free()
        self.batch_rows = min(self.batch_rows, len(prompts)) // 2
        self.halvings += 1
        log.warning("out of memory: %d rows are answered together from now on", self.batch_rows)

    def _earlier(self, about: Mapping[str, Any]) -> dict[int, Said]:
        """Answers of earlier processes; all are dropped if they are not of this plan."""
        found: dict[int, Said] = {}
        for line in _whole(self.file):
            if any(line[key] != about[key] for key in ("processes", "where")):
                self.file.unlink()
                return {}
            if {key: line[key] for key in about} == about:
                found |= {number: (ids, reason) for number, (ids, reason) in line["answers"]}
                self.earlier += line["seconds"]
                self.batch_rows, self.halvings = line["batch_rows"], line["halvings"]
        return found


@contextlib.contextmanager
def _counting(references: Sequence[str]) -> Iterator[None]:
    """Within, while the GPU answers, the dictionary is read and references are counted, as ROUGE needs them."""
    beside = ThreadPoolExecutor(1)
    try:
        beside.map(count_reference, references[: count_reference.cache_info().maxsize])
        yield
    finally:
        beside.shutdown(cancel_futures=True)


def _append(file: Path, batch: Mapping[str, Any]) -> None:
    """Add a batch and its checksum."""
    text = json.dumps(batch)
    runs.append_lines(file, [{"crc": zlib.crc32(text.encode()), "batch": text}])


def _whole(file: Path) -> list[dict[str, Any]]:
    """The batches up to the first that is damaged, and the file without the others."""
    if not file.exists():
        return []
    found, kept = [], b""
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            value = json.loads(line)
            if value["crc"] != zlib.crc32(value["batch"].encode()) or not line.endswith(b"\n"):
                break
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            break
        found.append(json.loads(value["batch"]))
        kept += line
    runs.write_text(file, kept.decode())
    return found


def _reworded(job: Job, template: str) -> list[rows.Row]:
    """Validation rows in other words, evenly spaced."""
    count, valid = job.config["evaluate"]["rewording_rows"], job.split.valid
    if not count:
        return []
    found = {row.id: row for row in rows.reworded(job.config["task"], template)}
    return [found[row.id] for row in valid[:: -(-len(valid) // count)] if row.id in found]
