"""The base that a process keeps between its runs: each run gets a copy of the modules around the same frozen weights.

What a method wraps, replaces or hooks is the copy's. A run that moves the weights themselves gets a base of its own.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from finetune.memory import forget_peaks, free
from finetune.models import sources
from finetune.models.load import Base, load
from finetune.models.siblings import join_siblings
from finetune.probe import checksum

log = logging.getLogger("finetune")

SHARED = (None, "nf4")  # int8 layers keep parts of their weights outside of parameters


class Shelf:
    """Room for one base."""

    def __init__(self) -> None:
        self.key = ""
        self.base: Base | None = None
        self.sums: list[int] = []

    def load(self, model: Mapping[str, Any], *, intact: bool, **how: Any) -> Base:
        """`models.load.load`, from memory where it can be; `intact`: the run leaves the weights as they are."""
        if not intact or how["quantize"] not in SHARED:
            self.clear()
            return load(model, **how)
        key = _key(model, how)
        if key != self.key or self.base is None:
            self.clear()
            self.base, self.key = load(model, **how), key
            join_siblings(self.base.model)  # while nobody else holds the weights: no run needs a copy
            self.sums = _sums(self.base.model)
        return replace(self.base, model=_around_the_same_weights(self.base.model))

    def check(self) -> None:
        """Between two runs: forget a base whose weights the last one changed after all."""
        if self.base and _sums(self.base.model) != self.sums:
            log.warning("the last run changed the weights of %s, which is read again", self.base.source)
            self.clear()

    def clear(self) -> None:
        """Forget the base, and give its memory back; the run that asks for another never needed it."""
        held = self.base is not None
        self.base, self.key, self.sums = None, "", []
        free()
        if held:
            forget_peaks()


def _key(model: Mapping[str, Any], how: Mapping[str, Any]) -> str:
    """What makes two bases the same: how they are asked for, and the weights that lie there now."""
    source = sources.resolve(model, scale=how["scale"], log=how["log"])
    asked = {name: value for name, value in how.items() if name != "log"}
    return json.dumps([dict(model), asked, source.name, sources.weights_hash(source)], sort_keys=True, default=str)


def _sums(model: nn.Module) -> list[int]:
    return [checksum(parameter) for parameter in model.parameters()]


def _around_the_same_weights(model: Any) -> Any:
    """A copy of the modules; its parameters are objects of their own, but lie in the same memory."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        plain = type(parameter) is nn.Parameter
        memo[id(parameter)] = nn.Parameter(parameter.data, parameter.requires_grad) if plain else parameter
        vars(memo[id(parameter)]).update(vars(parameter))  # whose matrix it lies in
    return copy.deepcopy(model, memo)
