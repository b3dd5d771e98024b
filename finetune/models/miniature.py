"""The miniature bases: small models of the real transformers classes, pretrained once on the generated text.

A base is made from a `Recipe` alone, for a fixed number of steps, and kept in the user's cache under the recipe's
hash; it is written beside its place and renamed into it, under a file lock.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock
import tokenizers
import torch
import tqdm
import transformers
from torch import Tensor

from finetune.data import clinic, corpus
from finetune.models import sources, start
from finetune.models.muon import Muon

EOS, PAD = "<eos>", "<pad>"
NUM_THREADS = 1  # another number sums in another order and gives other weights; two gain little on such small layers
VERSION = 2  # raised when code below or in `start` or `muon` changes what a recipe gives


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that a miniature is made from; lengths in tokens, rates of Muon (matrices) and of AdamW (the rest)."""

    architecture: str
    extends: "Recipe | None" = None  # the base whose vocabulary grows and whose pretraining goes on
    width: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    feed_forward: int = 256
    vocabulary: int = 1280  # the text has no more than about 1040 tokens to learn
    tokenizer_documents: int = 4000
    num_steps: int = 500
    rows: int = 8
    length: int = 128
    matrix_lr: float = 0.012
    other_lr: float = 0.01
    seed: int = 0

    def key(self) -> str:
        """The hash of every constant and of the versions of the generators."""
        parts = [dataclasses.asdict(self), VERSION, clinic.VERSION, corpus.VERSION]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


_LLAMA = Recipe("llama", vocabulary=880)
RECIPES = {
    "qwen": Recipe("qwen"),
    "llama": _LLAMA,
    "chatglm": Recipe("chatglm"),
    "bloom": Recipe("bloom", matrix_lr=0.01, other_lr=0.006),
    # As Chinese-LLaMA does (Cui et al. 2023, arXiv:2304.08177): more tokens for Chinese words, then more pretraining.
    "chinese_llama": Recipe("llama", extends=_LLAMA, num_steps=150, matrix_lr=0.005, other_lr=0.005, seed=1),
}


def build(architecture: str, *, cache: Path | None = None, log: Callable[[str], Any] = print) -> Path:
    """The folder of that miniature, made now if it is not there yet."""
    if architecture not in RECIPES:
        raise ValueError(f"no miniature of {architecture!r}; there are {', '.join(RECIPES)}")
    return make(RECIPES[architecture], name=architecture, cache=cache or sources.cache_folder(), log=log)


def make(recipe: Recipe, *, name: str, cache: Path, log: Callable[[str], Any] = print) -> Path:
    """The folder of the recipe's base under `cache`; of several processes that want it one makes it."""
    folder = cache / "miniatures" / f"{name}-{recipe.key()}"
    if _whole(folder):
        return folder
    base = make(recipe.extends, name=recipe.extends.architecture, cache=cache, log=log) if recipe.extends else None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"no miniature can be kept in {folder.parent} ({error.strerror}): set FINETUNE_CACHE to a folder for it"
        ) from error
    with filelock.FileLock(f"{folder}.lock"):
        if not _whole(folder):
            if folder.exists():
                log(f"{folder} is damaged, and made anew")
                shutil.rmtree(folder)
            draft = folder.with_name(f"{folder.name}.draft")
            shutil.rmtree(draft, ignore_errors=True)  # what a killed process left
            _write(recipe, draft, base=base, log=log)
            draft.rename(folder)
    return folder


def _whole(folder: Path) -> bool:
    """Are all files there, and the weights as long as they say? A disk that filled up or a copy may have cut them."""
    try:
        json.loads((folder / "tokenizer.json").read_bytes())
        there = (folder / "recipe.json").stat().st_size > 0
        return there and bool(sources.weight_files(sources.Source(str(folder), folder)))
    except (OSError, ValueError):
        return False


