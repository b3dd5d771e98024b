"""How an item becomes the fields of a row: the little language of `task.fields`.

A text field is a template. `{ask}` is the text under the item's key `ask`; `{output|target}` the one of these keys that
the file has; `{input?}` may be missing or empty, and a line of the template whose optional keys are all empty is left
out; `{{` and `}}` are braces. There are no attributes, indices, conversions or format specifications, so that a
template can reach nothing but the item. A list field (`choices`, `history`) is the bare name of a key, with the same
`|` and `?`.
"""

import ast
import json
import string
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from finetune.data.files import near, refuse

TEXTS = ("id", "task", "kind", "prompt", "target")
LISTS = ("choices", "history")
REQUIRED = ("task", "kind", "prompt", "target")


@dataclass(frozen=True, slots=True)
class Slot:
    """Literal text and the key whose text follows it; the key is "" where there is none."""

    literal: str
    key: str = ""
    optional: bool = False


Template = tuple[tuple[Slot, ...], ...]  # the slots of each line


def problems(fields: Mapping[str, Any]) -> list[str]:
    """What is wrong with `task.fields` itself, before any file is read."""
    known = (*TEXTS, *LISTS)
    found = [f"task.fields.{name} is not a field{near(name, known)}" for name in fields if name not in known]
    found += [f"task.fields.{name} is not set" for name in REQUIRED if not fields.get(name)]
    for name in known:
        try:
            parse(fields.get(name) or "", name=name)
        except ValueError as error:
            found.append(str(error))
    return found


def parse(template: Any, *, name: str) -> Template:
    """The lines of a template with their references (`output|target?`) as keys; ValueError where it is malformed."""
    if not isinstance(template, str):
        refuse(f"task.fields.{name} must be text, found {type(template).__name__}")
    if name in LISTS:
        return ((_slot("", template, name=name),),) if template else ()
    try:
        lines = [list(string.Formatter().parse(line)) for line in template.split("\n")]
    except ValueError as error:
        refuse(f"task.fields.{name}: {error} in {template!r}; a brace that is meant as such is written twice")
    for _, reference, specification, conversion in (part for line in lines for part in line):
        if specification or conversion:
            refuse(f"task.fields.{name}: {{{reference}}} takes no conversion or format specification")
    return tuple(tuple(_slot(text, key, name=name) for text, key, _, _ in line) for line in lines)


def settle(template: Template, present: Set[str], *, where: str, name: str) -> Template:
    """The template with the keys that this file has; ValueError naming `where` for a required key that it lacks."""
    return tuple(tuple(_settle(slot, present, where=where, name=name) for slot in line) for line in template)


def fill(template: Template, values: Mapping[str, Any], *, name: str) -> str:
    """The text of a settled template; ValueError for a missing key or a value that is not text."""
    if not template:
        return ""
    if len(template) == len(template[0]) == 1 and not template[0][0].optional:  # nearly every field: half the time
        return template[0][0].literal + _text(template[0][0], values, name=name)
    lines = []
    for line in template:
        texts = [_text(slot, values, name=name) for slot in line]
        optional = [text for slot, text in zip(line, texts, strict=True) if slot.optional]
        if not optional or any(text.strip() for text in optional):
            lines.append("".join(slot.literal + text for slot, text in zip(line, texts, strict=True)))
    return "\n".join(lines)


def listed(template: Template, values: Mapping[str, Any]) -> list[Any]:
    """The list under the key of a list field: null is empty; text (some published files, every CSV) is read as one."""
    if not template or not template[0][0].key:
        return []
    slot = template[0][0]
    value = values.get(slot.key) if slot.optional else values[_present(slot.key, values)]
    if isinstance(value, str):
        value = _read_list(value, key=slot.key)
    if value is not None and not isinstance(value, list):
        refuse(f"key {slot.key!r} must be a list, found {_kind(value)}")
    return value or []


def _slot(literal: str, reference: str | None, *, name: str) -> Slot:
    if reference is None:
        return Slot(literal)
    keys = reference.removesuffix("?")
    if not all(key.strip() for key in keys.split("|")) or any(mark in keys for mark in ".[]{}?!"):
        refuse(f"task.fields.{name}: {reference!r} is not the plain name of a key (`ask`, `output|target`, `input?`)")
    return Slot(literal, keys, optional=reference.endswith("?"))


def _settle(slot: Slot, present: Set[str], *, where: str, name: str) -> Slot:
    names = slot.key.split("|")
    found = [key for key in names if key in present]
    if len(found) > 1:
        refuse(f"{where}: both {found[0]!r} and {found[1]!r} occur; name the one for task.fields.{name}")
    if slot.key and not found and not slot.optional:
        wanted = " or ".join(repr(key) for key in names)
        refuse(f"{where}: no key {wanted} for task.fields.{name}{_hint(names, present)}")
    if slot.key and not found:
        # An optional key with a typing error would be left out without a word.
        typo = next((hint for key in names if (hint := near(key, present, cutoff=0.85))), "")
        return (
            refuse(f"{where}: no key {slot.key!r} for task.fields.{name}{typo}")
            if typo
            else Slot(slot.literal, "", optional=True)
        )
    return Slot(slot.literal, found[0] if found else "", slot.optional)


def _hint(names: list[str], present: Set[str]) -> str:
    hints = (near(key, present) for key in names)
    return next((hint for hint in hints if hint), "") + f" (there are {', '.join(sorted(present))})"


def _present(key: str, values: Mapping[str, Any]) -> str:
    if key not in values:
        refuse(f"no key {key!r}{_hint([key], values.keys())}")
    return key


def _text(slot: Slot, values: Mapping[str, Any], *, name: str) -> str:
    """The text under the slot's key; "" for no key and for an optional one that is missing or null."""
    if not slot.key or (slot.optional and values.get(slot.key) is None):
        return ""
    value = values[_present(slot.key, values)]
    if value is None and name in ("prompt", "target"):
        return ""  # as empty as an empty text, and counted or refused with it
    if name == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        refuse(f"key {slot.key!r} must be text, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _read_list(text: str, *, key: str) -> list[Any] | None:
    """A list written as JSON or as Python wrote it (`['是的', '不是']`); literals only, nothing is evaluated."""
    if not text.strip():
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if value is None or isinstance(value, list):
            return value
    return refuse(f"key {key!r} must be a list or a list written as text, found {text[:40]!r}")
