"""Text that is not the task's: a base that tuning destroyed no longer expects it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.data import corpus
from finetune.models.tokenizer import Example

SEED = 1  # the miniatures are trained on the text of seed 0
NUM_PARTS = 64
PART_TOKENS = 256


def examples(name: str, tokenizer: Any) -> list[Example]:
    """The first 64 parts of at most 256 tokens: documents of the demo's generator (`generated`), or a file's text."""
    texts = corpus.documents(seed=SEED) if name == "generated" else _paragraphs(Path(name))
    parts = itertools.chain.from_iterable(_parts(text, tokenizer) for text in texts)
    found = [Example(ids, 1, False, False) for ids in itertools.islice(parts, NUM_PARTS)]
    if not found:
        raise ValueError(f"evaluate.forgetting_text={name} holds no text")
    return found


def _paragraphs(file: Path) -> Iterable[str]:
    """The parts of a UTF-8 file between empty lines."""
    return [text.strip() for text in file.read_text(encoding="utf-8-sig").split("\n\n") if text.strip()]


def _parts(text: str, tokenizer: Any) -> Iterable[list[int]]:
    """Its ids in parts; what is shorter than two tokens has no next token to expect."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    cut = (ids[i : i + PART_TOKENS] for i in range(0, len(ids), PART_TOKENS))
    return (part for part in cut if len(part) > 1)