def _write(recipe: Recipe, folder: Path, *, base: Path | None, log: Callable[[str], Any]) -> None:
    began = time.monotonic()
    log(f"making {folder.stem}: {recipe.num_steps} steps of {recipe.rows * recipe.length} tokens")
    tokenizer = _tokenizer(recipe)
    with torch.random.fork_rng(devices=[]), _threads(NUM_THREADS):
        torch.manual_seed(recipe.seed)
        model = _extended(base, tokenizer=tokenizer) if base else _fresh(recipe, tokenizer=tokenizer)
        loss = _pretrain(model, tokenizer=tokenizer, recipe=recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "recipe.json").write_text(json.dumps(dataclasses.asdict(recipe), indent=1) + "\n")
    num_millions, seconds = model.num_parameters() / 1e6, time.monotonic() - began
    log(f"made {folder.stem}: {num_millions:.2f} M parameters, loss {loss:.3f} nats a token, {seconds:.0f} s")


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    text = "\n".join(itertools.islice(corpus.documents(seed=0), recipe.tokenizer_documents))
    # Whole characters first: else a merge takes the end of one and the start of the next, and words break beside it.
    letters = itertools.chain.from_iterable([letter] * 300 for letter in sorted(set(text)))
    bpe.train_from_iterator(itertools.chain(letters, corpus.words(text)), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=EOS, pad_token=PAD)


def _fresh(recipe: Recipe, *, tokenizer: Any) -> Any:
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
    slow = {"rope_type": "default", "rope_theta": 1e6}  # Qwen2.5's; Llama 3's is half of it
    configs: dict[str, Callable[[], Any]] = {
        "qwen": lambda: transformers.Qwen2Config(**rotary, rope_parameters=slow),
        "llama": lambda: transformers.LlamaConfig(**rotary, rope_parameters=slow),
        "chatglm": lambda: transformers.GlmConfig(**rotary, attention_bias=True),
        "bloom": lambda: transformers.BloomConfig(**shape),
    }
    model = transformers.AutoModelForCausalLM.from_config(configs[recipe.architecture](), dtype=torch.float32)
    start.copying(model)
    return model


@torch.no_grad()
def _extended(base: Path, *, tokenizer: Any) -> Any:
    """The base with a row for every token that its own tokenizer lacks: the mean of the rows of its pieces."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    old: Any = transformers.AutoTokenizer.from_pretrained(base)
    known = old.get_vocab().items()
    assert known <= tokenizer.get_vocab().items(), "old tokens keep their ids"
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        for place in range(len(old), len(tokenizer)):
            rows[place] = rows[old(tokenizer.decode([place])).input_ids].mean(0)
    return model


def _batches(tokenizer: Any, *, recipe: Recipe) -> Iterator[Tensor]:
    """Endless (rows, length) token ids: documents, each with its end, one after the other."""
    ids: list[int] = []
    size = recipe.rows * recipe.length
    for text in corpus.documents(seed=recipe.seed):
        ids += [*tokenizer(text).input_ids, tokenizer.eos_token_id]
        if len(ids) >= size:
            yield torch.tensor(ids[:size]).view(recipe.rows, recipe.length)
            ids = ids[size:]


def _pretrain(model: Any, *, tokenizer: Any, recipe: Recipe) -> float:
    """Train on the generated text; the mean loss of the last twenty steps, in nats a token."""
    ends = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in ends]
    others = [p for p in model.parameters() if p.ndim != 2 or id(p) in ends]
    optimizers = (
        Muon(matrices, lr=recipe.matrix_lr),
        torch.optim.AdamW(others, lr=recipe.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, _schedule(recipe.num_steps)) for o in optimizers]
    losses = []
    batches = itertools.islice(_batches(tokenizer, recipe=recipe), recipe.num_steps)
    model.train()
    for ids in tqdm.tqdm(batches, total=recipe.num_steps, desc=recipe.architecture, disable=None, leave=False):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        model.zero_grad()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-20:]) / len(losses[-20:])


def _schedule(num_steps: int) -> Callable[[int], float]:
    """Up in a twentieth of the steps, then linearly down to nothing."""
    return lambda step: min((step + 1) / num_steps * 20, (num_steps - step) / num_steps / 0.95, 1.0)
