"""One contender after the other, each a process of its own; what each says is kept at once. No torch here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "trl", "bitsandbytes", "flash-attn-4")
SURROUNDINGS = ("hardware", "versions", "date", "command")  # of a line
ROOT = Path(__file__).parent.parent


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _hardware() -> str:
    """The GPU's name, or the processor's, and the number of cores."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        words = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")
        return f"{names[0].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def details() -> dict[str, Any]:
    """Where and how something was measured."""
    words = [f"{Path(sys.argv[0]).parent.name}.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    return {
        "hardware": _hardware(),
        "versions": _versions(),
        "date": time.strftime("%Y-%m-%d"),
        "command": f"python -m {' '.join(words)}",
    }


def child(words: Sequence[str], *, folder: Path | None = None) -> dict[str, Any]:
    """`python -m words...`: the JSON object that it prints last, and its wall seconds; or why it failed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, check=False, cwd=folder, env=environment
    )
    wall = time.perf_counter() - began
    last = (done.stdout.strip().splitlines() or [""])[-1]
    if done.returncode:
        return {"failed": (done.stderr.strip() or done.stdout.strip())[-1500:], "wall_seconds": wall}
    return {**(json.loads(last) if last.startswith("{") else {}), "wall_seconds": wall}


def show(line: dict[str, Any], out: Path) -> None:
    """Print a line without its surroundings, and add all of it to the file."""
    with out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(json.dumps({key: value for key, value in line.items() if key not in SURROUNDINGS}), flush=True)
