"""Where things are in a base: its transformer blocks, and the projections by which a block writes into its stream."""

from __future__ import annotations

from typing import Any

from torch import nn


def blocks(model: Any) -> nn.ModuleList:
    """The transformer blocks of a base, first to last."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == model.config.num_hidden_layers]
    found = [m for m in lists if all(hasattr(block, "mlp") for block in m)]
    if len(found) != 1:
        raise ValueError(f"{type(model).__name__}: expected one list of transformer blocks, found {len(found)}")
    return found[0]


def attention(block: nn.Module) -> nn.Module:
    """The block's attention."""
    return block.get_submodule("self_attn" if hasattr(block, "self_attn") else "self_attention")


def feed_forward(block: nn.Module) -> nn.Module:
    """The block's feed-forward network."""
    return block.get_submodule("mlp")


def output_projection(sublayer: nn.Module) -> nn.Linear:
    """The last linear layer of an attention or feed-forward: what it returns is added to the residual stream.

    BLOOM adds the residual inside its sublayers, so this layer's output is the sublayer's own on every base.
    """
    if getattr(sublayer, "pretraining_tp", 1) > 1 and getattr(sublayer, "slow_but_exact", False):
        raise ValueError("slow_but_exact=True computes with slices of the weights and bypasses the layer; set it False")
    return [m for m in sublayer.modules() if isinstance(m, nn.Linear)][-1]
