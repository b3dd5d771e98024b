"""The run folder: its name, its claim, its end. Which files exist is the state.

multirun/<study>/<task>[+...]/<model>[+...]/<method>[+...]/seed<k>/
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from finetune import claims

State = Literal["done", "unsupported", "running", "failed", "unfinished"]
FINAL: tuple[State, ...] = ("done", "unsupported")  # the same command again leaves it as it is
INTERRUPTED = "interrupted"  # the kind of a failure that is none

MAX_NAME = 99  # bytes; file systems allow 255, and a name must stay readable in a table
DEFAULT_CHOICES = {"scale": "tiny", "optim": "adamw"}
DATA_FILES = ("task.source.path", "task.source.valid_path")
NAMELESS = ("launch", "wandb", "study", "seed", "data_dir", "experiment", "hydra")


def folder(root: Path, config: Mapping[str, Any], overrides: Sequence[str]) -> Path:
    """Where the run of `config`, composed from the command line's `overrides`, lies."""
    task, model, method = names(config, overrides)
    return root / config["study"] / task / model / method / f"seed{config['seed']}"


def names(config: Mapping[str, Any], overrides: Sequence[str]) -> tuple[str, str, str]:
    """Names of the task's, the model's and the method's folder.

    `task.*` overrides become a suffix of the task's name, `model.*` of the model's, all others (and choices of a group
    other than the default) of the method's.
    """
    suffixes: dict[str, list[str]] = {"task": [], "model": [], "method": []}
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        group = key.partition(".")[0].partition("@")[0].partition("/")[0]
        if group in NAMELESS or key in suffixes or value == DEFAULT_CHOICES.get(key):
            continue
        owner = group if group in suffixes else "method"
        if key in DATA_FILES:
            value = value.rpartition("/")[2]  # data may move
        suffixes[owner].append(f"{key.removeprefix(owner + '.')}={value}")
    task, model, method = (_name(config[owner]["name"], parts) for owner, parts in suffixes.items())
    return task, model, method


def _name(stem: str, suffixes: Iterable[str]) -> str:
    """`stem+suffix+suffix`, printable, without separators, shorter than 100 bytes; what is cut leaves a hash."""
    raw = "+".join([stem, *sorted(suffixes)])
    clean = re.sub(r"[^\w=.,+\-]", "_", raw).replace("..", "__").lstrip(".")
    if len(clean.encode()) > MAX_NAME or clean != raw:
        digest = hashlib.sha256(raw.encode()).hexdigest()[:8]
        clean = clean.encode()[: MAX_NAME - 9].decode(errors="ignore") + "~" + digest
    return clean


def find(root: Path) -> list[Path]:
    """All run folders below `root`, sorted."""
    return sorted(path.parent for path in root.glob("*/*/*/*/seed*/config.yaml"))


def state(run: Path) -> State:
    """What the files in a run folder say."""
    found = ended(run)
    return "running" if found in ("failed", "unfinished") and claims.lives(run) else found


def ended(run: Path) -> State:
    """The same, whoever works on it."""
    if (run / "scores.json").exists():
        return "done"
    if (run / "unsupported.json").exists():
        return "unsupported"
    return "failed" if (run / "failure.json").exists() and not _interrupted(run) else "unfinished"


def _interrupted(run: Path) -> bool:
    """Was the last attempt stopped by a person or the machine?"""
    with contextlib.suppress(ValueError, OSError):  # a damaged record is a failure
        return read_json(run / "failure.json").get("kind") == INTERRUPTED
    return False


def begin(run: Path, config: Mapping[str, Any]) -> None:
    """A new attempt in a claimed folder: `config.yaml`, and the failure of the attempt before is numbered."""
    _keep_old(run / "failure.json")
    write_text(run / "config.yaml", yaml.safe_dump(dict(config), allow_unicode=True, sort_keys=False))


def clear(run: Path) -> None:
    """Remove results of an earlier attempt that the next one does not need; what it goes on from stays."""
    for name in ("predictions.jsonl", "unsupported.json"):
        (run / name).unlink(missing_ok=True)
    for name in ("environment.json", "steps.jsonl", "predictions.jsonl", "scores.json"):
        for part in run.glob(f".{name}.*"):  # half written by a process that was killed
            part.unlink(missing_ok=True)


def fail(run: Path, *, kind: str, message: str) -> None:
    """Record why the run ended without a result; nothing if it has one, or a record of this attempt."""
    if ended(run) in FINAL or (run / "failure.json").exists():
        return
    log = tail(run / "run.log", 20)
    write_json(run / "failure.json", {"kind": kind, "message": message, "log": log, "time": time.time()})


def read_config(run: Path) -> dict[str, Any]:
    """The configuration that claimed the folder."""
    text = (run / "config.yaml").read_text(encoding="utf-8")
    try:
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{run / 'config.yaml'}: not a configuration: {str(error)[:200]}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{run / 'config.yaml'}: not a configuration")
    return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when there is no such file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value


def read_environment(run: Path) -> dict[str, Any]:
    """environment.json with its `hashes` by name; a damaged record is no record, and damaged hashes are none."""
    record: dict[str, Any] = {}
    with contextlib.suppress(ValueError):
        record = read_json(run / "environment.json")
    hashes = record.get("hashes")
    return {**record, "hashes": hashes if isinstance(hashes, dict) else {}}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write whole or not at all."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: to a neighbour, to the disk, then by rename."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")  # pids repeat on another host
    try:
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append one JSON object a line."""
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.writelines(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def tail(path: Path, num_lines: int) -> list[str]:
    """The last lines of a text file; none when it does not exist."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 64 * 1024))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]
    except FileNotFoundError:
        return []


def _keep_old(path: Path) -> None:
    """Number an older record of a failure instead of overwriting it."""
    if path.exists():
        number = 1 + len(list(path.parent.glob("failure.*.json")))
        path.rename(path.with_name(f"failure.{number}.json"))
