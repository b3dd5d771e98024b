"""Seconds of whole cells and grids, from measured short ones: wall time, plus what is longer at the steady rates.

    seconds(command) = wall seconds of the short command
                     + sum over its cells of (tokens to train - tokens it trained) / steady tokens per second
                     + sum over its cells of (rows to answer - rows it answered) x steady seconds of an answer

The short command is a real one: it imports, loads, starts, trains, answers, scores and checks. Steady is what comes
after the warm-up: of the steps after the eighth, of a peer's answers the second half, scored. This project answers all
of its rows. A tool that trains one cell a process and was measured with one takes as many times that for a grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MEAN_TOKENS = 240  # of a row: see benchmarks.rows
ROWS, EPOCHS, ANSWERS = 2000, 3, 500  # of the cell that is compared
CELLS = 5  # of the grid: lora, qlora, prefix, prompt, ptuning


def seconds(line: Mapping[str, Any], *, num_rows: int = ROWS, epochs: float = EPOCHS, answers: int = ANSWERS) -> float:
    """Of the command of a line, had its cells had so many rows."""
    tokens = num_rows * epochs * MEAN_TOKENS
    return float(line["wall_seconds"]) + sum(
        _more(cell, num_tokens=tokens, answers=answers) for cell in line["cells"].values()
    )


def grid_seconds(line: Mapping[str, Any], *, num_cells: int = CELLS, **sizes: Any) -> float:
    """Of so many cells: a command that had them all, or a single cell so many times."""
    measured = len(line["cells"])
    if measured not in (1, num_cells):
        raise ValueError(f"{line['who']}: {measured} cells were measured, which say nothing about {num_cells}")
    return seconds(line, **sizes) * (num_cells / measured)


def _more(cell: Mapping[str, Any], *, num_tokens: float, answers: int) -> float:
    training = (num_tokens - cell["num_tokens"]) / cell["tokens_per_second"]
    answering = (answers - cell["answers"]) * cell["seconds_an_answer"]
    return float(training + answering)
