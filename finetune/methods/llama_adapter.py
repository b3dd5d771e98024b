"""LLaMA-Adapter on every base: prompts that the last blocks attend to beside the text, through a gate that opens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import AdaptionPromptConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from finetune.data.rows import Row
from finetune.methods.blocks import attention, blocks, output_projection
from finetune.methods.method import Method

FILE = "adapter_model.safetensors"  # PEFT's names, so that it loads the file on the architectures that it knows
PREFIX = "base_model.model."


class LlamaAdapter(Method):
    """Zhang et al. 2023, arXiv:2303.16199: L (m d + 1) parameters for m prompts of width d in the last L blocks.

    A block's own projections make keys and values of its prompts; their attention, apart from the text's and without
    positions, times the block's gate is added before the output projection: what PEFT computes on Llama.
    """

    replayable = ("graph",)

    def __init__(self, *, adapter_len: int, adapter_layers: float) -> None:
        if adapter_len < 1:
            raise ValueError(f"adapter_len={adapter_len} must be at least 1")
        if adapter_layers <= 0 or (adapter_layers > 1 and adapter_layers != int(adapter_layers)):
            raise ValueError(f"adapter_layers={adapter_layers}: a share of the blocks below 1, or a number of blocks")
        self.adapter_len, self.adapter_layers = adapter_len, adapter_layers

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Freeze the base and put the prompts into its last blocks."""
        return self._insert(model)

    def save(self, model: Any, folder: Path) -> None:
        """Prompts and gates, as PEFT saves them."""
        config = AdaptionPromptConfig(
            task_type="CAUSAL_LM",
            adapter_len=self.adapter_len,
            adapter_layers=self._num_layers(model),
            target_modules="self_attn",
            base_model_name_or_path=model.name_or_path,
            inference_mode=True,
        )
        config.save_pretrained(str(folder))
        tensors = {PREFIX + name: p.detach().cpu().contiguous() for name, p in _weights(model).items()}
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    @torch.no_grad()
    def load(self, model: Any, folder: Path) -> Any:
        """Prompts in a fresh base, with the saved weights."""
        expected, saved = _weights(self._insert(model)), load_file(folder / FILE)
        if differing := sorted(saved.keys() ^ {PREFIX + name for name in expected}):
            raise ValueError(f"{folder / FILE} is of another method or base: {', '.join(differing[:4])}")
        for name, parameter in expected.items():
            parameter.copy_(saved[PREFIX + name])
        return model

    def _num_layers(self, model: Any) -> int:
        """L: a share is rounded, to one block at the least."""
        number = len(blocks(model))
        if self.adapter_layers > number:
            raise ValueError(f"adapter_layers={self.adapter_layers}, but the base has {number} blocks")
        return int(self.adapter_layers) if self.adapter_layers >= 1 else max(1, round(self.adapter_layers * number))

    def _insert(self, model: Any) -> Any:
        model.requires_grad_(False)
        for block in blocks(model)[-self._num_layers(model) :]:
            found = attention(block)
            device, width = output_projection(found).weight.device, model.config.hidden_size
            found.adaption_prompt = nn.Parameter(torch.randn(1, self.adapter_len, width, device=device))
            found.adaption_gate = nn.Parameter(torch.zeros(1, device=device))
            _listen(found)
        return model


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _listen(module: Any) -> None:
    """Catch the query and its rotation on their way, and add to what goes into the output projection."""
    seen: dict[str, Any] = {}

    def rotation(_: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen["rotation"] = kwargs.get("position_embeddings")

    def query(_: Any, args: Any, output: Tensor) -> None:
        seen["query"] = output

    def add(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        said = _said(module, _query(module, seen["query"], seen["rotation"]))
        seen.clear()  # nothing of a step outlives it
        return (args[0] + said.to(args[0].dtype), *args[1:])

    module.register_forward_pre_hook(rotation, with_kwargs=True)
    getattr(module, "query_key_value" if _fused(module) else "q_proj").register_forward_hook(query)
    output_projection(module).register_forward_pre_hook(add)


def _said(module: Any, query: Tensor) -> Tensor:
    """What the prompts say to the query (rows, heads, tokens, size), gated: (rows, tokens, heads * size)."""
    prompt = module.adaption_prompt.to(query.dtype)
    if _fused(module):
        _, key, value = _split(module, module.query_key_value(prompt))
    else:
        key, value = (_heads(module, layer(prompt)) for layer in (module.k_proj, module.v_proj))
    rows, grouped = query.shape[0], query.shape[1] != key.shape[1]
    key, value = (x.expand(rows, -1, -1, -1) for x in (key, value))
    said = scaled_dot_product_attention(query.to(value.dtype), key.to(value.dtype), value, enable_gqa=grouped)
    return module.adaption_gate * said.transpose(1, 2).flatten(2)


def _query(module: Any, projected: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """The query (rows, heads, tokens, size) as the text's attention has it: rotated, where the base rotates."""
    if _fused(module):
        return _split(module, projected)[0]
    query = _heads(module, projected)
    if rotation is None:
        return query
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb  # GLM's pairs and shares differ from Llama's
    rotated: Tensor = rotate(query, query[:, :1], *rotation)[0]
    return rotated


def _fused(module: Any) -> bool:
    return hasattr(module, "query_key_value")


def _heads(module: Any, projected: Tensor) -> Tensor:
    """(rows, tokens, heads * size) -> (rows, heads, tokens, size)."""
    return projected.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)


def _split(module: Any, fused: Tensor) -> tuple[Tensor, ...]:
    """BLOOM's query, key and value, which lie side by side in each head."""
    return fused.unflatten(-1, (-1, 3, module.head_dim)).permute(3, 0, 2, 1, 4).unbind(0)
