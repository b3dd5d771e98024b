"""Which rows train and which validate, by file order or by a hash of the row id: positions, in file order."""

import hashlib
from collections.abc import Sequence
from typing import TypeVar

from finetune.data.files import refuse

T = TypeVar("T")


def by_order(num_rows: int, *, train_rows: int | None, valid_rows: int | None) -> tuple[range, range]:
    """The first `train_rows` train, the `valid_rows` after them validate; a null takes what the other leaves."""
    if train_rows is None and valid_rows is None:
        refuse("no validation rows: set task.valid_rows, task.valid_fraction or task.source.valid_path")
    num_train = num_rows - (valid_rows or 0) if train_rows is None else train_rows
    num_valid = num_rows - num_train if valid_rows is None else valid_rows
    if num_train < 1 or num_valid < 1 or num_train + num_valid > num_rows:
        refuse(
            f"task.train_rows={_text(train_rows)} and task.valid_rows={_text(valid_rows)} do not fit: "
            f"there are {num_rows} rows, and each side needs one"
        )
    return range(num_train), range(num_train, num_train + num_valid)


def by_hash(ids: Sequence[str], *, valid_fraction: float) -> tuple[list[int], list[int]]:
    """About that share validates, at least one row on each side. Rows keep their side when others come."""
    if not 0 < valid_fraction < 1:
        refuse(f"task.valid_fraction={valid_fraction} must be between 0 and 1")
    if len(ids) < 2:
        refuse(f"task.valid_fraction needs at least 2 rows, there are {len(ids)}")
    places = [_place(id) for id in ids]
    # The lowest place always validates and the highest always trains, so that neither side is empty.
    lowest, highest = places.index(min(places)), places.index(max(places))
    valid = {i for i, place in enumerate(places) if place < valid_fraction} - {highest} | {lowest}
    return [i for i in range(len(ids)) if i not in valid], sorted(valid)


def first(rows: Sequence[T], num_rows: int | None, *, key: str) -> Sequence[T]:
    """The first rows of a side (null: all); ValueError when there are fewer than `task.<key>` asks for."""
    if num_rows is None:
        return rows
    if not 1 <= num_rows <= len(rows):
        refuse(f"task.{key}={num_rows} does not fit: there are {len(rows)} such rows")
    return rows[:num_rows]


def _place(id: str) -> float:
    """Where the id falls between 0 and 1, the same on every machine."""
    return int.from_bytes(hashlib.sha256(id.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64


def _text(num_rows: int | None) -> str:
    return "null" if num_rows is None else str(num_rows)
