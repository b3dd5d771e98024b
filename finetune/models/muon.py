"""Muon (Jordan et al. 2024) for the miniatures: torch's casts to bfloat16, which takes 60 % of a step on a CPU."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024: the steepest quintic that stays near 1


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal; matrices of one shape are taken together."""

    def __init__(self, parameters: Iterable[Tensor], *, lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on every matrix that has a gradient."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                if matrix.grad is not None:
                    shapes.setdefault(matrix.shape, []).append(matrix)
            for matrices in shapes.values():
                updates = orthogonal(torch.stack([self._direction(m, momentum=group["momentum"]) for m in matrices]))
                for matrix, update in zip(matrices, updates, strict=True):
                    rows, columns = matrix.shape
                    matrix.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _direction(self, matrix: Tensor, *, momentum: float) -> Tensor:
        """Nesterov's momentum."""
        state = self.state[matrix]
        average: Tensor = state.setdefault("average", torch.zeros_like(matrix))
        assert matrix.grad is not None
        average.lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def orthogonal(matrices: Tensor, *, num_steps: int = 5) -> Tensor:
    """Nearly the nearest orthogonal matrices, (count, rows, columns), by Newton-Schulz steps."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
