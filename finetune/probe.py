"""A few rows that every model of a run is asked, and what is measured of it: weights, logits, losses, answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from finetune.data.batches import Example, bounded, pack, pad, supervised
from finetune.data.rows import Row
from finetune.evaluate import Answer, Decoding, predict
from finetune.feeder import packed_logits, summed_loss
from finetune.methods.method import Encode, Method

TOKENS = 8  # of each row's answer that are looked at
LOGITS = 512  # positions at once: with 152 k words of float32 0.3 GiB
# Rounding between two ways to compute the same logits, as a share of the largest: batches, caches and kernels differ.
ROUNDING = {"no": 1e-4, "fp16": 2**-8, "bf16": 2**-5}


@dataclass(frozen=True)
class Probe:
    """What is asked."""

    accelerator: Accelerator
    rows: Sequence[Example]  # validation rows, for logits and answers
    seen: Sequence[Example]  # training rows, for losses
    decoding: Decoding
    loss_on: str = "target"
    packed: bool = False  # may rows be measured together, padding-free?
    asked: Sequence[Row] = ()  # the validation rows, for methods that answer by themselves
    encode: Encode | None = None


@dataclass(frozen=True)
class Subject:
    """Who is asked: the model that a method made of a base."""

    method: Method
    model: Any
    base: Any


@dataclass(frozen=True)
class Weight:
    """A parameter and its checksum at the time."""

    name: str
    parameter: Tensor
    checksum: int


@dataclass(frozen=True)
class State:
    """A model at one moment."""

    weights: Mapping[int, Weight]  # by the parameter's id
    logits: Tensor  # (positions, vocabulary) where the rows' targets begin, float32 on the CPU
    losses: Tensor  # (seen rows,) nats per token


@dataclass(frozen=True)
class Said:
    """Greedy answers of at most eight tokens."""

    answers: list[Answer]
    cached: Tensor  # (positions, vocabulary) logits that chose their tokens: all rows in one batch, with the KV cache
    forced: Tensor  # (positions, vocabulary) logits at the same places: each row by itself, without a cache


def measure(probe: Probe, model: Any) -> State:
    """Weights, logits and losses; neither the weights nor the run's random numbers are touched."""
    with _at_rest(probe, model):
        logits = _logits(
            probe, model, [Part(row.ids[: row.num_prompt + TOKENS - 1], row.num_prompt) for row in probe.rows]
        )
        losses = _losses(probe, model)
    weights = {id(p): Weight(name, p, checksum(p)) for name, p in model.named_parameters()}
    return State(weights, logits, losses)


def say(probe: Probe, subject: Subject) -> Said:
    """The subject's answers, and the logits behind them."""
    found = answer(probe, subject)
    parts = [
        Part([*row.ids[: row.num_prompt], *one.ids[: len(logits) - 1]], row.num_prompt)
        for row, (one, logits) in zip(probe.rows, found, strict=True)
    ]
    with _at_rest(probe, subject.model):
        forced = _logits(probe, subject.model, parts)
    return Said([one for one, _ in found], torch.cat([logits for _, logits in found]), forced)


def answer(probe: Probe, subject: Subject) -> list[tuple[Answer, Tensor]]:
    """To every row, all in one batch; with the logits (tokens, vocabulary) that chose its tokens."""
    prompts = [row.ids[: row.num_prompt] for row in probe.rows]
    few = replace(probe.decoding, max_new_tokens=TOKENS, batch_rows=len(prompts), in_places=False)
    seen: list[Tensor] = []

    def record(head: Any, inputs: Any, output: Tensor) -> None:
        seen.append(output[:, -1].float().cpu())

    with _at_rest(probe, subject.model):
        handle = subject.model.get_output_embeddings().register_forward_hook(record)
        try:
            [batch] = predict(subject.model, prompts, few)
        finally:
            handle.remove()
    logits = torch.stack(seen, dim=1)  # (rows, tokens, vocabulary)
    found = {one.number: (one, chosen[: steps(one)]) for one, chosen in zip(batch, logits, strict=True)}
    return [found[number] for number in range(len(prompts))]


def reached(probe: Probe, model: Any) -> set[int]:
    """Ids of the parameters that the gradient of one row's loss reaches."""
    with _at_rest(probe, model), torch.enable_grad():
        model.train()
        loss = _loss(probe, model, probe.seen[0])
        if loss.requires_grad:
            loss.backward()
    found = {id(p) for p in model.parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def checksum(weight: Tensor) -> int:
    """Sum of a tensor's bits read as whole numbers: exact, and the same in any order."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    return int(weight.detach().contiguous().view(whole).sum(dtype=torch.int64))


def steps(said: Answer) -> int:
    """Tokens that were chosen, the end token included."""
    return len(said.ids) + (said.finish_reason == "stop")


def rounding(probe: Probe, model: Any) -> float:
    """The share of the largest logit by which two ways to compute it may differ; int8 rounds as much as bfloat16."""
    coarse = {torch.int8: "bf16", torch.bfloat16: "bf16", torch.float16: "fp16"}
    kinds = {coarse.get(p.dtype, "no") for p in model.parameters()} | {str(probe.accelerator.mixed_precision)}
    return max(ROUNDING[kind] for kind in kinds)


@contextmanager
def _at_rest(probe: Probe, model: Any) -> Iterator[None]:
    """Evaluation mode without gradients in the run's precision; the run's random numbers go on as if nothing was."""
    device = probe.accelerator.device
    with (
        torch.random.fork_rng([device] if device.type == "cuda" else []),
        torch.no_grad(),
        probe.accelerator.autocast(),
    ):
        model.eval()
        yield
    model.eval()


@dataclass(frozen=True)
class Part:
    """Tokens whose logits are looked at from the last of the first `num_prompt` on."""

    ids: Sequence[int]
    num_prompt: int


def _logits(probe: Probe, model: Any, parts: Sequence[Part]) -> Tensor:
    """(positions, vocabulary) of one part after the other, without a cache."""
    if probe.packed:
        longer = [Part([*part.ids, 0], part.num_prompt) for part in parts]  # the last token's logits count, too
        return packed_logits(model, pack(longer).to(probe.accelerator.device)).float().cpu()
    found = []
    for part in parts:
        ids, count = torch.tensor([part.ids], device=model.device), len(part.ids) - part.num_prompt + 1
        found.append(model(input_ids=ids, use_cache=False, logits_to_keep=count).logits[0, -count:].float().cpu())
    return torch.cat(found)


def _losses(probe: Probe, model: Any) -> Tensor:
    """Mean cross-entropy of every seen row, nats per token (rows,)."""
    if not probe.packed:
        return torch.tensor([_loss(probe, model, row).item() for row in probe.seen])

    def size(row: Example) -> int:
        return len(supervised(row, loss_on=probe.loss_on))

    found: list[float] = []
    for rows in bounded(probe.seen, size=size, limit=LOGITS):
        batch = pack(rows, loss_on=probe.loss_on).to(probe.accelerator.device)
        losses = cross_entropy(packed_logits(model, batch).float(), batch.labels, reduction="none")
        parts = losses.split([size(row) for row in rows])
        found += torch.stack([part.mean() for part in parts]).tolist()
    return torch.tensor(found)


def _loss(probe: Probe, model: Any, row: Example) -> Tensor:
    """Mean cross-entropy of one row, nats per token."""
    batch = pad([row], pad_id=probe.decoding.pad_id, loss_on=probe.loss_on).to(probe.accelerator.device)
    return summed_loss(model, batch) / len(batch.labels)
