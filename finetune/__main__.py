"""`python -m finetune`: configuration -> checked cells -> claimed folders -> jobs -> summary and exit status.

Exit status: 0 all done (unsupported cells included), 1 a cell failed, 2 invalid command, 75 ended by SIGTERM, SIGUSR1
or SIGHUP, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser

from finetune import interrupts, runs
from finetune.alike import counted
from finetune.cells import CONF, Cell, Invalid, cells, only_our_resolvers
from finetune.confidential import hide
from finetune.launch import has_gpu
from finetune.progress import Progress, summary
from finetune.slots import Slot, Worker
from finetune.sweep import failures, run_all, slots

ROOT = Path("multirun")


def main() -> None:
    """The command line; `--help`, `--cfg job` and the other questions are answered by Hydra."""
    args = get_args_parser().parse_intermixed_args()
    only_our_resolvers()
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return _ask_hydra()
    interrupts.listen()
    try:
        sys.exit(sweep(cells(args, root=ROOT)))
    except Invalid as error:
        print(f"nothing was started:\n{_bullets(hide(str(error)))}", file=sys.stderr)
        sys.exit(2)
    except interrupts.Ended as ended:
        interrupts.deaf()
        word = "interrupted" if ended.status == 130 else "terminated"
        print(f"{word}; the same command goes on", file=sys.stderr)
        sys.exit(ended.status)


def sweep(todo: list[Cell]) -> int:
    """Run every cell that is not done; the exit status."""
    before = failures(todo)
    open_cells = [cell for cell in todo if runs.state(cell.folder) not in runs.FINAL]
    with contextlib.ExitStack() as stack:
        room = _room(open_cells, todo, stack)
        progress = stack.enter_context(Progress(num_cells=len(todo)))
        outcomes = run_all(counted(todo), room, progress, before)
    summary([(cell.name, cell.folder, outcomes[cell.folder]) for cell in todo])
    return 0 if all(outcome in runs.FINAL for outcome in outcomes.values()) else 1


def _room(open_cells: list[Cell], todo: list[Cell], stack: contextlib.ExitStack) -> list[Slot]:
    """Room for the cells that are open, which a first worker has checked; raises `Invalid`."""
    if open_cells and has_gpu():  # what there is to share is known when a worker has counted
        first = stack.enter_context(contextlib.closing(Worker({})))
        return slots(open_cells, _preflight(open_cells, todo, first), stack, first=first)
    room = slots(open_cells, 0, stack)  # the workers import side by side
    if open_cells:
        _preflight(open_cells, todo, room[0].begun())
    return room


def _preflight(open_cells: list[Cell], todo: list[Cell], worker: Worker) -> int:
    """What only the libraries and the data can tell, asked of a worker before anything starts; raises `Invalid`.

    The number of GPUs.
    """
    asked: dict[str, dict[str, Any]] = {}
    for cell in open_cells:
        part = {key: cell.config[key] for key in ("model", "method", "task", "optim", "evaluate", "launch", "scale")}
        asked.setdefault(json.dumps(part, sort_keys=True), part)
    found = worker.check(list(asked.values()))
    if found is None:
        raise Invalid(f"the check of the configuration failed: {worker.last_words()}")
    changed = [text for cell in todo if (text := _other_data(cell, found["data"]))]
    if found["wrong"] or changed:
        raise Invalid("\n".join([*found["wrong"], *changed]))
    return int(found["num_gpus"])


def _other_data(cell: Cell, hashes: dict[str, str]) -> str | None:
    """Why the cell's folder is not this cell's: what it holds was made from other data than there are now."""
    now = hashes.get(json.dumps(cell.config["task"], sort_keys=True))
    recorded = None
    with contextlib.suppress(OSError):  # the job says what is wrong with the folder
        recorded = runs.read_environment(cell.folder)["hashes"].get("data")
    if not now or not recorded or now == recorded:
        return None
    file = cell.config["task"]["source"].get("path") or cell.config["task"]["name"]
    return (
        f"{cell.folder} was made from other data ({file}: content {str(recorded)[:8]} -> {now[:8]}); "
        "choose another study=, or remove the folder"
    )


def _ask_hydra() -> None:
    import hydra

    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(lambda config: None)()


def _bullets(text: str) -> str:
    return "\n".join(f"  - {line}" for line in text.splitlines())


if __name__ == "__main__":
    main()
