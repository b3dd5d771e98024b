"""Secrets of the environment: their values never reach a run folder, and no message repeats them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

SECRET = re.compile(r"(?i)(_KEY|_TOKEN|_SECRET|PASSWORD|PASSWD|API_?KEY)$|^(SECRET|TOKEN|PASSWORD)$")
SHORTEST = 6  # characters; a shorter value (`1`, `true`) stands in many texts by chance


def is_secret(key: str) -> bool:
    """Does a variable or the last part of a dotted key name a secret?"""
    return SECRET.search(key.rpartition(".")[2]) is not None


def values() -> dict[str, str]:
    """The environment's secrets, by name."""
    return {name: value for name, value in os.environ.items() if is_secret(name) and len(value) >= SHORTEST}


def hide(text: str) -> str:
    """The text with the name of the variable in place of every secret."""
    for name, value in values().items():
        text = text.replace(value, f"<{name}>")
    return text


def found(config: Mapping[str, Any]) -> list[str]:
    """One line for every key of a configuration that is named like a secret or holds one; no line repeats a value."""
    known = values()
    lines = []
    for key, text in _texts(config, ""):
        holds = [name for name, value in known.items() if value in text or value in key]
        if holds:
            lines.append(f"{hide(key)}: holds the value of {', '.join(holds)}; it would be written into the run")
        elif is_secret(key):
            lines.append(f"{key}: keys and tokens are never written into a run; give them by the environment")
    return lines


def _texts(node: Any, prefix: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _texts(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list | tuple):
        for value in node:
            yield from _texts(value, prefix)
    else:
        yield prefix, str(node)
