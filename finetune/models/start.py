"""The start of the miniatures: weights that already copy, before the first step.

Copying (attend to what followed the last occurrence of this token) took a prototype far more tokens than a minute on
a CPU has: after 600 steps of 1024 tokens repeated lists were still guessed. Every base here is of a real architecture
and trains all its weights, but starts as the circuit that long training finds (Olsson et al. 2022, arXiv:2209.11895):
the first layer notes the previous token, the second looks for its own token among the notes and writes what it finds.
Trockman & Kolter 2023 (arXiv:2305.09828) start attention from such products, too.

Shapes: h heads, d numbers a head, w width.
"""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

CONSTANT = 4.0  # the first number of every embedding: gives attention without biases a constant to turn by
NEAR = 8.0  # logit of each of the four fastest pairs for the previous token
MATCH = 2.5  # scale of the match: the same token stands far above any other
COPY = 2.0  # size of what is written, in embeddings
HEAD = 0.15  # output embeddings in input embeddings: logits of about 10 for what is copied
STILL = 0.02  # radians a token: pairs that turn less still match at a distance of 50
# ALiBi with four heads sees only recent averages; summed with these weights (least squares over 80 tokens) they hold
# this token 0.675, the one before 0.487, then 0.344, 0.236, ...; this token is known and taken off again.
ALIBI_HEADS, ALIBI_SELF, ALIBI_PREVIOUS = (4.24, -5.94, 6.93, -3.49), 0.675, 0.487


@dataclasses.dataclass(frozen=True)
class Attention:
    """Views of one layer's projections: q, k, v (h, d, w) and o (w, h, d)."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor


@torch.no_grad()
def copying(model: Any) -> None:
    """Give the first two layers, the embeddings and the output the start that copies."""
    first, second = (_attention(model, layer=layer) for layer in (0, 1))
    width = first.o.shape[0]
    embeddings = model.get_input_embeddings().weight
    embeddings.normal_()
    note, spell = _orthogonal(width), _orthogonal(width)
    model.get_output_embeddings().weight.copy_(HEAD * embeddings @ spell)
    content = _orthogonal(width)
    pairs = _pairs(model, size=first.q.shape[1])
    if pairs:
        embeddings[:, 0] = CONSTANT
        content[:, 0] = 0
        _look_back(first, pairs=pairs)
        _carry(first, content=content, into=note)
        unmixed = note.T
    else:
        content = content[: first.q.shape[1]].repeat(len(ALIBI_HEADS), 1)  # the same for each head
        _carry(first, content=content, into=note, weights=ALIBI_HEADS)
        unmixed = (note.T - ALIBI_SELF * torch.eye(width)) / ALIBI_PREVIOUS
    still = [dim for dim in range(first.q.shape[1]) if all(dim not in pair[:2] or pair[2] < STILL for pair in pairs)]
    _match(second, content=content, dims=still, unmixed=unmixed)
    _carry(second, content=_orthogonal(width), into=COPY * spell.T)


def _orthogonal(size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size))[0]


def _attention(model: Any, *, layer: int) -> Attention:
    config = model.config
    heads = config.num_attention_heads
    if config.model_type == "bloom":
        block = model.transformer.h[layer].self_attention
        fused = block.query_key_value.weight.view(heads, 3, -1, config.hidden_size)
        q, k, v, o = fused[:, 0], fused[:, 1], fused[:, 2], block.dense.weight
    else:
        block = model.model.layers[layer].self_attn
        q, k, v = (
            p.weight.view(-1, block.head_dim, config.hidden_size) for p in (block.q_proj, block.k_proj, block.v_proj)
        )
        o = block.o_proj.weight
    return Attention(q=q, k=k, v=v, o=o.view(config.hidden_size, heads, -1))


def _pairs(model: Any, *, size: int) -> list[tuple[int, int, float]]:
    """The rotary pairs of a head as (dim, dim, radians a token), the fastest first; none with ALiBi."""
    if model.config.model_type == "bloom":
        return []
    speeds = model.model.rotary_emb.inv_freq.tolist()
    if model.config.model_type == "glm":  # neighbours turn together, and only half of a head turns
        return [(2 * i, 2 * i + 1, speed) for i, speed in enumerate(speeds)]
    return [(i, i + size // 2, speed) for i, speed in enumerate(speeds)]


def _look_back(layer: Attention, *, pairs: list[tuple[int, int, float]]) -> None:
    """Every head attends to the token before, by position alone."""
    size, width = layer.q.shape[1:]
    norm = CONSTANT / math.sqrt(1 + CONSTANT**2 / width)  # the constant after RMSNorm
    amplitude = math.sqrt(NEAR * math.sqrt(size)) / norm
    layer.q.mul_(0.1)
    layer.k.mul_(0.1)
    for left, right, speed in pairs[:4]:
        layer.k[:, left, 0] = amplitude
        layer.q[:, left, 0] = amplitude * math.cos(speed)
        layer.q[:, right, 0] = -amplitude * math.sin(speed)


def _carry(layer: Attention, *, content: Tensor, into: Tensor, weights: tuple[float, ...] = ()) -> None:
    """Each value head takes its own rows of `content` and writes them turned by `into`, times its weight."""
    heads, groups, size = layer.q.shape[0], layer.v.shape[0], layer.v.shape[1]
    for head in range(heads):
        group = head * groups // heads
        rows = content[group * size : (group + 1) * size]
        layer.v[group] = rows
        layer.o[:, head] = into @ rows.T * (weights[head] if weights else groups / heads)


def _match(layer: Attention, *, content: Tensor, dims: list[int], unmixed: Tensor) -> None:
    """A token's query meets the keys of tokens whose note is that token; only dims that turn little take part."""
    heads, groups, size = layer.q.shape[0], layer.k.shape[0], layer.k.shape[1]
    layer.q.mul_(0.3)
    layer.k.mul_(0.3)
    for head in range(heads):
        group = head * groups // heads
        rows = content[group * size : group * size + len(dims)]
        layer.q[head, dims] = MATCH * rows
        layer.k[group, dims] = MATCH * rows @ unmixed
