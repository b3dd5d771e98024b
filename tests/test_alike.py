"""Cells that are compiled to the same code."""

from pathlib import Path

import pytest

from finetune.alike import counted
from finetune.cells import Cell


@pytest.mark.parametrize(("given", "found"), [(None, [4, 1]), (7, [7, 7])])
def test_cells_are_alike_that_differ_in_numbers_alone(given, found):
    method, optim = {"name": "lora", "r": 8, "lr": {"tiny": 1e-3}}, {"epochs": 1, "neftune_alpha": None}
    one = {"model": {"name": "qwen"}, "scale": "tiny", "method": method, "optim": optim, "task": "a", "seed": 1}
    one |= {"deterministic": False, "launch": {"name": "auto", "alike": given}}
    alike = ({}, {"seed": 2}, {"task": "b", "optim": optim | {"epochs": 2}}, {"method": method | {"lr": {"tiny": 1.0}}})
    others = ({"model": {"name": "llama"}}, {"scale": "small"}, {"method": method | {"r": 4}}, {"deterministic": True})
    others += ({"optim": optim | {"neftune_alpha": 5.0}},)
    cells = [Cell(one | change, Path("folder")) for change in (*alike, *others)]
    numbers = found[:1] * len(alike) + found[1:] * len(others)
    assert [cell.config for cell in counted(cells)] == [
        cell.config | {"launch": {"name": "auto", "alike": number}} for cell, number in zip(cells, numbers, strict=True)
    ]
