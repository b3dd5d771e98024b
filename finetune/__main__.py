"""`python -m finetune`: configuration -> checked cells -> claimed folders -> jobs -> summary and exit status.

Exit status: 0 all done (unsupported cells included), 1 a cell failed, 2 invalid command, 75 ended by SIGTERM,
130 interrupted.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser

from finetune import runs
from finetune.cells import CONF, Cell, Invalid, cells
from finetune.config import unsupported
from finetune.launch import supervise
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
    if open_cells:
        _preflight(open_cells)
    outcomes: list[str] = []
    with Progress(num_cells=len(todo)) as progress:
        for cell in todo:
            outcomes.append(_run(cell, progress))
            progress.advance(cell.name, outcomes[-1])
    summary([(cell.name, cell.folder, outcome) for cell, outcome in zip(todo, outcomes, strict=True)])
    return 1 if "failed" in outcomes else 0


def _run(cell: Cell, progress: Progress) -> str:
    """Bring one cell to an end: done, unsupported, failed, or running elsewhere."""
    state = runs.state(cell.folder)
    if state in ("done", "unsupported"):
        return state
    try:
        with runs.owned(cell.folder, cell.config):
            runs.clear(cell.folder)
            reason = unsupported(cell.config)
            if reason:
                runs.write_json(cell.folder / "unsupported.json", {"reason": reason})
                return "unsupported"
            launch = cell.config["launch"]
            supervise(cell.folder, launch, watch=lambda: progress.watch(cell.name, cell.folder))
    except runs.Taken:
        return "running"
    except OSError as error:
        print(f"{cell.name}: {error}", file=sys.stderr)
        return "failed"
    return runs.state(cell.folder)


def _preflight(todo: list[Cell]) -> None:
    """What only the libraries and the data can tell, in one child before anything starts; raises `Invalid`."""
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
    wrong = json.loads(child.stdout)
    if wrong:
        raise Invalid("\n".join(wrong))


def _ask_hydra() -> None:
    import hydra

    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(lambda config: None)()


def _bullets(text: str) -> str:
    return "\n".join(f"  - {line}" for line in text.splitlines())


def _terminate(*_: object) -> None:
    raise Terminated


if __name__ == "__main__":
    main()
