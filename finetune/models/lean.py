"""LoRA in few operations: within `lean`, PEFT's LoRA layers compute what they compute otherwise, with fewer kernels.

PEFT casts A, B and its input in every layer, and a step of a small base then waits for the host that launches all of
this. Here the float32 A and B of the whole model are cast once per forward pass, and layers that read the same input
(query, key and value; gate and up) are one: W = [W_1; W_2], A = [A_1; A_2], B block-diagonal. Parameters, gradients,
optimizer states and what is saved are PEFT's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from finetune.models.factors import Stack, cast
from finetune.models.low_rank import low_rank
from finetune.models.siblings import ROOM, joined, together

PLAIN = ("layer.Linear", "bnb.Linear4bit", "bnb.Linear8bitLt")  # of peft.tuners.lora: what may be lean


@dataclass(eq=False)
class Joint:
    """Layers that are computed at once where they get the same input, often one alone; A and B are of one pass."""

    layers: Sequence[Any]
    weight: Tensor | None  # frozen (out, in), the layers' below each other; None: each layer has its own product
    room: Tensor | None  # the weight, with room that A or B are copied into: see `low_rank`
    bias: Tensor | None
    outs: tuple[slice, ...]  # each layer's rows of W and B
    ranks: tuple[slice, ...]  # and its rows of A, columns of B
    a: Tensor | None = None  # (ranks, in); None: PEFT's own forward
    b: Tensor | None = None  # (outs, ranks), scaled
    source: Tensor | None = None  # the input of which `parts` are the outputs, until the last layer has taken its
    parts: Sequence[Tensor] = ()


@contextlib.contextmanager
def lean(model: Any) -> Iterator[None]:
    """Within, layers of a PEFT model that are W x + s B A x and nothing else compute just that.

    One model at a time around the same weights: its factors are beside them.
    """
    joints: list[Joint] = []
    hooks: list[Any] = []
    head = model.get_output_embeddings()
    try:
        for layers in _groups(model):
            joints.append(_joint(layers, room=layers[0] is not head))  # a head is large, and often tied
            for place, layer in enumerate(layers):
                layer.lean, layer.forward = (joints[-1], place), MethodType(_forward, layer)
        if joints:
            # transformers' inner model: PEFT calls the forward of what it wraps, past its hooks
            hooks = [model.get_base_model().base_model.register_forward_pre_hook(_casting(joints))]
        torch.cuda.empty_cache()  # pieces as large as a weight are of no use to the next joint
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for joint in joints:
            _undo(joint)


def _casting(joints: Sequence[Joint]) -> Any:
    """A hook that gives every joint its A and B of the forward pass that begins."""
    stacks = _stacks(joints)

    def cast_all(*_: Any) -> None:
        for stack, members in stacks:
            dtype = _precision(members[0])
            factors = cast(stack, dtype=dtype) if dtype else [(None, None)] * len(members)
            for joint, (a, b) in zip(members, factors, strict=True):
                joint.a, joint.b, joint.source, joint.parts = a, b, None, ()
            if dtype:
                _fill([joint for joint in members if joint.room is not None])

    return cast_all


@torch.no_grad()
def _fill(joints: Sequence[Joint]) -> None:
    """Copy each joint's B beside its weight, or A below it. A backward pass to come needs just these, too."""
    places, factors = [], []
    for joint in joints:
        assert joint.room is not None
        assert joint.a is not None
        assert joint.b is not None
        (rank, width), outs = joint.a.shape, len(joint.b)
        wide = joint.room.shape[1] > width
        places.append(joint.room.data[:, width : width + rank] if wide else joint.room.data[outs : outs + rank])
        factors.append(joint.b if wide else joint.a)
    if joints:
        torch._foreach_copy_(places, factors)


def _groups(model: Any) -> list[list[Any]]:
    """The layers that can be lean, siblings together."""
    blocks = [dict(module.named_children()) for module in model.modules()]
    return [group for children in blocks for group in together(children, one=_plain, alike=_alike)]


def _alike(layers: Sequence[Any]) -> bool:
    return len(set(map(_kind, layers))) == 1 and _identity(layers[0])


def _plain(layer: Any) -> bool:
    """Is it W x + s B A x with a frozen W and trained float32 factors?"""
    if f"{type(layer).__module__}.{type(layer).__name__}".removeprefix("peft.tuners.lora.") not in PLAIN:
        return False
    [name, *others] = layer.active_adapters
    if others or name not in layer.lora_A or name in layer.lora_variant or layer.lora_bias[name]:
        return False
    factors = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    trained = all(f.requires_grad and f.dtype == torch.float32 for f in factors)
    frozen = not any(p.requires_grad for p in layer.base_layer.parameters())
    changed = layer.merged or layer.disable_adapters or layer.fan_in_fan_out or "forward" in vars(layer)
    return trained and frozen and not changed


def _kind(layer: Any) -> tuple[Any, ...]:
    """Layers of one kind can be joint."""
    base = layer.base_layer
    return _own(layer), layer.in_features, base.weight.device, base.weight.dtype, base.bias is None


