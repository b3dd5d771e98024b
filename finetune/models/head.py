"""The loss of a base where its head is: logits of supervised positions only, and never many of them at once.

Logits cost more than anything else of a pack. 32768 tokens of which 15 % are supervised are 4900 positions; with a
vocabulary of 151936 their logits are 0.75 G numbers, of which a cross-entropy in float32 over bfloat16 logits holds
about 10 bytes each at its peak (logits, their copy in float32 and the logarithms of the softmax): 7.5 GB. In parts of
at most 2^27 numbers it is 1.3 GB whatever the pack holds, and one gradient of the hidden states beside it (9 MB for a
width of 896). Compiled, it is 4 bytes.

For the time of a forward pass the head's `forward` gives the loss, so that it is computed inside of whatever wraps the
base: autocast, PEFT's hooks, several processes' gradient averaging.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

IGNORED = -100  # a label that does not count
MOST_LOGITS = 2**27  # numbers at once: 883 positions of a vocabulary of 151936
# Heads whose logits the base goes on to change (Cohere scales them, Gemma 2 caps them), or that it does not call.
_others: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_compiling = ContextVar("compiling", default=False)

Select = Callable[[Tensor], Tensor]  # hidden states as the head gets them -> (positions, width)


def loss_of(
    model: Any, *, labels: Tensor, select: Select, forward: Callable[[], Tensor], most: int = MOST_LOGITS
) -> Tensor:
    """Summed cross-entropy in nats of `labels` (positions,), in float32; `forward` runs the model for its logits.

    `select` finds the positions among hidden states or logits; a label of -100 does not count.
    """
    head = getattr(model, "module", model).get_output_embeddings()  # of several processes' model
    if head is not None and head not in _others:
        with _at(head, labels=labels, select=select, most=most) as said:
            found = forward()
        # What the base does to its logits makes another tensor of them, or another version of this one.
        if len(said) == 1 and found is said[0] and not found._version:
            return found.sum()
        _others.add(head)
    return _cross_entropy(select(forward()), labels)


@contextlib.contextmanager
def _at(head: Any, *, labels: Tensor, select: Select, most: int) -> Iterator[list[Tensor]]:
    """Within, the head gives the loss in the place of logits; all that it gave."""
    before = vars(head).get("forward")
    # A lean layer adds its gradients to its weights by itself, unscaled; PEFT's own forward leaves them to autograd.
    own = MethodType(type(head).forward, head) if hasattr(head, "lean") else head.forward
    said: list[Tensor] = []

    def forward(hidden: Tensor) -> Tensor:
        said.append(_summed(head, own, select(hidden), labels, most=most)[None, None])
        return said[-1]

    head.forward = forward
    try:
        yield said
    finally:
        del head.forward
        if before is not None:
            head.forward = before


def _summed(head: Any, own: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, *, most: int) -> Tensor:
    """The loss of hidden states (positions, width), in as many parts as are needed."""
    num_parts = max(1, -(-len(labels) * len(getattr(head, "weight", ())) // most))
    weights = [weight for weight in head.parameters() if weight.requires_grad]
    if num_parts == 1 and weights:  # their gradients are as large as the logits, and in float16 want the loss's scale
        return _cross_entropy(own(hidden), labels)
    size = -(-len(labels) // num_parts)
    if torch.is_grad_enabled() and (weights or hidden.requires_grad):
        found: Tensor = _InParts.apply(own, labels, size, hidden, *weights)
        return found
    parts = zip(hidden.split(size), labels.split(size), strict=True)
    return torch.stack([_cross_entropy(own(part), some) for part, some in parts]).sum()


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")


@contextlib.contextmanager
def compiled_loss() -> Iterator[None]:
    """Within, the cross-entropy and its gradient are compiled into kernels that read the logits twice."""
    token = _compiling.set(True)
    try:
        yield
    finally:
        _compiling.reset(token)


def _with_slope(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of logits (positions, vocabulary), and its gradient softmax - 1 in their precision."""
    logs = log_softmax(logits, -1, dtype=torch.float32)
    counts = (labels != IGNORED)[:, None]
    at = labels[:, None].where(counts, 0)
    own = logs.gather(1, at).masked_fill(~counts, 0)
    slope = logs.exp_().to(logits.dtype).masked_fill_(~counts, 0)
    return -own.sum(), slope.scatter_(1, at, own.expm1().to(slope.dtype))  # not softmax - 1: it would round twice


@functools.cache
def _compiled() -> Any:
    return torch.compile(_with_slope)


def _compiled_with_slope(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`_with_slope`, one compiled function for any number of positions."""
    for tensor in (logits, labels):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    found: tuple[Tensor, Tensor] = _compiled()(logits, labels)
    return found


class _InParts(torch.autograd.Function):
    """Gradients are computed with the loss, part by part, and scaled in the backward pass: nothing is done twice."""

    @staticmethod
    def forward(ctx: Any, own: Any, labels: Tensor, size: int, hidden: Tensor, *weights: Tensor) -> Tensor:
        """The summed loss of `hidden` (positions, width)."""
        both = _compiled_with_slope if _compiling.get() else _with_slope
        losses: list[Tensor] = []
        slopes: list[Tensor] = []  # of the hidden states
        sums: list[Tensor | None] = [None] * len(weights)
        for part, some in zip(hidden.split(size), labels.split(size), strict=True):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                logits = own(part)
            loss, slope = both(logits.detach(), some)
            slope, *others = torch.autograd.grad(logits, [part, *weights], slope)
            losses.append(loss)
            del logits
            slopes.append(slope)
            sums = [new if old is None else old.add_(new) for old, new in zip(sums, others, strict=True)]
        ctx.save_for_backward(torch.cat(slopes), *sums)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """`scale` times the gradients."""
        return None, None, None, *(found * scale for found in ctx.saved_tensors)
