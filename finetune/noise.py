"""NEFTune: noise on the embeddings of training rows (Jain et al. 2023, arXiv:2310.05914)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from finetune.data.batches import Batch


@contextlib.contextmanager
def noisy(model: Any, batch: Batch, *, alpha: float | None) -> Iterator[None]:
    """Within, embeddings of the batch get fresh uniform noise in +-alpha / sqrt(L d): L tokens of the row, width d.

    Only a lookup of the batch's own ids is changed: virtual tokens are not. Outside nothing is; None is no noise.
    """
    if alpha is None:
        yield
        return
    bounds = _bounds(batch, alpha=alpha)

    def add(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if inputs[0].shape != batch.ids.shape:
            return output
        return output + (2 * torch.rand_like(output) - 1) * (bounds / output.shape[-1] ** 0.5).to(output.dtype)

    handle = model.get_input_embeddings().register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _bounds(batch: Batch, *, alpha: float) -> Tensor:
    """alpha / sqrt(L) of every token (rows, length, 1), 0 where there is padding."""
    if batch.bounds is not None:
        lengths = batch.bounds.diff()  # (rows,)
        tokens = torch.repeat_interleave(lengths, lengths, output_size=batch.ids.shape[1])
        return (alpha / tokens.float().sqrt())[None, :, None]
    assert batch.mask is not None
    return (alpha / batch.mask.sum(dim=1, keepdim=True).float().sqrt() * batch.mask)[:, :, None]
