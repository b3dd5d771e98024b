"""Where and on what a run happened: commit, packages, hardware, hashes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "hydra-core",
    "jieba",
    "wandb",
    "flash-attn-4",
)
GIB = 2**30


def environment(**hashes: str) -> dict[str, Any]:
    """What environment.json records."""
    return {
        **_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "hardware": _hardware(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "hashes": hashes,
    }


def only_deterministic() -> None:
    """From here on only operations that give the same bits each time; before a CUDA context is made."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # cuBLAS picks among streams' workspaces otherwise
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def without_plans() -> None:
    """From here on no attention by cuDNN, which plans each new shape for 0.1 to 0.4 s; each new token is one."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def pick_device(asked: str) -> torch.device:
    """`auto` takes a GPU when there is one; raises ValueError for one that is not there."""
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("launch.device=cuda: this host shows no GPU; use launch.device=auto")
    use_cuda = asked != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if use_cuda else "cpu")


def usable_precision(asked: str, device: torch.device) -> tuple[str, str | None]:
    """The precision that `device` computes in, and why it is not the one asked for."""
    if device.type == "cpu" and asked == "float16":
        return "float32", "float16 is not for CPUs: computed in float32"
    if device.type == "cuda" and asked == "bfloat16" and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError("model.precision=bfloat16: this GPU has no bfloat16; use model.precision=float16")
    return asked, None


def peak_memory_gib(device: torch.device) -> float:
    """Most memory in use at once: the GPU's allocations, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def _commit() -> dict[str, Any]:
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", __file__)  # an installed wheel may lie in somebody's repository
        changed = git("status", "--porcelain", "--", ".", ":/conf")  # new files, too
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hardware() -> Mapping[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return {
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "gpus": gpus,
    }
