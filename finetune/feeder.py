"""Rows -> batches -> losses, the same for training and for measuring."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from finetune.data.batches import Batch, Example, bounded, group, pack, pad
from finetune.models.attention import packing
from finetune.models.head import MOST_LOGITS, loss_of

# Tokens of one pack: on a CPU more do not run faster; below 16 k a small base is bound by the host's launches on a GPU.
PACK_TOKENS = {"cpu": 4096, "cuda": 32768}
MEASURED_TOKENS = 16384  # of a batch without gradients: more are no faster, and training left less room


@dataclass(frozen=True)
class Feeder:
    """How rows become batches for one model: packed where the base and the method allow it, else padded."""

    packed: bool
    pad_id: int
    loss_on: str
    device: torch.device
    max_tokens: int | None = None  # of a batch of several rows, padding included; set where memory ran out
    halvings: int = 0  # how often it did

    def batches(self, examples: Sequence[Example]) -> list[Batch]:
        """Batches of one forward pass each that hold all of `examples`."""
        if self.packed:
            found = [pack(part, loss_on=self.loss_on) for part in self.packs(examples)]
        else:
            parts = (part for rows in group(examples) for part in _bounded_rows(rows, limit=self.max_tokens))
            found = [pad(part, pad_id=self.pad_id, loss_on=self.loss_on) for part in parts]
        return [batch.to(self.device) for batch in found]

    def packs(self, examples: Sequence[Example]) -> list[list[Example]]:
        """The rows of every pack."""
        return list(bounded(examples, size=lambda row: len(row.ids), limit=self.most_tokens))

    @property
    def most_tokens(self) -> int:
        """Of a pack of several rows."""
        return self.max_tokens or PACK_TOKENS[self.device.type]


def summed_loss(model: nn.Module, batch: Batch, *, most: int = MOST_LOGITS) -> Tensor:
    """Cross-entropy in nats, summed over the batch's supervised tokens, in float32; `most` logits at once."""
    packed = batch.bounds is not None
    padded = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False}
    given = _packed_inputs(batch) if packed else padded

    def select(found: Tensor) -> Tensor:
        return found[0] if packed else found[:, -batch.longest :].flatten(0, 1)[batch.kept]  # virtual tokens come first

    def forward() -> Tensor:
        logits: Tensor = model(**given).logits
        return logits

    return loss_of(model, labels=batch.labels, select=select, forward=forward, most=most)


def packed_logits(model: Any, batch: Batch) -> Tensor:
    """(supervised, vocabulary) of a pack."""
    with packing(model):
        found: Tensor = model(**_packed_inputs(batch)).logits[0]
    return found


def _packed_inputs(batch: Batch) -> dict[str, Any]:
    """What a model that attends by rows is given."""
    return {
        "input_ids": batch.ids,
        "position_ids": batch.positions,
        "use_cache": False,
        "logits_to_keep": batch.kept,
        "cu_seq_lens_q": batch.bounds,
        "cu_seq_lens_k": batch.bounds,
        "max_length_q": batch.longest,
        "max_length_k": batch.longest,
    }


def mean_loss(model: nn.Module, examples: Sequence[Example], *, feeder: Feeder, accelerator: Accelerator) -> float:
    """Mean cross-entropy in nats per supervised token over all processes' shares of `examples`."""
    rank, ranks = accelerator.process_index, accelerator.num_processes
    model.eval()
    base, losses, count = accelerator.unwrap_model(model), list[Tensor](), 0
    feeder = replace(feeder, max_tokens=min(feeder.most_tokens, MEASURED_TOKENS))
    with torch.no_grad(), attending_rows(base, feeder):
        for batch in feeder.batches(examples[rank::ranks]):
            losses.append(summed_loss(base, batch))
            count += len(batch.labels)
    model.train()
    total = [sum(map(float, losses)), count]  # read at the end: the device works while the host prepares
    total = accelerator.reduce(torch.tensor(total, dtype=torch.float32, device=accelerator.device)).tolist()
    return total[0] / total[1]


def attending_rows(base: Any, feeder: Feeder) -> contextlib.AbstractContextManager[None]:
    """Within, packed rows attend to themselves only."""
    return packing(base) if feeder.packed else contextlib.nullcontext()


def _bounded_rows(examples: Sequence[Example], *, limit: int | None) -> Iterator[Sequence[Example]]:
    """Rows sorted by length, cut so that a padded batch of several is of bounded size."""
    size = len(examples) if limit is None else max(1, limit // len(examples[-1].ids))
    return (examples[i : i + size] for i in range(0, len(examples), size))
