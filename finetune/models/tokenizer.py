"""The tokenizer of a base, the prompt that a row becomes, and its token ids.

With a chat template the prompt is all that the template writes before the answer. Without one every method uses

    用户：{prompt}\\n助手：{target}<end>

with the earlier turns before it in the same form. Text of the data never becomes a control token: `<|im_end|>` in a
row is read as the ten characters that it is.
"""

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.rows import Row

# Llama 3.2's template writes today's date unless it is given one; this is the date that it names itself.
DATE = "26 Jul 2024"
PRIVATE = range(0xF0000, 0xFFFFE)  # characters without a meaning, to stand for something while a template is filled


@dataclass(frozen=True)
class Example:
    """A row as token ids: the prompt, then the answer with its end token."""

    ids: list[int]
    num_prompt: int  # the first so many of `ids` are the prompt
    prompt_cut: bool = False  # earlier turns or the middle of the question were left out
    target_cut: bool = False  # the answer was longer than the limit, so it has no end token


def load(folder: Path, *, eos_tokens: Sequence[str], template: str | None = None, code: bool = False) -> Any:
    """The tokenizer in that folder; its `eos_token` is what ends an answer, and it has a pad token.

    `template` is None for the tokenizer's own chat template if it has one, or "plain". Raises ValueError.
    """
    import transformers

    tokenizer = _class(folder).from_pretrained(folder, trust_remote_code=code, local_files_only=True)
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: this project needs a tokenizer.json (a fast tokenizer)")
    if template == "plain":
        tokenizer.chat_template = None
    known = [token for token in eos_tokens if token in tokenizer.get_vocab()]
    if known and (tokenizer.chat_template or not tokenizer.eos_token):
        tokenizer.eos_token = known[0]
    if not tokenizer.eos_token:
        raise ValueError(f"{folder}: none of model.eos_tokens={list(eos_tokens)} is a token of this base")
    # An end token that is registered as ordinary could otherwise be written by the data.
    tokens = [transformers.AddedToken(text, special=True, normalized=False) for text in {*known, tokenizer.eos_token}]
    tokenizer.add_tokens(tokens, special_tokens=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _class(folder: Path) -> Any:
    """A tokenizer that says it is a plain `tokenizers` file is one: its base's own class would add tokens to it."""
    import transformers

    path = folder / "tokenizer_config.json"
    named = json.loads(path.read_text(encoding="utf-8")).get("tokenizer_class") if path.exists() else None
    plain = named in ("TokenizersBackend", "PreTrainedTokenizerFast")
    return transformers.PreTrainedTokenizerFast if plain else transformers.AutoTokenizer


def end_ids(tokenizer: Any, *, folder: Path, eos_tokens: Iterable[str]) -> list[int]:
    """The token ids that end an answer, the one that is taught first."""
    vocabulary = tokenizer.get_vocab()
    named = [vocabulary[token] for token in eos_tokens if token in vocabulary]
    file = folder / "generation_config.json"
    stored = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    stored = stored if isinstance(stored, list) else [stored]
    return list(dict.fromkeys(i for i in [tokenizer.eos_token_id, *named, *stored] if i is not None))


def template_hash(tokenizer: Any) -> str:
    """What identifies the form of the prompts: the chat template, or the plain one."""
    template = tokenizer.chat_template or _plain([("{prompt}", "{target}")], "", end="{end}", system=None)
    return hashlib.sha256(json.dumps([template, DATE]).encode()).hexdigest()


def render(row: Row, tokenizer: Any, *, system: str | None = None) -> str:
    """The prompt: everything up to where the answer begins."""
    if not tokenizer.chat_template:
        return _plain(row.history, row.prompt, end=tokenizer.eos_token, system=system)
    answer = _unused([row.prompt, *itertools.chain(*row.history)], 1)[0]
    messages = [{"role": "system", "content": system}] if system else []
    for question, reply in (*row.history, (row.prompt, answer)):
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    # With its generation prompt GLM-4's template ends before the line break that it writes ahead of every answer.
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, date_string=DATE)
    before, found, _ = text.partition(answer)
    if not found:
        raise ValueError("the chat template of this base leaves the answer out; try model.template=plain")
    return before


def encode_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_prompt_tokens: int,
    max_target_tokens: int,
    system: str | None = None,
) -> list[Example]:
    """Every row as token ids, each prompt and each answer (with its end token) within its limit.

    A prompt that is too long loses earlier turns, oldest first, then the middle of its question: instructions stand
    at either end. The template around it stays whole.
    """
    prompts = _fit(rows, tokenizer, limit=max_prompt_tokens, system=system)
    answers = _text_ids([row.target for row in rows], tokenizer)
    examples = []
    for (prompt, prompt_cut), answer in zip(prompts, answers, strict=True):
        target_cut = len(answer) + 1 > max_target_tokens
        target = answer[:max_target_tokens] if target_cut else [*answer, tokenizer.eos_token_id]
        examples.append(Example(prompt + target, len(prompt), prompt_cut, target_cut))
    return examples


def encode(
    row: Row, tokenizer: Any, *, max_prompt_tokens: int, max_target_tokens: int, system: str | None = None
) -> Example:
    """One row as token ids; many at once are quicker with `encode_rows`."""
    limits = {"max_prompt_tokens": max_prompt_tokens, "max_target_tokens": max_target_tokens}
    return encode_rows([row], tokenizer, **limits, system=system)[0]


