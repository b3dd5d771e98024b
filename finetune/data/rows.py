"""Items -> rows -> training and validation rows, as a task's YAML says. No torch: rows are checked before a job starts.

Row order is part of the contract: both sides keep the order of the file.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from finetune.data import sources, split, templates
from finetune.data.files import BadRows, listed, near, refuse, refuse_all, refuse_rows
from finetune.data.sources import Item

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One example: what the base reads and what it should answer."""

    id: str
    task: str
    kind: str  # PromptCBLUE's task_type words, `dialogue` or `instruction`
    prompt: str
    target: str
    choices: tuple[str, ...] = ()  # the answers to choose from, where the task has such
    history: tuple[tuple[str, str], ...] = ()  # earlier (question, answer) turns


@dataclass(frozen=True)
class Split:
    """The rows of a task, what was counted on the way, and what identifies them."""

    train: tuple[Row, ...]
    valid: tuple[Row, ...]
    notes: dict[str, int]  # counts of rows; see `load`
    data_hash: str  # of everything in the source, whatever its encoding and whether used or not
    templates_hash: str  # of `fields` and `version`
    bad: tuple[str, ...] = ()  # what is wrong with the rows that were left out, by file and line


def load(task: Mapping[str, Any]) -> Split:
    """The rows of a `task` configuration (plain containers); ValueError lists what is wrong with it or with its data.

    Notes: rows `read`, `bad` ones left out, `skipped` as empty, `train`, `valid`, `leaks` (validation prompts, with
    their history, that occur in training), `dropped` of these, `duplicates` (prompt, history and target occurred
    before).
    """
    fields = task["fields"] or {}
    forms = [fields, *({**fields, "prompt": template} for template in task.get("rewordings") or ())]
    refuse_all([problem for form in forms for problem in templates.problems(form)])
    files = _files(task["source"])
    items, rows, bad, num_read = _good(files, task=task)
    train, valid = _sides(rows, task=task)
    known = {_question(row) for row in train}
    new = [row for row in valid if _question(row) not in known]
    kept = new if task.get("drop_leaks") else valid
    if not kept:
        refuse(f"task.drop_leaks leaves no validation rows: all {len(valid)} occur in training")
    pairs = [(*_question(row), row.target) for row in (*train, *kept)]
    counts = {"read": num_read, "bad": len(bad), "skipped": num_read - len(bad) - sum(map(len, rows))}
    counts |= {"train": len(train), "valid": len(kept)}
    counts |= {"leaks": len(valid) - len(new), "dropped": len(valid) - len(kept)}
    counts |= {"duplicates": len(pairs) - len(set(pairs))}
    content = _hash([[item.values for item in some] for some in items])
    forms_hash = _hash([task["version"], dict(task["fields"])])
    return Split(tuple(train), tuple(kept), counts, content, forms_hash, tuple(bad))


def reworded(task: Mapping[str, Any], template: str) -> tuple[Row, ...]:
    """The validation rows of `task`, their prompts written as `template` says; raises ValueError as `load` does."""
    fields = {**task["fields"], "prompt": template}
    return load({**task, "fields": fields, "drop_leaks": False, "rewordings": ()}).valid