def _own(layer: Any) -> bool:
    """Has it a product with W of its own: in four or eight bits, hooked, or beside a dropout?"""
    base = layer.base_layer
    hooked = base._forward_hooks or base._forward_pre_hooks or "forward" in vars(base)
    return type(base) is not nn.Linear or bool(hooked) or not _identity(layer)


def _identity(layer: Any) -> bool:
    """Is there no dropout?"""
    return isinstance(layer.lora_dropout[layer.active_adapters[0]], nn.Identity)


@torch.no_grad()
def _joint(layers: Sequence[Any], *, room: bool) -> Joint:
    """Layers of one kind."""
    outs, ranks = (_spans([len(factor(layer)) for layer in layers]) for factor in (_b, _a))
    bases = [layer.base_layer for layer in layers]
    weight = whole = bias = None
    if not _own(layers[0]):
        whole = joined([base.weight for base in bases], room=room)
        weight, bias = whole[: outs[-1].stop, : bases[0].in_features], bases[0].bias
        if len(bases) > 1 and bias is not None:
            bias = torch.cat([base.bias for base in bases])
        if whole.shape == weight.shape or ranks[-1].stop > ROOM or ranks[-1].stop % 8:  # rows of whole 16 bytes
            whole = None
    return Joint(layers, weight, whole, bias, outs, ranks)


def _undo(joint: Joint) -> None:
    """PEFT's forward again."""
    for layer in joint.layers:
        vars(layer).pop("lean", None)
        vars(layer).pop("forward", None)
    joint.source, joint.parts, joint.a, joint.b = None, (), None, None


def _stacks(joints: Sequence[Joint]) -> list[tuple[Stack, list[Joint]]]:
    """Joints of equal shapes, whose factors are cast together."""
    alike: dict[Any, list[Joint]] = {}
    for joint in joints:
        scales = tuple(layer.scaling[layer.active_adapters[0]] for layer in joint.layers)
        factor = _a(joint.layers[0])
        spans = [(s.start, s.stop) for s in (*joint.outs, *joint.ranks)]
        kind = (scales, *spans, factor.shape[1], factor.device, *map(_kind, joint.layers))
        alike.setdefault(kind, []).append(joint)
    return [(_stack(members, scales=scales), members) for (scales, *_), members in alike.items()]


def _stack(joints: list[Joint], *, scales: tuple[float, ...]) -> Stack:
    factors = tuple(factor(layer) for factor in (_a, _b) for joint in joints for layer in joint.layers)
    return Stack(factors, len(joints), joints[0].outs, joints[0].ranks, scales)


def _a(layer: Any) -> nn.Parameter:
    return layer.lora_A[layer.active_adapters[0]].weight


def _b(layer: Any) -> nn.Parameter:
    return layer.lora_B[layer.active_adapters[0]].weight


def _spans(sizes: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(*ends) for ends in pairwise(accumulate(sizes, initial=0)))


def _precision(joint: Joint) -> torch.dtype | None:
    """Autocast's, or else float32; None: a coarser W without autocast, which PEFT computes in two precisions."""
    device = joint.layers[0].base_layer.weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return torch.float32 if joint.weight is None or joint.weight.dtype == torch.float32 else None


def _forward(layer: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
    """What takes the place of a layer's forward."""
    joint, place = layer.lean
    if joint.a is None or args or options or layer._disable_adapters or layer.merged_adapters:
        return type(layer).forward(layer, x, *args, **options)
    if len(joint.layers) == 1:
        part = low_rank(_dropped(layer, x), _weight(joint), joint.bias, joint.a, joint.b)
    elif place == 0 or joint.source is x:
        part = _taken(joint, place, x)
    else:
        part = _alone(joint, place, x)
    if joint.weight is not None:
        return part
    found = layer.base_layer(x)
    return (found + part).to(found.dtype)


def _weight(joint: Joint) -> Tensor | None:
    return joint.weight if joint.room is None else joint.room


def _dropped(layer: Any, x: Tensor) -> Tensor:
    return layer.lora_dropout[layer.active_adapters[0]](x)


def _taken(joint: Joint, place: int, x: Tensor) -> Tensor:
    """A layer's output, which the first of them computes for all."""
    if place == 0:
        assert joint.a is not None
        assert joint.b is not None
        found = low_rank(x, _weight(joint), joint.bias, joint.a, joint.b)
        joint.source, joint.parts = x, found.split([out.stop - out.start for out in joint.outs], dim=-1)
    part = joint.parts[place]
    if place == len(joint.layers) - 1:
        joint.source, joint.parts = None, ()
    return part


def _alone(joint: Joint, place: int, x: Tensor) -> Tensor:
    """A layer's output for an input that is not the first layer's."""
    assert joint.a is not None
    assert joint.b is not None
    out, rank = joint.outs[place], joint.ranks[place]
    weight, bias = (None if w is None else w[out] for w in (joint.weight, joint.bias))
    return low_rank(x, weight, bias, joint.a[rank], joint.b[out, rank])
