"""The contract of a method: how a base becomes a model to train, and what happens around its steps.

`train` names no method: what one method needs is a hook here, with a default that does nothing.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from finetune.data.batches import Example
from finetune.data.rows import Row

Encode = Callable[[Sequence[Row]], Sequence[Example]]  # rows -> token ids, each part within its limit


@dataclass(frozen=True)
class Finding:
    """What a check found: `ok` is None where it does not apply; the note says why, or gives the numbers."""

    ok: bool | None
    note: str


class Method(ABC):
    """A way to tune a base."""

    trains = True  # False: nothing is trained, the base answers as it is
    answers = False  # True: it answers by itself (`fit`, `predict`), so that the base's own loss says nothing
    leaves_base_intact = True  # False: the base's own weights change (full tuning); they are then kept in float32
    starts_as_base = True  # False: differs from the base before the first step (virtual tokens, random factors)
    padding_free = True  # False: its rows are padded
    # What was compared with its eager form on a GPU: steps as CUDA "graph"s, of "compiled" layers; answers, "decode".
    replayable: Collection[str] = ()
    checkpointable = True  # False: cannot recompute activations in the backward pass

    def rows(self, rows: Sequence[Row], train_rows: Sequence[Row], *, fits: Callable[[Row], bool]) -> Sequence[Row]:
        """The rows as they are asked, in their order; `fits` tells whether a row's prompt keeps its limit."""
        return rows

    def notes(self) -> dict[str, int]:
        """Counts of what `rows` did, for environment.json."""
        return {}

    @abstractmethod
    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Return the model to train; exactly the method's weights require gradients. The seed is set just before."""

    def unanswerable(self, train_rows: Sequence[Row]) -> dict[str, str]:
        """Tasks whose rows this method cannot answer, and why."""
        return {}

    def fit(self, model: Any, rows: Sequence[Row], *, encode: Encode, lr: float) -> int:
        """Learn without a gradient loop; returns how many parameters were learnt outside of the model."""
        return 0

    def predict(self, model: Any, rows: Sequence[Row], *, encode: Encode) -> list[str] | None:
        """An answer to each row; None: the model generates them."""
        return None

    def parameter_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return [{"params": list(trainable(model)), "lr": lr}]

    def lean(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Entered for all steps and all answers, the model on its device: other ways to compute the same."""
        return contextlib.nullcontext()

    def penalty(self, model: nn.Module) -> Tensor | float:
        """A term that is added to every step's mean loss."""
        return 0.0

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after optimizer step `step` (from 1), the gradients still there."""

    def check(self, model: Any) -> Finding | None:
        """What only this method can tell of whether it took effect, asked of the tuned model."""
        return None

    def prefix_kv(self, model: Any) -> Tensor | None:
        """(layers, 2, key heads, virtual tokens, size): the keys and values that every row's cache begins with."""
        return None

    def state(self) -> dict[str, Any]:
        """What steps change beside parameters that require gradients and buffers: numbers, texts, tensors, nested."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Put a `state` back, its tensors on the CPU, after `attach`."""

    def save(self, model: Any, folder: Path) -> None:
        """Write the trained weights as safetensors."""

    def load(self, model: Any, folder: Path) -> Any:
        """Put the weights of `folder` onto a fresh base; return the tuned model."""
        return model


def trainable(model: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters that require gradients."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)
