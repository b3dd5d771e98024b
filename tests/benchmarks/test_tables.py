import subprocess
import sys

import pytest

from benchmarks.tables import document

ABOUT = {"hardware": "a GPU", "versions": {"torch": "2"}, "date": "2026-01-01", "command": "python -m x"}


def trained(who, rate, late):
    numbers = {"tokens_per_second": rate, "late_tokens_per_second": late, "steps_per_second": 2, "peak_gib": 3}
    return {
        "what": "training",
        "shape": "0.5B",
        "who": who,
        "times": 1,
        **numbers,
        "start_up_seconds": 4,
        "first_loss": 5,
    }


def cell(who, what="cell", **more):
    measured = {"num_steps": 9, "num_tokens": 1000, "tokens_per_second": 1000, "start_up_seconds": 1}
    answered = {"answers": 500, "seconds_an_answer": 0.5}
    return {
        "what": what,
        "shape": "0.5B",
        "who": who,
        "wall_seconds": 60,
        "cells": {"lora": measured | answered},
        **more,
    }


def decoded(decoder, rate):
    line = {"what": "decoding", "shape": "0.5B", "weights": "merged", "rows": 64, "decoder": decoder}
    return {**line, "tokens_per_second": rate, "equal": 60}


LOGITS = {"what": "logits", "shape": "0.5B", "tokens": 100, "supervised": 9, "at_once": "2^27", "peak_gib": 1, "ms": 7}
KERNELS = {"what": "kernels", "shape": "0.5B", "rows": 8, "step_ms": 16, "traced_ms": 18, "gaps_ms": 7}
KERNELS |= {"step_tokens": 1950, "traced_tokens": 2010.4}
KERNELS |= {"ms": {"products": 6, "copies": 1.25}, "kernels": {"products": 900, "copies": 20.5}, "most": {}}
PEER = {"trainer tokens_per_second": 10, "trainer answers_per_second": 20, "trainer cell_seconds": 30}
OWN = {"ours tokens_per_second": 20, "ours answers_per_second": 30, "ours cell_seconds": 10}
DEMO = {
    "what": "demo cell", **PEER, **OWN, "ratio tokens_per_second": 2, "ratio answers_per_second": 1.5, "ratio cell": 3,
}  # fmt: skip
LINES = [
    *(trained("compiled", 800, 900), trained("trl", 100, 300)),
    *(cell("process"), cell("trl"), cell("trl", "check", rows=300)),
    *(decoded("generate", 1000), decoded("places", 4500)),
    *(LOGITS, DEMO, KERNELS),
    {"what": "training", "shape": "7B", "who": "peft", "times": 1, "failed": "no memory"},
    {"what": "kernels", "shape": "7B", "rows": 64, "failed": "no memory"},
]


@pytest.fixture
def found():
    return "\n\n".join(document([{**line, **ABOUT} for line in LINES]))


@pytest.mark.parametrize(
    "row",
    [
        "| compiled to trl | 3.0 |",  # of the last halves
        "| 0.5B | trl | 60 | 9 | 500 | 1 | 1.0 k | 500 | 1499 |",
        "| 0.5B | merged | 64 | 1.0 k | 4.5 k | 4.5 | 60 |",
        "| 0.5B | 8 | 16.0 | 1950 | 18.0 | 2010 | 7.0 | 6.0 in 900 | 1.2 in 20 |",
        "| 0.5B | 2^27 | 100 | 9 | 1.0 | 7 |",
        "| the whole cell, s, from these rates | 30 | 10 | 3.0 |",
        "failed: 7B peft: no memory",
        "failed: 7B kernels: no memory",
    ],
)
def test_every_kind_of_line_has_its_table(found, row):
    assert row in found.splitlines()


@pytest.mark.parametrize("line", LINES, ids=lambda line: line["what"])
def test_lines_of_one_kind_alone_are_enough(line):
    about, *rest = document([{**line, **ABOUT}])
    assert "failed" in line or about.startswith("a GPU")
    assert rest or "decoder" in line or line["what"] == "check"  # which stand beside another


def test_two_rows_of_decoding_and_logits_come_to_a_table(tmp_path):
    out = tmp_path / "lines.jsonl"
    for words in (["decoding", "--shape", "tiny", "--rows", "2"], ["logits", "--shape", "tiny", "--tokens", "2048"]):
        subprocess.run([sys.executable, "-m", f"benchmarks.{words[0]}", *words[1:], "--out", str(out)], check=True)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", str(out)], check=True, capture_output=True, text=True
    )
    assert "### Decoding" in done.stdout
    assert "| tiny | merged | 2 |" in done.stdout
    assert "| tiny | 2^27 |" in done.stdout