def _files(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The source once, or once for `path` and once for `valid_path`."""
    one = {key: value for key, value in source.items() if key != "valid_path"}
    valid_path = source.get("valid_path")
    if not valid_path:
        return [one]
    if Path(str(valid_path)).resolve() == Path(str(one.get("path"))).resolve():
        refuse(f"task.source.path and task.source.valid_path are the same file: {valid_path}")
    return [one, {**one, "path": valid_path}]


def _good(
    files: list[dict[str, Any]], *, task: Mapping[str, Any]
) -> tuple[list[list[Item]], list[list[Row]], list[str], int]:
    """Items and good rows of every file, what is wrong with the others, and how many there are; or ValueError."""
    items: list[list[Item]] = []
    rows: list[list[Row]] = []
    bad: list[str] = []
    total = 0
    for file in files:
        some, unread = _kept(functools.partial(sources.read, file))
        if not some:
            refuse_all(unread)
        made, wrong = _kept(functools.partial(_rows, some, task=task, file=file))
        items.append(some)
        rows.append(made)
        bad += [*unread, *wrong]
        total += len(some) + len(unread)
    if task.get("on_bad_row", "refuse") == "refuse":
        refuse_all(bad)
    if len(bad) > (limit := task.get("max_bad_share", 0)) * total:
        refuse(f"{len(bad)} of {total} rows are wrong, more than task.max_bad_share={limit}:\n{listed(bad)}")
    return items, rows, bad, total


def _kept(read: Callable[[], list[T]]) -> tuple[list[T], list[str]]:
    """What is good of it, and what is wrong with the rest."""
    try:
        return read(), []
    except BadRows as error:
        return error.kept, error.problems


def _sides(rows: list[list[Row]], *, task: Mapping[str, Any]) -> tuple[Sequence[Row], Sequence[Row]]:
    """Training and validation rows: from two files, by hash or by order."""
    first, only = rows[0], task.get("only")
    num_train, num_valid = task.get("train_rows"), task.get("valid_rows")
    if "path" not in task["source"]:
        # A generator makes as many rows, of all its tasks, as it was asked for: the sides are its, `only` comes after.
        if task.get("valid_fraction") is not None:
            refuse("task.valid_fraction is for files: generated rows come with their sides; use task.valid_rows")
        train, valid = split.by_order(len(first), train_rows=num_train, valid_rows=num_valid)
        return _only([first[i] for i in train], only), _only([first[i] for i in valid], only)
    kept = [_only(some, only) for some in rows]
    share = task.get("valid_fraction")
    if len(kept) == 1 and share is None:
        train, valid = split.by_order(len(kept[0]), train_rows=num_train, valid_rows=num_valid)
        return [kept[0][i] for i in train], [kept[0][i] for i in valid]
    if len(kept) == 1 and share is not None:
        sides = split.by_hash([row.id for row in kept[0]], valid_fraction=share)
        kept = [[kept[0][i] for i in side] for side in sides]
    return split.first(kept[0], num_train, key="train_rows"), split.first(kept[1], num_valid, key="valid_rows")


def _rows(items: list[Item], *, task: Mapping[str, Any], file: Mapping[str, Any]) -> list[Row]:
    """The rows of one source, in order; ValueError with file and line of the first problems."""
    origin, stem = sources.origin(file), sources.stem(file)
    fields = _settled(items, fields=task["fields"], where=f"{origin}:{items[0].line}")
    defaults = {"task": task["name"], "kind": "instruction"}
    # A JSON list may stand in one line: then its rows are told apart by their number.
    one_a_line = len({item.line for item in items}) == len(items)
    rows: list[Row] = []
    problems: list[str] = []
    places: dict[str, str] = {}
    for number, item in enumerate(items, start=1):
        place = f"{item.line}" if one_a_line else f"{item.line} (row {number})"
        try:
            row = _row(
                item, fields=fields, defaults={**defaults, "id": f"{stem}:{item.line if one_a_line else number}"}
            )
            if row.id in places:
                refuse(f"id {row.id!r} stands already in line {places[row.id]}")
            places[row.id] = place
            empty = next((name for name in ("prompt", "target") if not getattr(row, name).strip()), None)
            if empty and not task.get("skip_empty"):
                refuse(f"the {empty} is empty; task.skip_empty=true leaves such rows out")
            rows += [] if empty else [row]
        except ValueError as error:
            problems.append(f"{origin}:{place}: {error}")
    refuse_rows(problems, kept=rows)
    return rows


def _settled(items: list[Item], *, fields: Mapping[str, Any], where: str) -> dict[str, templates.Template]:
    """The fields with the keys that occur in this source; all missing ones are named together."""
    present = set().union(*(item.values for item in items))
    settled: dict[str, templates.Template] = {}
    problems: list[str] = []
    for name, template in fields.items():
        try:
            parsed = templates.parse(template or "", name=name)
            settled[name] = templates.settle(parsed, present, where=where, name=name)
        except ValueError as error:
            problems.append(str(error))
    refuse_all(problems)
    return settled


def _row(item: Item, *, fields: Mapping[str, templates.Template], defaults: Mapping[str, str]) -> Row:
    texts = {name: templates.fill(fields.get(name, ()), item.values, name=name) for name in templates.TEXTS}
    texts |= {name: texts[name] if texts[name].strip() else default for name, default in defaults.items()}
    choices, turns = (templates.listed(fields.get(n, ()), item.values) for n in templates.LISTS)
    if not all(isinstance(choice, str) and choice for choice in choices):
        refuse(f"the choices must be texts, found {choices!r:.60}")
    for turn in turns:
        if not (isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            refuse(f"the history must be [question, answer] pairs of texts, found {turn!r:.60}")
    _check_characters("\n".join((*texts.values(), *choices, *(text for turn in turns for text in turn))))
    return Row(**texts, choices=tuple(choices), history=tuple((question, answer) for question, answer in turns))


def _check_characters(text: str) -> None:
    """JSON can spell what no text file and no tokenizer takes: NUL and half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        refuse(f"half a surrogate pair (U+{ord(text[error.start]):04X}) after {text[: error.start][-20:]!r}")
    if "\0" in text:
        refuse(f"a NUL character after {text[: text.index(chr(0))][-20:]!r}")


def _only(rows: Sequence[Row], only: Iterable[str] | None) -> Sequence[Row]:
    """The rows of the named tasks; ValueError for a name without rows."""
    if only is None:
        return rows
    wanted, there = list(only), {row.task for row in rows}
    for name in wanted:
        if name not in there:
            refuse(f"task.only: no rows of {name!r}{near(name, there)} (there are {', '.join(sorted(there))})")
    return [row for row in rows if row.task in wanted] or refuse("task.only names no task; null keeps all")


def _question(row: Row) -> tuple[str, Any]:
    """What makes two rows the same question: prompt (whatever its white space) and history."""
    return "".join(row.prompt.split()), row.history


def _hash(value: Any) -> str:
    try:
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    except RecursionError:
        return refuse("the data are nested too deeply")
