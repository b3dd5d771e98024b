"""What a run records of where it happened, and determinism as a mode."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = """
import os, torch
from finetune.environment import environment, only_deterministic
if {on}:
    only_deterministic()
print(environment()["deterministic"], torch.backends.cudnn.deterministic, os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
"""


@pytest.mark.parametrize(("on", "said"), [(True, "True True :4096:8"), (False, "False False None")], ids=["on", "off"])
def test_determinism_is_a_mode_that_is_recorded(on, said):
    line = [sys.executable, "-c", CODE.format(on=on)]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.strip() == said, done.stderr
