"""Twenty cells of the soak; the script alone runs two hundred."""

import subprocess
import sys

import pytest
from grids import ROOT

pytestmark = pytest.mark.faults


def test_twenty_cells_survive_random_kills(tmp_path, base):
    words = [f"model.path={base}", "model.linear=[q_proj,v_proj]"]
    line = [sys.executable, "-m", "benchmarks.soak", str(tmp_path), "--cells", "20", "--every", "12", "--", *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "20 of 20 cells equal" in done.stdout
