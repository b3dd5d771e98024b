"""ckpt-chaos on the checkpoints of a run: a training killed at every change of a file, and what it goes on from.

Each point is a training of its own, killed before a file is changed, with the file cut in half, with all lost that was
not seen synced, or asked to end there; and the same command after it. `CHAOS_POINTS` says how many points there are.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from grids import ROOT

pytest.importorskip("ckpt_chaos")
pytestmark = pytest.mark.faults

TRAINING = Path(__file__).with_name("kept_training.py")
WRONG = "HARD_FAIL,SILENT_DIVERGENCE,CONTROL_FAIL"


@pytest.mark.parametrize("kept", [2, 99], ids=["as-a-run-keeps-them", "all-kept"])
def test_no_hard_failure_no_silent_divergence(tmp_path, kept, capsys):
    """Where all are kept ckpt-chaos also knows which was the newest whole one: going on from an older one is lost work."""
    points = os.environ.get("CHAOS_POINTS", "24")
    how = ["--modes", "before,torn,unsynced,term", "--max-points", points, "--result-file", "{out}/result.json"]
    how += ["--step-regex", r"resumed after step (\d+) of", "--fail-on", WRONG + (",LOST_WORK" if kept > 2 else "")]
    how += ["--checkpoint-glob", "{out}/checkpoint/step-*"] if kept > 2 else []
    job = ["--", sys.executable, str(TRAINING), "{out}", str(kept)]
    line = [sys.executable, "-m", "ckpt_chaos", "run", "--work", str(tmp_path / "work"), *how, *job]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=tmp_path, env=known, capture_output=True, text=True)
    counts = dict(re.findall(r"(\w+): (\d+)", done.stdout.splitlines()[-1]))
    with capsys.disabled():
        print("", counts, end=" ")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(counts) <= {"PASS", "LOST_WORK"}
    assert int(counts["PASS"]) > 1
