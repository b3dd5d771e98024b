"""The metrics as another project loads them: by path, without a network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "finetune" / "metrics"
CODE = f"""
import evaluate
folder = {str(FOLDER)!r}
texts = dict(predictions=["患者发热", ""], references=["患者发热", "咳嗽"])

metric = evaluate.load(folder + "/chinese_rouge.py")
metric.add_batch(**texts)
scores = metric.compute()
assert scores["rouge-l"] == scores["rouge-1-char-multiset"] == 50, scores

scores = evaluate.load(folder + "/chinese_overlap.py").compute(**texts)
assert 50 < scores["chrf"] < 100 and scores["bleu-4"] > 0, scores

scores = evaluate.load(folder + "/exact_match.py").compute(**texts)
assert (scores["exact"], scores["empty"]) == (50, 50), scores

metric = evaluate.load(folder + "/promptcblue.py", "CHIP-STS", kind="cls")
scores = metric.compute(predictions=["相同", "不是"], references=["是的", "不是"], choices=[["是的", "不是"]] * 2)
assert scores["official"] == scores["accuracy"] == 100, scores
print("all loaded")
"""


def test_load_by_path_without_a_network(tmp_path):
    nowhere = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env={**os.environ, **nowhere, "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert "all loaded" in done.stdout, done.stderr


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_one_import_a_line(path):
    imports = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("import ")]
    assert not [line for line in imports if "," in line]  # `evaluate` would look for a module called `a,`
