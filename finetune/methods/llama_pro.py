"""LLaMA-Pro: a base grows by copies of its own blocks, and only the copies learn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn

from finetune.data.rows import Row
from finetune.methods import weights
from finetune.methods.blocks import attention, blocks, feed_forward, output_projection
from finetune.methods.method import Method


class LlamaPro(Method):
    """Block expansion (Wu et al. 2024, arXiv:2401.02415): after every `every` blocks, and after the last, a copy.

    A copy's output projections start at zero, so it starts as the identity. Trains ceil(L / every) x P parameters for
    L blocks of P (Llama: P = 2 d q + 2 d k + 3 d f + 2 d for width d, queries q, keys k, feed-forward f).
    """

    leaves_base_intact = False  # the base grows

    def __init__(self, *, every: int) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.every = every

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Freeze the base and grow it."""
        return self._grow(model)

    def save(self, model: Any, folder: Path) -> None:
        """The copies alone."""
        weights.write(model, folder)

    def load(self, model: Any, folder: Path) -> Any:
        """A fresh base, grown, with the saved copies."""
        return weights.read(self._grow(model), folder)

    def _grow(self, model: Any) -> Any:
        model.requires_grad_(False)
        found = blocks(model)
        places = [n for n in range(len(found)) if (n + 1) % self.every == 0 or n + 1 == len(found)]
        types = list(getattr(model.config, "layer_types", None) or [])
        for n in reversed(places):
            found.insert(n + 1, _identity(found[n], config=model.config).requires_grad_(True))
            types[n + 1 : n + 1] = types[n : n + 1]
        _renumber(model, found, types)
        return model


def _identity(block: nn.Module, *, config: Any) -> nn.Module:
    """A copy in full precision that adds nothing to its input; it shares the base's `config`."""
    if getattr(config, "apply_residual_connection_post_layernorm", False):
        raise ValueError("the residual is taken after the layer norm, so no block can start as the identity")
    twin = copy.deepcopy(block, {id(config): config})
    for name, layer in list(twin.named_modules()):
        if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
            parent, _, last = name.rpartition(".")
            setattr(twin.get_submodule(parent), last, _dequantized(layer))
    for sublayer in (attention(twin), feed_forward(twin)):
        for parameter in output_projection(sublayer).parameters():
            nn.init.zeros_(parameter)
    return twin


def _dequantized(layer: Any) -> nn.Linear:
    """A linear layer with the weights that a quantized one stands for."""
    weight = dequantize_module_weight(layer)
    bias = layer.bias is not None
    plain = nn.Linear(layer.in_features, layer.out_features, bias, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        plain.weight.copy_(weight)
        if bias:
            plain.bias.copy_(layer.bias)
    return plain


def _renumber(model: Any, found: nn.ModuleList, types: list[str]) -> None:
    """Give every block its own place in the KV cache, which is made from the configuration."""
    for number, block in enumerate(found):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number  # type: ignore[assignment]
    if types:
        model.config.layer_types = types
    model.config.num_hidden_layers = len(found)
