"""The committed experiment, from the command to the report, on bases that are hardly trained."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from finetune.models.miniature import RECIPES, make

ROOT = Path(__file__).parent.parent


def hardly_trained(cache):
    """Bases of the miniatures' own shapes where the miniatures are looked for."""
    for name in ("qwen", "llama", "chatglm"):
        quick = dataclasses.replace(RECIPES[name], num_steps=1, tokenizer_documents=200)
        folder = make(quick, name=name, cache=cache, log=lambda text: None)
        folder.rename(folder.with_name(f"{name}-{RECIPES[name].key()}"))


def test_the_original_experiment_runs_to_its_report(tmp_path):
    hardly_trained(tmp_path / "cache")
    known = {**os.environ, "PYTHONPATH": str(ROOT), "FINETUNE_CACHE": str(tmp_path / "cache")}
    words = ["+experiment=original", "scale=tiny", "task=clinic", "optim.epochs=1"]
    small = ["task.train_rows=48", "task.valid_rows=6", "evaluate.max_new_tokens=8", "wandb.mode=disabled"]
    grid = [sys.executable, "-m", "finetune", *words, *small]
    result = subprocess.run(grid, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "15 done" in result.stderr
    report = [sys.executable, "-m", "finetune.report", "multirun"]
    result = subprocess.run(report, cwd=tmp_path, env=known, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    written = (tmp_path / "multirun" / "original" / "report.md").read_text(encoding="utf-8")
    for word in ("qwen", "llama", "chatglm", "qlora", "lora_qkv", "prefix", "prompt", "ptuning"):
        assert word in written
