"""The copy of a run in Weights & Biases. The folder is the record: a failure here never loses a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

TABLE_ROWS = 200  # predictions shown in W&B; all of them are in predictions.jsonl


class Tracker:
    """A W&B run that swallows its own errors."""

    def __init__(self, run: Path, config: Mapping[str, Any] | None) -> None:
        self.run: Any = None
        if config and config["wandb"]["mode"] != "disabled":
            self._try(self._start, run, config)

    def step(self, line: Mapping[str, Any]) -> None:
        """The numbers of one optimizer step."""
        names = {
            "loss": "train/loss",
            "lr": "train/lr",
            "valid_loss": "valid/loss",
            "gradient_norm": "train/gradient_norm",
        }
        shown = {k: v for k, v in line.items() if k not in ("step", "num_steps") and v is not None}
        values = {names.get(k, f"train/{k}"): v for k, v in shown.items()}
        self._try(lambda: self.run.log(values, step=line["step"]))

    def finish(self, scores: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> None:
        """The scores, a table of predictions, the end."""
        self._try(self._finish, scores, predictions)

    def _start(self, run: Path, config: Mapping[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        names = [config[key]["name"] for key in ("task", "model", "method")]
        self.run = wandb.init(
            dir=run,
            project=config["wandb"]["project"],
            mode=config["wandb"]["mode"],
            group=config["study"],
            job_type="train",
            name="/".join([*names, f"seed{config['seed']}"]),
            tags=names,
            config={**config},
            reinit="finish_previous",  # of a cell that lost its tracker in this process
            settings=wandb.Settings(
                init_timeout=5, x_disable_meta=True, save_code=False, console="off", silent=True, disable_git=True
            ),
        )

    def _finish(self, scores: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]) -> None:
        import wandb

        self.run.summary.update({f"valid/{k}": v for k, v in scores["scores"]["mean"].items()})
        self.run.summary.update({f"cost/{k}": v for k, v in scores["cost"].items()})
        columns: list[Any] = ["id", "task", "prompt", "reference", "prediction", "finish_reason"]
        rows: list[Any] = [[line[column] for column in columns] for line in predictions[:TABLE_ROWS]]
        self.run.log({"predictions": wandb.Table(columns=columns, data=rows)})
        self.run.finish()

    def _try(self, action: Any, *arguments: Any) -> None:
        if self.run is None and action != self._start:
            return
        try:
            action(*arguments)
        except Exception as error:  # whatever W&B raises: the run goes on without it
            log.warning("W&B: %s; the run goes on without it", error)
            self.run = None
