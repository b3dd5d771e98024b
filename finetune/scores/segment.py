"""Text -> tokens. jieba words are the tokens of the published Chinese tables; they depend on jieba's dictionary."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any


def words(text: str) -> list[str]:
    """Segment into jieba's words, precise mode; white space is dropped."""
    return [word for word in segment(text) if not word.isspace()]


def segment(text: str) -> list[str]:
    """Segment into jieba's words as they come, white space included (`rouge_chinese` reacts to line breaks)."""
    return _segmenter().lcut(text)


@cache
def _segmenter() -> Any:
    """A tokenizer of our own, so that words which the host program added to jieba change no score."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jieba 0.42.1: invalid escapes, pkg_resources
        import jieba
    jieba.setLogLevel(logging.CRITICAL)  # it prints three lines at first use, and a traceback without a cache folder
    segmenter = jieba.Tokenizer()
    segmenter.tmp_dir = str(_cache_folder())
    segmenter.initialize()
    return segmenter


def _cache_folder() -> Path:
    """The person's own folder for jieba's parsed dictionary; by default it is a guessable file in the shared /tmp."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune" / "jieba"
    with contextlib.suppress(OSError):  # without a cache jieba only starts slower
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder
