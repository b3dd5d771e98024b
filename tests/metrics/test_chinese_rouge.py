"""The metric as another project loads it: by path, without a network."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "finetune" / "metrics" / "chinese_rouge.py"
CODE = f"""
import evaluate
metric = evaluate.load({str(SCRIPT)!r})
metric.add_batch(predictions=["患者发热", ""], references=["患者发热", "咳嗽"])
scores = metric.compute()
assert scores["rouge-l"] == scores["rouge-1-multiset"] == 50, scores
"""


def test_loads_by_path_without_a_network(tmp_path):
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "http_proxy": "http://127.0.0.1:9",
        "https_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
