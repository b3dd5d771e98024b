"""Linear layers of a block that read the same input, and weights that lie one behind the other in memory.

Where a weight (out, in) is far from square there is room beside it, for what `finetune.models.low_rank` writes there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # called in this order
ROOM = 64  # columns beside a wide matrix, rows below a tall one; of 7B's weights 1.3 %
Layer = TypeVar("Layer")


def siblings(children: Mapping[str, Layer]) -> list[list[Layer]]:
    """Those of the named children that read one input, in groups of two or more."""
    groups = ([children[name] for name in names if name in children] for names in SIBLINGS)
    return [group for group in groups if len(group) > 1]


def together(
    children: Mapping[str, Any], *, one: Callable[[Any], bool], alike: Callable[[list[Any]], bool]
) -> list[list[Any]]:
    """A block's layers that are `one`: siblings together, if all of them are and they are `alike`, each other alone.

    Part of a group would be copied: the weights of all lie together.
    """
    groups = [group for group in siblings(children) if all(map(one, group)) and alike(group)]
    found = {id(layer) for group in groups for layer in group}
    return [*groups, *([layer] for layer in children.values() if one(layer) and id(layer) not in found)]


def join_siblings(model: Any) -> None:
    """Lay the weights of siblings one behind the other, with their room, so that no run needs a copy of them.

    `save_pretrained` does not take weights that lie so.
    """
    head = model.get_output_embeddings()
    for parent in model.modules():
        for group in together(
            dict(parent.named_children()), one=lambda c: type(c) is nn.Linear and c is not head, alike=_alike
        ):
            joined([layer.weight for layer in group])


def _alike(layers: Sequence[nn.Linear]) -> bool:
    return len({(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}) == 1


@torch.no_grad()
def joined(weights: Sequence[Any], *, room: bool = True) -> Tensor:
    """One matrix whose rows are those of the weights (out, in), which from now on lie in it, and their room.

    (outs, in + ROOM) if it has at least twice as many rows as columns, (outs + ROOM, in) if half as many.
    """
    outs, width = sum(map(len, weights)), weights[0].shape[1]
    shape = outs + ROOM * (room and width >= 2 * outs), width + ROOM * (room and outs >= 2 * width)
    if len(weights) == 1 and (shape == weights[0].shape or getattr(weights[0], "outs", outs) != outs):
        return weights[0].detach()  # no room, or one of others' matrix
    if not _lie_in(weights, outs, shape):
        whole = weights[0].new_zeros(shape)
        for weight, part in zip(weights, whole[:outs, :width].split([len(weight) for weight in weights]), strict=True):
            weight.data, weight.outs = part.copy_(weight), outs
    return weights[0].detach().as_strided(shape, (shape[1], 1))


def _lie_in(weights: Sequence[Any], outs: int, shape: tuple[int, int]) -> bool:
    """Are they, in this order, the first `outs` rows of a matrix of this shape, and that all of their memory?"""
    storage, size = weights[0].untyped_storage(), weights[0].element_size()
    place = storage.data_ptr()
    for weight in weights:
        if (weight.data_ptr(), weight.stride(), getattr(weight, "outs", 0)) != (place, (shape[1], 1), outs):
            return False
        place += len(weight) * shape[1] * size
    return storage.nbytes() == shape[0] * shape[1] * size
