"""`python -m finetune.serve`: a `finetune.worker` whose libraries are imported in three quarters of the time.

Looking for garbage among the libraries' million objects takes 13 % of it, and half a second at the end of every
training. bitsandbytes, which PEFT imports, compiles functions for devices that it has no kernels for: that imports a
compiler, 2 s, and is left to the first call.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable, Iterator
from typing import Any


def main() -> None:
    """Import, then serve."""
    gc.disable()
    with _compiling_later(), contextlib.suppress(ImportError):  # who has a use for it hears of that
        import bitsandbytes  # noqa: F401
    from finetune import worker

    gc.freeze()
    gc.enable()
    worker.main()


@contextlib.contextmanager
def _compiling_later() -> Iterator[None]:
    """Within, `torch.compile` gives functions that are compiled when they are called first."""
    import torch

    compile_now = torch.compile

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        if function is None:  # a decorator
            return functools.partial(later, **options)
        compiled = functools.cache(lambda: compile_now(function, **options))
        return lambda *args, **given: compiled()(*args, **given)

    torch.compile = later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


if __name__ == "__main__":
    main()