def _plain(turns: Sequence[tuple[str, str]], prompt: str, *, end: str, system: str | None) -> str:
    earlier = "".join(f"用户：{question}\n助手：{answer}{end}" for question, answer in turns)
    return f"{system}\n" * bool(system) + f"{earlier}用户：{prompt}\n助手："


def _fit(rows: Sequence[Row], tokenizer: Any, *, limit: int, system: str | None) -> list[tuple[list[int], bool]]:
    """Each row's prompt ids within the limit, and whether something was left out."""
    ids = _prompt_ids(rows, tokenizer, system=system)
    current, cut = dict(enumerate(rows)), set()
    while over := [i for i, prompt in enumerate(ids) if len(prompt) > limit]:
        for i in over:
            current[i] = _shorten(current[i], tokenizer, excess=len(ids[i]) - limit)
        for i, prompt in zip(over, _prompt_ids([current[i] for i in over], tokenizer, system=system), strict=True):
            ids[i] = prompt
        cut.update(over)
    return [(prompt, i in cut) for i, prompt in enumerate(ids)]


def _shorten(row: Row, tokenizer: Any, *, excess: int) -> Row:
    """The row without `excess` tokens of its earlier turns or, when there are none, of its question's middle."""
    if row.history:
        lengths = [len(q) + len(a) for q, a in (_text_ids(turn, tokenizer) for turn in row.history)]
        num_dropped = next((n for n in range(1, len(lengths)) if sum(lengths[:n]) >= excess), len(lengths))
        return dataclasses.replace(row, history=row.history[num_dropped:])
    if not row.prompt:
        raise ValueError(f"task.max_prompt_tokens is {excess} tokens too small for the template alone (row {row.id})")
    call = tokenizer(row.prompt, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    spans = call.offset_mapping
    num_kept = max(0, len(spans) - excess)
    dropped = spans[num_kept - num_kept // 2 : len(spans) - num_kept // 2] or [(0, len(row.prompt))]
    # Several tokens of one rare character share its span: the character goes as a whole.
    shorter = row.prompt[: dropped[0][0]] + row.prompt[dropped[-1][1] :]
    return dataclasses.replace(row, prompt=min(shorter, row.prompt[:-1], key=len))


def _text_ids(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of texts of the data: no control tokens, whatever they spell."""
    if not texts:
        return []
    call = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)
    ids: list[list[int]] = call.input_ids
    return ids


def _prompt_ids(rows: Sequence[Row], tokenizer: Any, *, system: str | None) -> list[list[int]]:
    """Ids of the prompts, in which only the template writes control tokens."""
    control = _control_tokens(tokenizer)
    spelled = re.compile("|".join(map(re.escape, control)))
    texts = [text for row in rows for text in (row.prompt, *itertools.chain(*row.history))]
    stand_ins = dict(zip(control, _unused(texts, len(control)), strict=True))
    prompts = [render(_hide(row, spelled, stand_ins), tokenizer, system=system) for row in rows]
    hidden = re.compile("|".join(stand_ins.values()))
    usual = [i for i, prompt in enumerate(prompts) if not hidden.search(prompt)]
    start = _start_ids(tokenizer)
    ids = dict(zip(usual, _joint_ids([prompts[i] for i in usual], tokenizer), strict=True))
    originals = {stand_in: text for text, stand_in in stand_ins.items()}
    for i in range(len(rows)):
        if i not in ids:
            parts = re.split(f"({spelled.pattern})", prompts[i])  # text, control token, text, ...
            parts[::2] = [hidden.sub(lambda match: originals[match[0]], text) for text in parts[::2]]
            ids[i] = _apart_ids(parts, tokenizer)
    return [start + ids[i] for i in range(len(rows))]


def _joint_ids(prompts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    if not prompts:
        return []
    ids: list[list[int]] = tokenizer(list(prompts), add_special_tokens=False, return_attention_mask=False).input_ids
    return ids


def _apart_ids(parts: Sequence[str], tokenizer: Any) -> list[int]:
    """Ids of texts and control tokens in turn: what a tokenizer does with a prompt, but for what the data spells."""
    texts = _text_ids(parts[::2], tokenizer)
    control: list[list[int]] = [[tokenizer.convert_tokens_to_ids(token)] for token in parts[1::2]]
    return [i for text, token in zip(texts, [*control, []], strict=True) for i in text + token]


def _hide(row: Row, spelled: re.Pattern[str], stand_ins: dict[str, str]) -> Row:
    """The row with a stand-in for every control token that its texts spell."""
    if not any(spelled.search(text) for text in (row.prompt, *itertools.chain(*row.history))):
        return row
    texts = [
        spelled.sub(lambda match: stand_ins[match[0]], text) for text in (row.prompt, *itertools.chain(*row.history))
    ]
    history = tuple(zip(texts[1::2], texts[2::2], strict=True))
    return dataclasses.replace(row, prompt=texts[0], history=history)


def _control_tokens(tokenizer: Any) -> list[str]:
    """The longest first, so that a pattern of all of them prefers it."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)


def _start_ids(tokenizer: Any) -> list[int]:
    """What goes before a plain prompt; a chat template writes its own."""
    ids: list[int] = [] if tokenizer.chat_template else tokenizer("").input_ids[:1]
    return ids if ids == [tokenizer.bos_token_id] else []


def _unused(texts: Iterable[str], number: int) -> list[str]:
    """So many private characters that the texts do not contain."""
    used = set().union(*texts)
    return list(itertools.islice((chr(code) for code in PRIVATE if chr(code) not in used), number))
