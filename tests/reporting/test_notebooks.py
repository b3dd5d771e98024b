"""The notebooks run from top to bottom on a small study, define nothing, and are stored without outputs."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from report_runs import write_base

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A folder with a `multirun` of two runs that are hardly trained."""
    folder = tmp_path_factory.mktemp("study")
    words = ["-m", "method=none,lora", f"model.path={write_base(folder / 'base')}", "model.linear=[q_proj,v_proj]"]
    words += ["optim.max_steps=3", "task.train_rows=12", "task.valid_rows=6", "evaluate.max_new_tokens=4"]
    words += ["wandb.mode=disabled", "optim.lr=1e-3"]
    known = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "finetune", *words]
    done = subprocess.run(command, cwd=folder, env=known, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, study, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (study / "notebooks").mkdir(exist_ok=True)
    notebook = read(path)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(study / "notebooks")}}).execute()
    assert code(notebook)[-1].outputs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_defines_nothing_and_keeps_nothing(path):
    cells = code(read(path))
    nodes = [node for cell in cells for node in ast.walk(ast.parse(cell.source))]
    assert not [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["matrix", "one_run", "try_an_adapter"]
