"""`--rescore`: every score again from predictions.jsonl, on all cores, without torch."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from finetune import runs
from finetune.reporting.lines import dump, load
from finetune.scores import aggregate, score_row

ROWS_AT_ONCE = 500  # 0.3 s of work: one large file keeps all cores busy, and sending rows costs little
RUNS_AHEAD = 4  # being scored while another is written


def rescore(folders: Sequence[Path], *, num_processes: int | None = None) -> Iterator[tuple[Path, str]]:
    """Write predictions.jsonl and scores.json of each folder again; yields the folder and what was wrong ("": nothing).

    A folder with a line that cannot be read is left as it is.
    """
    waiting: deque[tuple[Path, list[Future[list[bytes]]]]] = deque()
    with ProcessPoolExecutor(num_processes or _num_cores()) as pool:
        for folder in folders:
            try:
                lines = (folder / "predictions.jsonl").read_bytes().split(b"\n")
            except OSError as error:
                yield folder, str(error)
                continue
            starts = range(0, len(lines), ROWS_AT_ONCE)
            jobs = [pool.submit(_score_lines, lines[start : start + ROWS_AT_ONCE], start + 1) for start in starts]
            waiting.append((folder, jobs))
            if len(waiting) > RUNS_AHEAD:
                yield _finish(*waiting.popleft())
        while waiting:
            yield _finish(*waiting.popleft())


def _num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _finish(folder: Path, jobs: Sequence[Future[list[bytes]]]) -> tuple[Path, str]:
    try:
        lines = [line for job in jobs for line in job.result()]
        record = runs.read_json(folder / "scores.json") | {"scores": aggregate(list(map(load, lines)))}
        runs.write_text(folder / "predictions.jsonl", b"".join(line + b"\n" for line in lines).decode())
        runs.write_json(folder / "scores.json", record)
    except (OSError, ValueError) as error:
        return folder, str(error)
    return folder, ""


def _score_lines(lines: Sequence[bytes], first: int) -> list[bytes]:
    """In a process of the pool: lines of predictions.jsonl with new scores. ValueError names the line."""
    return [_score_line(line, number) for number, line in enumerate(lines, first) if line.strip()]


def _score_line(line: bytes, number: int) -> bytes:
    try:
        row: dict[str, Any] = load(line)
        row["scores"] = score_row(row)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"predictions.jsonl:{number}: {type(error).__name__}: {error}") from error
    return dump(row)
