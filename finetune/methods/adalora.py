"""AdaLoRA with its schedule in shares of a run, and its importances in few operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from finetune.data.rows import Row
from finetune.methods.method import Finding, Method

IMPORTANCES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # by parameter: plain dicts of PEFT's rank allocator


class AdaLora(Method):
    """AdaLoRA with the schedule given as shares of the run (Zhang et al. 2023, arXiv:2303.10512).

    `tinit` and `tfinal` are the shares of the steps before pruning starts and after it has ended.
    """

    replayable = ("graph",)

    def __init__(self, *, tinit: float, tfinal: float, orth_reg_weight: float, **arguments: Any) -> None:
        if not (tinit >= 0 and tfinal >= 0 and tinit + tfinal < 1):
            raise ValueError(f"tinit={tinit} and tfinal={tfinal} are shares of the steps and must sum to less than 1")
        self.shares = (tinit, tfinal)
        self.weight = orth_reg_weight
        self.model: Any = None
        self.weights: dict[str, nn.Parameter] = {}  # that are trained: A, E and B of every layer
        self.arguments = arguments
        AdaLoraConfig(total_step=10, tinit=1, tfinal=1, **arguments)  # refuses what PEFT does not know

    def attach(self, model: Any, *, tokenizer: Any, num_steps: int, train_rows: Sequence[Row]) -> Any:
        """Wrap the base; the budget follows the run's optimizer steps."""
        tinit, tfinal = (round(share * num_steps) for share in self.shares)
        schedule: dict[str, Any] = {
            "total_step": num_steps,
            "tinit": tinit,
            "tfinal": tfinal,
            "orth_reg_weight": self.weight,
        }
        self.model = get_peft_model(model, AdaLoraConfig(**schedule, **self.arguments))
        named = self.model.base_model.model.named_parameters()
        self.weights = {name: weight for name, weight in named if weight.requires_grad}
        # PEFT's take thousands of small operations a step, which a GPU waits for.
        self.allocator.update_ipt = lambda _: self._weigh()
        self.allocator.mask_using_rank_pattern = lambda _, pattern: self._mask(pattern)
        return self.model

    @property
    def allocator(self) -> Any:
        """PEFT's, which decides on the ranks."""
        return self.model.base_model.rankallocator

    def state(self) -> dict[str, Any]:
        """Importances, their averages, and the ranks that are kept."""
        averages = {name: getattr(self.allocator, name) for name in IMPORTANCES}
        return {**averages, "rank_pattern": self.model.peft_config["default"].rank_pattern}

    def restore(self, state: dict[str, Any]) -> None:
        """Undo `state`."""
        for name in IMPORTANCES:
            tensors = {key: tensor.to(self.model.device) for key, tensor in state[name].items()}
            setattr(self.allocator, name, tensors)
        self.model.peft_config["default"].rank_pattern = state["rank_pattern"]

    def penalty(self, model: nn.Module) -> Tensor | float:
        """Mean of |P^T P - I| + |Q Q^T - I| over the layers' factors (eq. 4); PEFT adds it to its own loss only."""
        named = self.weights.items()
        factors = [p if "lora_A" in n else p.T for n, p in named if "lora_A" in n or "lora_B" in n]  # (rank, features)
        alike = groupby(sorted(factors, key=_shape), key=_shape)
        return self.weight * sum(_orthogonality(torch.stack(list(some))).sum() for _, some in alike) / len(factors)

    def after_step(self, model: nn.Module, step: int) -> None:
        """Move the rank budget while this step's gradients are there."""
        model.base_model.update_and_allocate(step)  # type: ignore[operator, union-attr]

    def check(self, model: Any) -> Finding | None:
        """Did the ranks move, and is their sum the budget?"""
        config = model.peft_config["default"]
        ranks = [int(torch.count_nonzero(p)) for n, p in model.named_parameters() if "lora_E" in n]
        kept, budget = sum(map(sum, (config.rank_pattern or {}).values())), config.target_r * len(ranks)
        moved = 0 < kept < config.init_r * len(ranks)
        note = f"ranks {min(ranks)} to {max(ranks)} from {config.init_r}; {kept} kept, {sum(ranks)} in use of {budget}"
        return Finding(moved and sum(ranks) <= kept <= budget, note)

    def save(self, model: Any, folder: Path) -> None:
        """As PEFT reads it back."""
        model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, model: Any, folder: Path) -> Any:
        """PEFT's own loading, from safetensors."""
        return PeftModel.from_pretrained(model, folder)

    @torch.no_grad()
    def _weigh(self) -> None:
        """Sensitivity |weight x gradient|, its average, and its average deviation (eq. 8-10), for all weights at once.

        The same operations as PEFT's on every tensor, so that the bits are the same.
        """
        names, weights = list(self.weights), [weight.data for weight in self.weights.values()]
        gradients = [weight.grad for weight in self.weights.values() if weight.grad is not None]
        allocator = self.allocator
        if not allocator.ipt:
            for kept in IMPORTANCES:
                setattr(allocator, kept, {name: torch.zeros_like(weight) for name, weight in self.weights.items()})
        mean, deviation = ([kept[name] for name in names] for kept in (allocator.exp_avg_ipt, allocator.exp_avg_unc))
        now = list(torch._foreach_mul(weights, gradients))
        torch._foreach_abs_(now)
        allocator.ipt = dict(zip(names, now, strict=True))
        _average_(mean, now, allocator.beta1)
        apart = list(torch._foreach_sub(now, mean))
        torch._foreach_abs_(apart)
        _average_(deviation, apart, allocator.beta2)

    @torch.no_grad()
    def _mask(self, pattern: Mapping[str, Sequence[bool]]) -> None:
        """Directions that were given up stay at 0."""
        dropped = [name for name in self.weights if "lora_E" in name]
        flags = [pattern.get(name, pattern.get(name.replace(".default", ""))) for name in dropped]
        kept = torch.tensor(flags, dtype=torch.float32).to(self.model.device)  # (layers, rank)
        torch._foreach_mul_([self.weights[name] for name in dropped], list(kept[..., None]))


def _average_(mean: list[Tensor], new: list[Tensor], beta: float) -> None:
    """mean = beta * mean + (1 - beta) * new, in place."""
    torch._foreach_mul_(mean, beta)
    torch._foreach_add_(mean, list(torch._foreach_mul(new, 1 - beta)))


def _shape(factor: Tensor) -> tuple[int, ...]:
    return tuple(factor.shape)


def _orthogonality(factors: Tensor) -> Tensor:
    """Frobenius norms (n,) of F F^T - I for factors (n, rank, features)."""
    gram = factors @ factors.mT
    return torch.linalg.vector_norm(gram - torch.eye(gram.shape[-1], device=gram.device, dtype=gram.dtype), dim=(1, 2))
