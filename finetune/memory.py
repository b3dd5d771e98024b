"""When memory runs out: telling it from other errors, freeing it, and what would help."""

from __future__ import annotations

import contextlib
import gc
from pathlib import Path

import torch
from accelerate.utils.memory import should_reduce_batch_size

PEAK = Path("/proc/self/clear_refs")  # "5" forgets the largest resident set (man 5 proc)
ADVICE = (
    "fewer tokens (task.max_prompt_tokens, task.max_target_tokens), method.quantize=nf4 or "
    "model.checkpoint_activations=true would help"
)


def out_of_memory(error: BaseException) -> bool:
    """Is it a lack of memory that a smaller batch may cure?"""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, Exception) and should_reduce_batch_size(error)
    )


def free() -> None:
    """Give back what the failed attempt left, which its exception kept alive until now."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forget_peaks() -> None:
    """The most memory in use is counted anew."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # not Linux
        PEAK.write_text("5")


def too_much(num_tokens: int, *, doing: str, said: str) -> torch.OutOfMemoryError:
    """The error of a row that does not fit, even alone."""
    return torch.OutOfMemoryError(f"{doing} one row of {num_tokens} tokens does not fit into memory: {ADVICE} ({said})")
