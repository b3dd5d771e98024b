"""Linear layers of a block that read the same input, and weights of theirs that lie one behind the other in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called in this order
Layer = TypeVar("Layer")


def siblings(children: Mapping[str, Layer]) -> list[list[Layer]]:
    """Those of the named children that read one input, in groups of two or more."""
    groups = ([children[name] for name in names if name in children] for names in SIBLINGS)
    return [group for group in groups if len(group) > 1]


def join_siblings(model: nn.Module) -> None:
    """Lay the weights of siblings one behind the other, so that together they are one matrix without a copy."""
    for parent in model.modules():
        plain = {name: child for name, child in parent.named_children() if type(child) is nn.Linear}
        for group in siblings(plain):
            if len({(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in group}) == 1:
                joined([layer.weight for layer in group])


@torch.no_grad()
def joined(weights: Sequence[Tensor]) -> Tensor:
    """One matrix whose rows are those of the weights (out, in), which from now on lie in it."""
    first, columns = weights[0].detach(), weights[0].shape[1]
    if not _adjacent(weights):
        parts = torch.cat(list(weights)).split([len(weight) for weight in weights])
        for weight, part in zip(weights, parts, strict=True):
            weight.data = part
        first = parts[0]
    return first.as_strided((sum(map(len, weights)), columns), (columns, 1))


def _adjacent(weights: Sequence[Tensor]) -> bool:
    storage, end = weights[0].untyped_storage().data_ptr(), weights[0].storage_offset()
    for weight in weights:
        if not (weight.is_contiguous() and weight.untyped_storage().data_ptr() == storage):
            return False
        if weight.storage_offset() != end:
            return False
        end += weight.numel()
    return True
