"""What a run records of where it happened, and determinism as a mode."""

import subprocess
import sys
from pathlib import Path

import pytest

from finetune import environment

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


def test_a_commit_is_that_of_this_code(tmp_path, monkeypatch):
    def git(*words):
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *words], cwd=tmp_path, check=True, capture_output=True)

    code = tmp_path / "finetune" / "environment.py"
    code.parent.mkdir()
    (tmp_path / "conf").mkdir()
    code.touch()
    monkeypatch.setattr(environment, "__file__", str(code))
    git("init")
    git("commit", "--allow-empty", "-m", "somebody's repository")
    assert environment._commit() == {"commit": None, "dirty": None}
    git("add", "finetune")
    git("commit", "-m", "this project's")
    assert environment._commit()["commit"]
    assert not environment._commit()["dirty"]
    (tmp_path / "notes.txt").touch()
    assert not environment._commit()["dirty"]
    (tmp_path / "conf" / "mine.yaml").touch()
    assert environment._commit()["dirty"]
