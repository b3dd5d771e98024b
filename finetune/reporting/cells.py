"""Runs -> cells: the seeds of one model x method, on the same base weights and the same data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from finetune.reporting.read import Run


@dataclass(frozen=True)
class Cell:
    """What one table row shows. `model` names the hashes too where runs of one model differ in them."""

    task: str
    model: str
    method: str
    runs: tuple[Run, ...]  # by seed; never of different base weights


def to_cells(runs: Sequence[Run]) -> list[Cell]:
    """Group the runs of one study; sorted by task and model, the untouched base first, then by method."""
    for kind in ("weights", "data"):
        runs = [run for group in _group(runs, "task", "model") for run in _tell_apart(group, kind=kind)]
    groups = [sorted(group, key=_by_seed) for group in _group(runs, "task", "model", "method")]
    cells = [Cell(group[0].task, group[0].model, group[0].method, tuple(group)) for group in groups]
    return sorted(cells, key=lambda cell: (cell.task, cell.model, not _is_base(cell.method), cell.method))


def with_short_names(cells: Sequence[Cell]) -> tuple[list[Cell], list[str]]:
    """The cells without what was changed for every method of the study, and that; one method keeps its name."""
    if len({cell.method for cell in cells}) < 2:
        return list(cells), []
    names, shared = without_shared([cell.method for cell in cells])
    return [replace(cell, method=name) for cell, name in zip(cells, names, strict=True)], shared


def without_shared(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names without the suffixes (`lora+optim.epochs=1`) that all of them have, and these."""
    stems = [name.partition("~")[0].split("+") for name in names]  # behind it: what tells long names apart
    common = [part for part in (stems or [[""]])[0][1:] if all(part in stem[1:] for stem in stems)]
    kept = ["+".join(part for part in stem if part not in common) for stem in stems]
    return ["".join([stem, *name.partition("~")[1:]]) for stem, name in zip(kept, names, strict=True)], common


def done(cell: Cell) -> list[Run]:
    """The runs that have scores."""
    return [run for run in cell.runs if run.state == "done"]


def _is_base(method: str) -> bool:
    return method.split("+")[0] == "none"


def _by_seed(run: Run) -> tuple[int, str]:
    return (int(run.seed), "") if run.seed.isdecimal() else (0, run.seed)


def _group(runs: Iterable[Run], *names: str) -> list[list[Run]]:
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(getattr(run, name) for name in names)].append(run)
    return list(groups.values())


def _tell_apart(runs: Sequence[Run], *, kind: str) -> list[Run]:
    """Put the hash into the model's name where runs of one model differ in it and so cannot be compared."""
    if len({getattr(run, kind) for run in runs if run.state == "done" or getattr(run, kind)}) < 2:
        return list(runs)
    return [replace(run, model=f"{run.model} ({kind} {(getattr(run, kind) or 'unknown')[:8]})") for run in runs]
