"""The report as one W&B run of the study: the same numbers as a table, and two charts. The folders are the record."""

from __future__ import annotations

import os
from statistics import fmean
from typing import Any, Literal

from finetune.reporting.cells import done
from finetune.reporting.columns import COST, HEALTH, OTHER, rouge
from finetune.reporting.study import Study
from finetune.reporting.tables import absent_word, num_seeds, values


def log_study(study: Study, *, mode: Literal["online", "offline"], project: str = "finetune") -> None:
    """Log the cells of a study. mode: online | offline; whatever W&B raises is the caller's to report."""
    os.environ.setdefault("WANDB_SILENT", "true")
    import wandb

    name = study.folder.absolute().name
    settings = wandb.Settings(init_timeout=5, x_disable_meta=True, save_code=False, console="off", silent=True)
    run = wandb.init(
        dir=study.folder,
        project=project,
        mode=mode,
        group=name,
        job_type="report",
        name=f"{name}/report",
        settings=settings,
    )
    header, rows = cell_table(study)
    table = wandb.Table(columns=header, data=rows)
    lead, trainable = rouge(study.convention)[2].title, COST[0].title
    charts = {
        "quality": wandb.plot.bar(table, "cell", lead, title=lead),
        "cost against quality": wandb.plot.scatter(table, trainable, lead, title=f"{trainable} / {lead}"),
    }
    run.log({"cells": table, **charts})
    run.finish()


def cell_table(study: Study) -> tuple[list[Any], list[Any]]:
    """Header and rows: one line per cell, means over kinds of rows and seeds, None where there is no number."""
    shown = rouge(study.convention) + OTHER + HEALTH + COST
    header: list[Any] = ["cell", "task", "model", "method", "seeds", "state", *(column.title for column in shown)]
    rows: list[Any] = []
    for cell in study.cells:
        names = [f"{cell.model}/{cell.method}", cell.task, cell.model, cell.method, num_seeds(cell)]
        numbers = [values(cell, part="mean", column=column) for column in shown]
        state = "done" if done(cell) else absent_word(cell)
        rows.append([*names, state, *(fmean(found) if found else None for found in numbers)])
    return header, rows
