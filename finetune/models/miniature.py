"""The miniature bases: small models of the real transformers classes, pretrained once on the generated text.

A base is made from a `Recipe` alone, for a fixed number of steps, and kept in the user's cache under the recipe's
hash; it is written beside its place and renamed into it, under a file lock.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import tokenizers
import torch
import transformers
from torch import Tensor

from finetune.data import clinic, corpus
from finetune.models import start
from finetune.models.muon import Muon

EOS, PAD = "<eos>", "<pad>"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a miniature is made from; lengths in tokens, rates of Muon (matrices) and AdamW (the rest)."""

    architecture: str
    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    feed_forward: int = 256
    vocabulary: int = 1280
    tokenizer_documents: int = 4000
    num_steps: int = 500
    rows: int = 8
    length: int = 128
    matrix_lr: float = 0.02
    other_lr: float = 0.02
    warmup: float = 0.05
    seed: int = 0
    version: int = 1

    def key(self) -> str:
        """The hash of every constant and of the versions of the generators."""
        parts = {**dataclasses.asdict(self), "clinic": clinic.VERSION, "corpus": corpus.VERSION}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


RECIPES = {name: Recipe(name) for name in ("qwen", "llama", "chatglm", "bloom", "chinese_llama")}


def cache_folder() -> Path:
    """`FINETUNE_CACHE`, or `finetune` in the user's cache folder."""
    if folder := os.environ.get("FINETUNE_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune"


def build(architecture: str, *, cache: Path | None = None, log: Callable[[str], Any] = print) -> Path:
    """The folder of that miniature, made now if it is not there yet."""
    if architecture not in RECIPES:
        raise ValueError(f"no miniature of {architecture!r}; there are {', '.join(RECIPES)}")
    return make(RECIPES[architecture], cache=cache or cache_folder(), log=log)


def make(recipe: Recipe, *, cache: Path, log: Callable[[str], Any] = print) -> Path:
    """The folder of the recipe's base under `cache`; of several processes that want it one makes it."""
    folder = cache / "miniatures" / f"{recipe.architecture}-{recipe.key()}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            draft = folder.with_name(f"{folder.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)
            _write(recipe, draft, cache=cache, log=log)
            draft.rename(folder)
    return folder


def _write(recipe: Recipe, folder: Path, *, cache: Path, log: Callable[[str], Any]) -> None:
    start = time.monotonic()
    tokenizer = _tokenizer(recipe)
    model = _model(recipe, tokenizer=tokenizer)
    loss = _pretrain(model, tokenizer=tokenizer, recipe=recipe, log=log)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1) + "\n")
    num_millions = model.num_parameters() / 1e6
    log(f"made {folder.name}: {num_millions:.2f} M parameters, loss {loss:.3f}, {time.monotonic() - start:.0f} s")


def _tokenizer(recipe: Recipe) -> Any:
    """Byte-level BPE over the words of the generated text, so that no token crosses a word."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[^\p{L}]"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[EOS, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = "\n".join(itertools.islice(corpus.documents(seed=recipe.seed), recipe.tokenizer_documents))
    # Whole characters first: else a merge takes the end of one and the start of the next, and words break beside it.
    letters = itertools.chain.from_iterable([letter] * 2000 for letter in sorted(set(texts)))
    bpe.train_from_iterator(itertools.chain(letters, corpus.words(texts)), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def _model(recipe: Recipe, *, tokenizer: Any) -> Any:
    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": recipe.width,
        "num_hidden_layers": recipe.num_layers,
        "num_attention_heads": recipe.num_heads,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    rotary: dict[str, Any] = {
        **shape,
        "intermediate_size": recipe.feed_forward,
        "num_key_value_heads": recipe.num_kv_heads,
        "head_dim": recipe.width // recipe.num_heads,
        "max_position_embeddings": 2048,
    }
    slow = {"rope_type": "default", "rope_theta": 1e6}
    configs: dict[str, Callable[[], Any]] = {
        "qwen": lambda: transformers.Qwen2Config(**rotary, rope_parameters=slow),
        "llama": lambda: transformers.LlamaConfig(**rotary, rope_parameters=slow),
        "chatglm": lambda: transformers.GlmConfig(**rotary, attention_bias=True),
        "bloom": lambda: transformers.BloomConfig(**shape),
        "chinese_llama": lambda: transformers.LlamaConfig(**rotary, rope_parameters=slow),
    }
    torch.manual_seed(recipe.seed)
    model = transformers.AutoModelForCausalLM.from_config(configs[recipe.architecture](), dtype=torch.float32)
    start.copying(model)
    return model


def _batches(tokenizer: Any, *, recipe: Recipe) -> Iterator[Tensor]:
    """Endless (rows, length) token ids: documents, each with its end, one after the other."""
    ids: list[int] = []
    for text in corpus.documents(seed=recipe.seed):
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        size = recipe.rows * recipe.length
        if len(ids) >= size:
            yield torch.tensor(ids[:size]).view(recipe.rows, recipe.length)
            ids = ids[size:]


def _pretrain(model: Any, *, tokenizer: Any, recipe: Recipe, log: Callable[[str], Any]) -> float:
    """Train on the generated text; the mean loss of the last twenty steps, in nats a token."""
    body = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for p in model.parameters() if all(p is not other for other in body)]
    muon = Muon(body, lr=recipe.matrix_lr)
    adamw = torch.optim.AdamW(rest, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    losses = []
    for step, ids in enumerate(itertools.islice(_batches(tokenizer, recipe=recipe), recipe.num_steps)):
        scale = _schedule(step / recipe.num_steps, warmup=recipe.warmup)
        for optimizer, lr in ((muon, recipe.matrix_lr), (adamw, recipe.other_lr)):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 25 == 0:
            log(f"{recipe.architecture} {step + 1}/{recipe.num_steps} steps, loss {losses[-1]:.3f}")
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def _schedule(done: float, *, warmup: float) -> float:
    """Linear up, then linear down to a twentieth."""
    return min(1.0, (done + 1e-3) / warmup) * max(0.05, 1 - max(0.0, done - warmup) / (1 - warmup))
