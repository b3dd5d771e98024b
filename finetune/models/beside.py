"""Kernels too small to fill a GPU, recorded beside those that follow them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def _branch(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings of a process, as their trunk is (finetune.graphs)."""
    return torch.cuda.Stream(device)


class Beside:
    """While a CUDA graph is recorded, what it is given to compute lies on a branch of the graph, until `join`.

    A tensor that the branch reads must live until then, as its memory would be given to what follows.
    """

    def __init__(self, device: torch.device) -> None:
        self.branch: torch.cuda.Stream | None = None
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self.branch, self.trunk = _branch(device), torch.cuda.current_stream(device)

    def __call__(self, compute: Callable[[], Tensor]) -> Tensor:
        """What `compute` returns, which what is recorded so far precedes."""
        if not self.branch:
            return compute()
        self.branch.wait_stream(self.trunk)
        with torch.cuda.stream(self.branch):
            return compute()

    def join(self) -> None:
        """What follows waits for the branch."""
        if self.branch:
            self.trunk.wait_stream(self.branch)
