"""Checkpoints on disk: folders `step-000120` that are whole or not there, and read only after every byte was verified.

Tensors lie in safetensors files, all else in JSON; nothing is ever unpickled. `manifest.json` names each file with its
size and SHA-256 and is written last; then the folder gets its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finetune.data.batches import bounded

FORMAT = 1
KEPT = 2
SHARD_BYTES = 2**30  # copied to the CPU's memory at once
MANIFEST, TREE = "manifest.json", "state.json"


def write(folder: Path, state: Any, *, step: int, about: Mapping[str, Any]) -> None:
    """Keep `state` (nested dicts and lists of numbers, texts, tensors) as the checkpoint of a step; drop old ones."""
    whole = folder / f"step-{step:06d}"
    part = folder / f".{whole.name}"
    _remove(part)
    part.mkdir(parents=True)
    try:
        tensors: dict[str, Tensor] = {}
        _write_text(part / TREE, json.dumps(_without(state, tensors)))
        for number, names in enumerate(bounded(tensors, size=lambda name: tensors[name].nbytes, limit=SHARD_BYTES)):
            copies = {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in names}
            save_file(copies, part / f"tensors-{number:03d}.safetensors")
        _seal(part, step=step, about=about)
        _remove(whole)  # a damaged one of the same step
        part.rename(whole)
        _sync(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in found(folder)[:-KEPT]:
        _remove(old)


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or damaged, first to last."""
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)), key=step)


def step(path: Path) -> int:
    """The optimizer step after which a checkpoint was made."""
    return int(path.name.partition("-")[2])


def verify(path: Path) -> dict[str, Any]:
    """What the checkpoint says `about` itself; raises ValueError, saying how it is damaged."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        body = manifest["body"]
        if manifest["sha256"] != _digest(body) or (body["format"], body["step"]) != (FORMAT, step(path)):
            raise ValueError(f"{MANIFEST} is damaged")
        for name, (size, digest) in body["files"].items():
            file = path / Path(name).name
            if file.stat().st_size != size or _file_digest(file) != digest:
                raise ValueError(f"{name} is damaged")
        return dict(body["about"])
    except FileNotFoundError as error:
        raise ValueError(f"{Path(error.filename).name} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error}") from None
    except (LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged: {type(error).__name__}") from None


def read(path: Path) -> Any:
    """The state in a verified checkpoint, its tensors on the CPU; raises ValueError."""
    tensors: dict[str, Tensor] = {}
    try:
        for file in sorted(path.glob("tensors-*.safetensors")):
            tensors |= load_file(file)
        return _with(json.loads((path / TREE).read_bytes()), tensors)
    except (OSError, LookupError, TypeError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from None


def sweep(folder: Path) -> None:
    """Remove what was being written or removed when a process died."""
    for path in folder.glob(".*"):
        shutil.rmtree(path, ignore_errors=True)


def _without(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON in which a tensor is its number in `tensors`, which are added there."""
    if isinstance(value, Tensor):
        tensors[str(len(tensors))] = value
        return {"tensor": str(len(tensors) - 1)}
    if isinstance(value, Mapping):
        return {"map": [[key, _without(item, tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_without(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a {type(value).__name__} cannot be kept in a checkpoint")


def _with(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `_without`."""
    if not isinstance(value, dict):
        return value
    [(kind, content)] = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {key: _with(item, tensors) for key, item in content}
    items = [_with(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _seal(part: Path, *, step: int, about: Mapping[str, Any]) -> None:
    """Put every file on the disk, then the manifest that vouches for them."""
    files = {}
    for file in sorted(part.iterdir()):
        _sync(file)
        files[file.name] = [file.stat().st_size, _file_digest(file)]
    body = {"format": FORMAT, "step": step, "about": dict(about), "files": files}
    _write_text(part / MANIFEST, json.dumps({"sha256": _digest(body), "body": body}, indent=1))
    _sync(part / MANIFEST)
    _sync(part)


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write_text(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """On the disk, not only in the system's memory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Out of sight first: a kill leaves no half of a checkpoint under its name."""
    gone = path.with_name(f".gone-{path.name.lstrip('.')}")
    shutil.rmtree(gone, ignore_errors=True)
    if path.exists():
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
