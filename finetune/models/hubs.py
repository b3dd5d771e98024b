"""A model's files from Hugging Face or ModelScope, by id and revision, into that hub's own cache.

The weights are fetched last, so a folder with whole weights is a whole download. Without a network the cached copy
is taken if there is one; otherwise the error comes within seconds and names the key.
"""

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

REPLY_SECONDS = 8  # a hub that has not answered its first question by then counts as unreachable
SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]  # config, tokenizer, chat template
CODE_FILES = ["*.py"]
WEIGHT_FILES = ["*.safetensors"]
# Folders hold other formats of the same weights (`original/`, `onnx/`), `consolidated*` a second copy.
UNWANTED = ["*/*", "consolidated*"]

Log = Callable[[str], Any]
T = TypeVar("T")


def download(name: str, *, hub: str, revision: str, code: bool, log: Log) -> Path:
    """The local folder of `name` at `revision`; `code` also fetches its Python files. Raises ValueError."""
    if hub not in ("huggingface", "modelscope"):
        raise ValueError(f"model.hub={hub}: the choices are huggingface and modelscope")
    small = SMALL_FILES + (CODE_FILES if code else [])
    fetch = _huggingface if hub == "huggingface" else _modelscope
    return fetch(name, revision=revision, small=small, log=log)


def _huggingface(name: str, *, revision: str, small: list[str], log: Log) -> Path:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    if not sys.stderr.isatty():
        disable_progress_bars()

    def fetch(patterns: list[str], *, cached: bool = False) -> Path:
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=UNWANTED,
            endpoint=endpoint,
            etag_timeout=REPLY_SECONDS,
            local_files_only=cached,
        )
        return Path(folder)

    def ask() -> list[str]:
        found = HfApi(endpoint=endpoint).model_info(name, revision=revision, timeout=REPLY_SECONDS)
        return [file.rfilename for file in found.siblings or []]

    what = f"{name}@{revision} from Hugging Face ({endpoint})"
    return _fetch(what, ask=ask, fetch=fetch, small=small, log=log)


def _modelscope(name: str, *, revision: str, small: list[str], log: Log) -> Path:
    try:
        import modelscope_hub
    except ImportError as error:
        message = "model.hub=modelscope needs the package modelscope-hub: pip install modelscope-hub"
        raise ValueError(message) from error
    api = modelscope_hub.HubApi(modelscope_hub.HubConfig())

    def fetch(patterns: list[str], *, cached: bool = False) -> Path:
        return api.download_repo(
            name,
            "model",
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=UNWANTED,
            local_files_only=cached,
        )

    def ask() -> list[str]:
        return [file.path for file in api.list_repo_files(name, "model", revision=revision)]

    what = f"{name}@{revision} from ModelScope ({api.legacy.endpoint})"
    return _fetch(what, ask=ask, fetch=fetch, small=small, log=log)


def _fetch(what: str, *, ask: Callable[[], list[str]], fetch: Callable[..., Path], small: list[str], log: Log) -> Path:
    """Ask for the list of files, then fetch the small ones, then the weights; or take the cached copy."""
    try:
        files = within(REPLY_SECONDS, ask)
    except Exception as error:
        if _status(error) in (401, 403, 404):
            _refuse(what, error)
        return _cached(what, fetch=fetch, patterns=small + WEIGHT_FILES, error=error, log=log)
    _check_formats(what, files)
    log(f"fetching {what}")
    try:
        fetch(small)
        return fetch(WEIGHT_FILES)
    except Exception as error:
        if _status(error) in (401, 403):  # a gated model shows its list of files to everyone
            _refuse(what, error)
        advice = "give the same command again and it goes on from there"
        raise ValueError(f"{what}: the download broke off ({_brief(error)}); {advice}") from error


def _cached(what: str, *, fetch: Callable[..., Path], patterns: list[str], error: Exception, log: Log) -> Path:
    try:
        folder = fetch(patterns, cached=True)
    except Exception:
        message = (
            f"{what} cannot be reached ({_brief(error)}) and no copy of it is in the cache; connect this machine, "
            "or set model.path to a local folder or a GGUF file, or choose the other model.hub"
        )
        raise ValueError(message) from error
    log(f"{what} cannot be reached ({_brief(error)}); using the copy in {folder}")
    return folder


def _refuse(what: str, error: Exception) -> NoReturn:
    """The hub answered, and said no."""
    if type(error).__name__ == "GatedRepoError" or _status(error) == 403:
        found = "access is refused"
        advice = "accept its licence on the model's page and log in (HF_TOKEN), or choose the other model.hub"
    else:  # Hugging Face answers 401 for what does not exist, too
        found = "there is no such model or revision, or it is private"
        advice = "check the id and the revision, or set model.path to a local folder, a GGUF file or another id"
    raise ValueError(f"{what}: {found} ({_status(error)}); {advice}") from error


def _check_formats(what: str, files: Iterable[str]) -> None:
    names = [name for name in files if "/" not in name]
    if any(name.endswith(".safetensors") for name in names):
        return
    found = ", ".join(sorted(name for name in names if name.endswith((".bin", ".pt", ".gguf")))[:4]) or "no weights"
    message = (
        f"{what} has no safetensors weights (it has {found}); pickled weights can run code and are not loaded: "
        "name a revision that has safetensors, or convert them once and set model.path to the folder, "
        "or to one downloaded GGUF file"
    )
    raise ValueError(message)


def within(seconds: float, question: Callable[[], T]) -> T:
    """The answer, or TimeoutError: name look-ups and connections have time limits of their own, often minutes."""
    answers: queue.Queue[tuple[T | None, Exception | None]] = queue.Queue()

    def work() -> None:
        try:
            answers.put((question(), None))
        except Exception as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]


def _status(error: BaseException) -> int | None:
    """The HTTP status that a hub's error carries, if it answered at all."""
    status = getattr(getattr(_first(error), "response", None), "status_code", None)
    status = status or getattr(_first(error), "status_code", None)
    return status if isinstance(status, int) else None


def _first(error: BaseException) -> BaseException:
    """ModelScope gathers the failures of all files."""
    failed: dict[str, BaseException] = getattr(error, "failed_files", None) or {}
    return next(iter(failed.values()), error)


def _brief(error: BaseException) -> str:
    names = ", ".join(getattr(error, "failed_files", None) or {})
    text = " ".join(str(_first(error)).split())[:300]
    return f"{type(_first(error)).__name__}: {names}{': ' * bool(names)}{text}"
