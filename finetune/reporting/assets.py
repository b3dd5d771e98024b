"""What report.html needs and is slow to make, kept in a cache: the scripts of Vega, the figures' specifications.

Bundling the scripts takes 4 s and importing altair 1 s; both give the same for the same versions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from finetune import runs
from finetune.reporting import charts

OFFERED = "window.vegaEmbed = vegaEmbed;"


def scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script that needs no network."""
    return _cached("vega.js", metadata.version("vl-convert-python") + OFFERED, _bundle)


def specifications() -> dict[str, Any]:
    """The figures of `charts`, by name."""
    source = Path(charts.__file__).read_text(encoding="utf-8")
    text = _cached("charts.json", metadata.version("altair") + source, lambda: json.dumps(charts.specifications()))
    return json.loads(text)


def _bundle() -> str:
    import vl_convert

    return vl_convert.javascript_bundle(OFFERED)


def _cached(name: str, key: str, make: Callable[[], str]) -> str:
    """The text from the person's cache, or made and put there; without a cache folder it is made every time."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune" / "report"
    path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}-{name}"
    with contextlib.suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8")
    text = make()
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        runs.write_text(path, text)
    return text
