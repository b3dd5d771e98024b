"""How a job tells of its failure: failure.json, and the last lines of run.log."""

from __future__ import annotations

import errno
import traceback
from pathlib import Path

from finetune import runs
from finetune.memory import out_of_memory

# Errors whose messages say little without their names.
UNCLEAR = (TypeError, LookupError, AttributeError, AssertionError, NameError)


def tell(run: Path, error: BaseException) -> None:
    """Write it down; a ValueError is the person's mistake, and needs no traceback."""
    if not isinstance(error, ValueError):
        traceback.print_exception(error)
    kind = _kind(error)
    name, text = type(error).__name__, " ".join(f"{error}".split())
    if kind == "no space":
        text = f"no space left for {run}: {text}"
    full = f"{name}: {text}" if text else name
    print(full, flush=True)
    message = full if isinstance(error, UNCLEAR) or not text else text
    runs.fail(run, kind=kind, message=message[:2000])


def _kind(error: BaseException) -> str:
    """The kind of failure.json that an error is."""
    text = str(error)
    if out_of_memory(error):
        return "out of memory"
    if isinstance(error, FloatingPointError):
        return "not-a-number"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "inline_container" in text or "No space left" in text:  # how torch and safetensors say it
        return "no space"
    return "error"
