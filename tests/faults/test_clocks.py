"""Clocks that are wrong: processes that believe it is another time, or that it passes faster."""

import importlib.util
import json
from pathlib import Path

import pytest
from grids import folders

pytestmark = pytest.mark.faults


def library():
    """The shared library of libfaketime, of the system or of the Python package of that name."""
    places = [Path(f"/usr/lib/{kind}/faketime/libfaketime.so.1") for kind in ("x86_64-linux-gnu", "aarch64-linux-gnu")]
    package = importlib.util.find_spec("libfaketime")
    places += sorted(Path(package.origin).parent.rglob("libfaketime.so*")) if package and package.origin else []
    return next((place for place in places if place.exists()), None)


@pytest.mark.parametrize(
    "jump", ["+30d", "-30d", "+0 x50"], ids=["a-month-ahead", "a-month-back", "fifty-times-as-fast"]
)
def test_a_sweep_under_a_wrong_clock(command, tmp_path, jump):
    """The sweep and its jobs see another time than the files have; a second command finds all done."""
    found = library()
    if found is None:
        pytest.skip("needs libfaketime")
    clock = {"LD_PRELOAD": str(found), "FAKETIME": jump, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    result = command("-m", "method=lora", "seed=1,2", **clock)
    assert result.returncode == 0, result.stderr
    for folder in folders(tmp_path):
        cost = json.loads((folder / "scores.json").read_text())["cost"]
        assert 0 <= cost["train_seconds"] < 60
    again = command("-m", "method=lora", "seed=1,2")
    assert again.returncode == 0
    assert "2 done" in again.stderr
