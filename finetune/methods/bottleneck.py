"""Bottleneck adapters: small trained networks after, or beside, the sublayers of a frozen base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN

from finetune.data.rows import Row
from finetune.methods import weights
from finetune.methods.blocks import attention, blocks, feed_forward, output_projection
from finetune.methods.method import Method

PLACES = ("attention", "feed_forward")


class Bottleneck(nn.Module):
    """Down to `size`, a non-linearity, up again; zero at the start, because the way up starts at zero."""

    def __init__(self, width: int, size: int, *, activation: str, scale: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, size), nn.Linear(size, width)
        self.activation, self.scale = ACT2FN[activation], scale
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added: the shape and type of `hidden` (..., width)."""
        inner = self.activation(self.down(hidden.to(self.down.weight.dtype)))
        return (self.scale * self.up(inner)).to(hidden.dtype)


class Adapter(Method):
    """Houlsby et al. 2019, arXiv:1902.00751; one place: Pfeiffer et al. 2021, arXiv:2005.00247; parallel: He et al.
    2022, arXiv:2110.04366.

    Trains blocks x places x (2 d m + d + m) parameters for hidden size d and bottleneck m; the layer norms stay frozen.
    In series h + f(h) of a sublayer's output h, in parallel sublayer(x) + scale * f(x).
    """

    replayable = ("graph",)

    def __init__(
        self, *, size: int, places: Sequence[str], activation: str, parallel: bool = False, scale: float = 1.0
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        if not places or any(place not in PLACES for place in places):
            raise ValueError(f"places={list(places)}: the choices are {', '.join(PLACES)}")
        if activation not in ACT2FN:
            raise ValueError(f"activation={activation}: the choices are {', '.join(sorted(ACT2FN))}")
        if parallel and "attention" in places:
            raise ValueError("parallel=true: parallel adapters stand beside the feed-forward only")
        self.size, self.places, self.parallel = size, tuple(places), parallel
        self.options: dict[str, Any] = {"activation": activation, "scale": scale}

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Freeze the base and put the adapters in."""
        return self._insert(model)

    def save(self, model: Any, folder: Path) -> None:
        """The adapters alone."""
        weights.write(model, folder)

    def load(self, model: Any, folder: Path) -> Any:
        """Adapters in a fresh base, with the saved weights."""
        return weights.read(self._insert(model), folder)

    def _insert(self, model: Any) -> Any:
        model.requires_grad_(False)
        for block in blocks(model):
            for place in self.places:
                sublayer = attention(block) if place == "attention" else feed_forward(block)
                layer = output_projection(sublayer)
                host: nn.Module = sublayer if self.parallel else layer
                adapter = Bottleneck(layer.out_features, self.size, **self.options)
                host.add_module("adapter", adapter.to(layer.weight.device))
                host.register_forward_hook(_beside if self.parallel else _after)
        return model


def _after(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output + module.adapter(output)


def _beside(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output + module.adapter(inputs[0])
