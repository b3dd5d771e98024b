"""What a score in a file means: the scorer's version, its conventions, and the dictionary that knows the words."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

VERSION = 1  # raised when any score of the same texts changes
CONVENTIONS = {
    "rouge": "F1 in percent by jieba words, n-grams as sets (rouge_chinese)",
    "-char": "by single Chinese characters and lower-cased words of other scripts (BERT's basic tokenizer)",
    "-multiset": "n-grams as multisets (Lin 2004, rouge_score)",
    "bleu-4": "of a task's rows together, sacrebleu tok:zh, smooth:exp",
    "chrf": "of a task's rows together, sacrebleu nc:6, nw:0, beta 2",
    "official": "PromptCBLUE v0.2",
}


def provenance() -> dict[str, Any]:
    """For scores.json; two runs' scores compare when this is equal."""
    return {"version": VERSION, "conventions": CONVENTIONS, "dictionary": dictionary_hash()}


@cache
def dictionary_hash() -> str:
    """SHA-256 of jieba's dictionary."""
    files = metadata.files("jieba") or []
    [path] = [Path(file.locate()) for file in files if file.name == "dict.txt" and file.parent.name == "jieba"]
    return hashlib.sha256(path.read_bytes()).hexdigest()
