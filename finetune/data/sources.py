"""Files -> items: one dict per row and the line it starts on. Standard library only, so that errors name file and line.

A reader takes plain keywords from `task.source` and returns a list of `Item`s in file order; whatever is wrong with the
file is raised as one ValueError that lists the first problems and says what to do. Where only some rows are wrong it is
a `BadRows`, which holds the others.
"""

import csv as csv_format
import importlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.data.files import near, read_text, refuse, refuse_all, refuse_rows

READERS = tuple(
    f"finetune.data.{name}" for name in ("clinic.read", "sources.csv", "sources.json_lines", "sources.json_list")
)
_SPACE = re.compile(r"[ \t\r\n]*")  # what JSON counts as white space
_decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: _object(pairs))


@dataclass(frozen=True, slots=True)
class Item:
    """One row as the file has it, and the line (from 1) where it starts."""

    values: dict[str, Any]
    line: int


def read(source: Mapping[str, Any]) -> list[Item]:
    """What the reader named by `_target_` gives; a generator's dicts are numbered from 1."""
    arguments = {key: value for key, value in source.items() if key != "_target_"}
    reader = _reader(source["_target_"])
    try:
        inspect.signature(reader).bind(**arguments)
    except TypeError as error:
        takes = ", ".join(inspect.signature(reader).parameters)
        refuse(f"task.source: {error}; {source['_target_']} takes {takes}")
    if missing := [key for key, value in arguments.items() if value is None and key != "path"]:
        refuse(f"task.source.{missing[0]} is null; {source['_target_']} needs a value")
    items = [x if isinstance(x, Item) else Item(_as_object(x), i) for i, x in enumerate(reader(**arguments), start=1)]
    return items or refuse(f"{origin(source)} gives no rows")


def origin(source: Mapping[str, Any]) -> str:
    """How errors name the source: the file, or the generator."""
    return str(source.get("path") or source["_target_"])


def stem(source: Mapping[str, Any]) -> str:
    """How row ids name the source: the file's stem, or the generator's module."""
    return Path(str(source["path"])).stem if source.get("path") else str(source["_target_"]).split(".")[-2]


def json_lines(*, path: str, encoding: str = "utf-8") -> list[Item]:
    """One JSON object a line; blank lines are passed over."""
    text = read_text(path, encoding=encoding)
    if text.lstrip()[:1] == "[":
        refuse(f"{path} is one JSON list, not JSON lines: task.source._target_=finetune.data.sources.json_list")
    items, problems = [], []
    # Not splitlines(): U+2028 and U+0085 may stand inside a JSON string.
    for line, content in enumerate(text.split("\n"), start=1):
        if content.strip():
            try:
                items.append(Item(_as_object(_decoder.decode(content.strip())), line))
            except (ValueError, RecursionError) as error:
                problems.append(f"{path}:{line}: {_explain(error)}")
    refuse_rows(problems, kept=items)
    return items or refuse(f"{path} is empty")


def json_list(*, path: str, encoding: str = "utf-8") -> list[Item]:
    """One JSON list of objects."""
    text = read_text(path, encoding=encoding)
    position = _skip(text, 0)
    if text[position] != "[":
        found = "JSON lines" if text[position] == "{" else repr(text[position])
        hint = ": task.source._target_=finetune.data.sources.json_lines" if found == "JSON lines" else ""
        refuse(f"{path} starts like {found}, expected a JSON list of objects{hint}")
    items: list[Item] = []
    problems: list[str] = []
    whole = False
    line, counted = 1, 0
    try:
        position = _skip(text, position + 1)
        closed = text[position] == "]"
        while not closed:
            line, counted = line + text.count("\n", counted, position), position
            value, position = _decoder.raw_decode(text, position)
            try:
                items.append(Item(_as_object(value), line))
            except ValueError as error:
                problems.append(f"{path}:{line}: {error}")
            closed, position = _after_element(text, position)
        if _skip(text, position + 1) < len(text):
            raise json.JSONDecodeError("more text after the end of the list", text, _skip(text, position + 1))
        whole = True
    except (ValueError, RecursionError, IndexError) as error:
        where = error.lineno if isinstance(error, json.JSONDecodeError) else line
        problems.append(f"{path}:{where}: {_explain(error)}")
    if not whole:  # what follows the damage is unknown: no single row is wrong
        refuse_all(problems)
    refuse_rows(problems, kept=items)
    return items or refuse(f"{path} holds an empty list")


def csv(*, path: str, encoding: str = "utf-8") -> list[Item]:
    """Comma-separated values; the first line names the columns. A quoted value may span lines."""
    reader = csv_format.reader(_with_line_ends(read_text(path, encoding=encoding)), strict=True)
    items: list[Item] = []
    problems: list[str] = []
    start = 1
    try:
        columns = next(reader)
        if twice := sorted({name for name in columns if columns.count(name) > 1}):
            refuse(f"{path}:1: columns named twice: {', '.join(twice)}")
        start = reader.line_num + 1
        for values in reader:
            if len(values) == len(columns):
                items.append(Item(dict(zip(columns, values, strict=True)), start))
            elif values:  # a blank line is an empty list
                problems.append(
                    f"{path}:{start}: {len(values)} values for {len(columns)} columns: {', '.join(columns)}"
                )
            start = reader.line_num + 1
    except csv_format.Error as error:
        problems.append(f"{path}:{start}: {error}; is the quotation mark that opens a value of this row closed?")
        refuse_all(problems)
    refuse_rows(problems, kept=items)
    return items or refuse(f"{path} has a line of column names and no rows")


def _reader(target: str) -> Callable[..., Iterable[Any]]:
    """A public function defined under `finetune.data`: a configuration can call nothing else."""
    module, _, name = str(target).rpartition(".")
    if module.startswith("finetune.data.") and name.isidentifier() and not name.startswith("_"):
        try:
            found = getattr(importlib.import_module(module), name, None)
        except ModuleNotFoundError:
            found = None
        if inspect.isfunction(found) and found.__module__ == module:
            return found
    return refuse(
        f"task.source._target_={target} is not a reader{near(str(target), READERS)} (there are {', '.join(READERS)})"
    )


def _with_line_ends(text: str) -> list[str]:
    return re.findall(r"[^\n]*\n|[^\n]+$", text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a key given twice is refused, because which value is meant is anyone's guess."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        refuse(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return values


def _as_object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else refuse(f"expected a JSON object, found {type(value).__name__}")


def _skip(text: str, position: int) -> int:
    """The next position that is not white space."""
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _after_element(text: str, position: int) -> tuple[bool, int]:
    """From the end of one list element: whether the list is closed, and where that is or the next element starts."""
    position = _skip(text, position)
    if text[position] == "]":
        return True, position
    if text[position] != ",":
        raise json.JSONDecodeError("expected ',' or ']'", text, position)
    return False, _skip(text, position + 1)


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, IndexError):
        return "the list is not closed: the file is cut off"
    if isinstance(error, json.JSONDecodeError):
        return f"invalid or truncated JSON ({error.msg}, column {error.colno})"
    return str(error)
