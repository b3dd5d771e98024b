"""`python -m finetune`: configuration -> checked cells -> claimed folders -> jobs -> summary and exit status.

Exit status: 0 all done (unsupported cells included), 1 a cell failed, 2 invalid command, 75 ended by SIGTERM,
130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser

from finetune import runs
from finetune.cells import CONF, Cell, Invalid, cells
from finetune.config import unsupported
from finetune.launch import Job, Slot, has_gpu, shares, stop
from finetune.progress import Progress, summary

ROOT = Path("multirun")


class Terminated(BaseException):
    """SIGTERM: no error, so that nothing on the way catches it."""


def main() -> None:
    """The command line; `--help`, `--cfg job` and the other questions are answered by Hydra."""
    args = get_args_parser().parse_intermixed_args()
    if args.help or args.hydra_help or args.cfg or args.info or args.shell_completion:
        return _ask_hydra()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        sys.exit(sweep(cells(args, root=ROOT)))
    except Invalid as error:
        print(f"nothing was started:\n{_bullets(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except Terminated:
        print("terminated; the same command goes on", file=sys.stderr)
        sys.exit(75)


def sweep(todo: list[Cell]) -> int:
    """Run every cell that is not done; the exit status."""
    open_cells = [cell for cell in todo if runs.state(cell.folder) not in ("done", "unsupported")]
    with contextlib.ExitStack() as stack:
        # Workers import their libraries while the configuration is checked.
        slots = [] if has_gpu() else _slots(open_cells, 0, stack)
        num_gpus = _preflight(open_cells) if open_cells else 0
        slots = slots or _slots(open_cells, num_gpus, stack)
        progress = stack.enter_context(Progress(num_cells=len(todo)))
        outcomes = _run(todo, slots, progress)
    summary([(cell.name, cell.folder, outcomes[cell.folder]) for cell in todo])
    return 1 if "failed" in outcomes.values() else 0


def _slots(todo: list[Cell], num_gpus: int, stack: contextlib.ExitStack) -> list[Slot]:
    """Room for the cells that run at once."""
    found = _shares(todo, num_gpus)[: max(1, len(todo))]
    return [stack.enter_context(contextlib.closing(Slot(share, forks=bool(todo) and not has_gpu()))) for share in found]


def _shares(todo: list[Cell], num_gpus: int) -> list[dict[str, str]]:
    """What each of the cells that run at once may use: as few at once as the most demanding cell wants."""
    asked = (
        shares(
            cell.config["launch"],
            num_gpus=num_gpus,
            miniature=cell.config["model"]["path"] is None
            and cell.config["model"]["weights"].get(cell.config["scale"]) == "miniature",
        )
        for cell in todo
    )
    return min(asked, key=len, default=[{"OMP_NUM_THREADS": "1"}])


def _run(todo: list[Cell], free: list[Slot], progress: Progress) -> dict[Path, str]:
    """Bring every cell to an end, as many at once as there are slots; how each ended, by folder."""
    outcomes: dict[Path, str] = {}
    waiting = deque(_bases_first(todo) if len(free) > 1 else todo)
    at_work: dict[Path, tuple[Cell, Job, Slot]] = {}

    def end(cell: Cell, outcome: str) -> None:
        outcomes[cell.folder] = outcome
        progress.advance(cell.name, outcome)

    try:
        while waiting or at_work:
            while waiting and free:
                cell = waiting.popleft()
                begun = _begin(cell, free[-1])
                if isinstance(begun, str):
                    end(cell, begun)
                else:
                    at_work[cell.folder] = (cell, begun, free.pop())
            for cell, job, slot in list(at_work.values()):
                if job.ended():
                    del at_work[cell.folder]
                    free.append(slot)
                    runs.release(cell.folder)
                    end(cell, runs.state(cell.folder))
                else:
                    progress.watch(cell.name, cell.folder)
            if at_work:
                time.sleep(0.2)
    except BaseException:
        stop([job for _, job, _ in at_work.values()])
        for folder in at_work:
            runs.release(folder)
        raise
    return outcomes


def _bases_first(todo: list[Cell]) -> list[Cell]:
    """The first cell of every base, then the second of each: bases that must be built are built side by side."""
    seen: Counter[str] = Counter()
    rank: dict[Path, int] = {}
    for cell in todo:
        rank[cell.folder] = seen[cell.folder.parts[-3]]
        seen[cell.folder.parts[-3]] += 1
    return sorted(todo, key=lambda cell: rank[cell.folder])


def _begin(cell: Cell, slot: Slot) -> Job | str:
    """Start a cell's job; or what became of the cell without one: done, unsupported, failed, or running elsewhere."""
    state = runs.state(cell.folder)
    if state in ("done", "unsupported"):
        return state
    try:
        runs.claim(cell.folder, cell.config)
    except runs.Taken:
        return "running"
    except OSError as error:
        return _cannot_write(cell, error)
    try:
        if (cell.folder / "scores.json").exists():  # another sweep ended it since we looked
            runs.release(cell.folder)
            return "done"
        runs.clear(cell.folder)
        reason = unsupported(cell.config)
        if not reason:
            return slot.start(cell.folder, cell.config["launch"])
        runs.write_json(cell.folder / "unsupported.json", {"reason": reason})
    except OSError as error:
        runs.release(cell.folder)
        return _cannot_write(cell, error)
    runs.release(cell.folder)
    return "unsupported"


def _cannot_write(cell: Cell, error: OSError) -> str:
    print(f"{cell.name}: {error}", file=sys.stderr)
    return "failed"


def _preflight(todo: list[Cell]) -> int:
    """What only the libraries and the data can tell, in one child before anything starts; raises `Invalid`.

    The number of GPUs.
    """
    asked: dict[str, dict[str, Any]] = {}
    for cell in todo:
        part = {key: cell.config[key] for key in ("model", "method", "task", "optim", "scale")}
        asked.setdefault(json.dumps(part, sort_keys=True), part)
    child = subprocess.run(
        [sys.executable, "-m", "finetune.preflight"],
        input=json.dumps(list(asked.values())),
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        raise Invalid(f"the check of the configuration failed: {child.stderr.strip()[-2000:]}")
    found = json.loads(child.stdout)
    if found["wrong"]:
        raise Invalid("\n".join(found["wrong"]))
    return int(found["num_gpus"])


def _ask_hydra() -> None:
    import hydra

    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(lambda config: None)()


def _bullets(text: str) -> str:
    return "\n".join(f"  - {line}" for line in text.splitlines())


def _terminate(*_: object) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
