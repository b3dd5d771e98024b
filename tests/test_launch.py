"""How a machine is shared among the cells that run at once."""

import os

import pytest

from finetune.launch import shares

ONE = {"num_processes": 1, "jobs": None, "device": "auto"}


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """Eight cores, all GPUs visible, memory for everything."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("finetune.launch.BYTES_A_CELL", 1)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("launch", "miniature", "cells", "threads"),
    [
        (ONE, True, 8, 1),
        (ONE, False, 1, 8),
        (ONE | {"jobs": 3}, False, 3, 2),
        (ONE | {"num_processes": 2}, True, 4, 1),
        (ONE | {"jobs": 1, "num_processes": 2}, True, 1, 4),
    ],
    ids=["miniatures", "real-base", "asked-for", "two-ranks", "one-at-once"],
)
def test_cells_share_the_cores(launch, miniature, cells, threads):
    assert shares(launch, num_gpus=0, miniature=miniature) == [{"OMP_NUM_THREADS": str(threads)}] * cells


def test_memory_bounds_the_number_of_cells(monkeypatch):
    monkeypatch.setattr("finetune.launch.BYTES_A_CELL", 10**15)
    assert len(shares(ONE, num_gpus=0, miniature=True)) == 1


@pytest.mark.parametrize(
    ("launch", "visible", "found"),
    [
        (ONE, None, ["0", "1", "2", "3"]),
        (ONE | {"num_processes": 2}, "3,1,2,0", ["3,1", "2,0"]),
        (ONE | {"jobs": 5}, None, ["0", "1", "2", "3", "0"]),
    ],
    ids=["one-a-gpu", "visible-ones-in-pairs", "more-than-gpus"],
)
def test_cells_share_the_gpus(monkeypatch, launch, visible, found):
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [share["CUDA_VISIBLE_DEVICES"] for share in shares(launch, num_gpus=4, miniature=True)] == found
