"""This side of `evaluate.backend=vllm`, against a stand-in for the package vllm (tests/vllm_standin.py).

What vLLM itself makes of what it is given is not tested: it wants a GPU.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import tiny_base
from grids import wait_for
from hydra._internal.utils import get_args_parser
from report_runs import write_base

from finetune import evaluate, runs
from finetune.cells import cells
from finetune.methods.build import build
from finetune.vllm_engine import Engine

ROOT = Path(__file__).parent.parent
LORA = {"_target_": "peft.LoraConfig", "task_type": "CAUSAL_LM", "r": 3, "target_modules": ["q_proj", "up_proj"]}
QUICK = (
    *("optim.max_steps=6", "optim.lr=1e-1", "task.train_rows=16", "task.valid_rows=10", "wandb.mode=disabled"),
    *("evaluate.max_new_tokens=5", "evaluate.rewording_rows=3", "evaluate.batch_rows=4"),
    *("evaluate.forgetting_text=null", "model.linear=[q_proj,v_proj]", "launch.device=cpu"),
    "model.precision=float16",  # which a CPU computes in float32, so that both ways say the same
)
VLLM = "evaluate.backend=vllm"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def engine(tmp_path, standin, monkeypatch):
    """`engine(adapter)` on a tiny base; its process has what the stand-in needs."""
    environment, _ = standin
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tiny_base("qwen2", seed=1).save_pretrained(tmp_path / "base")
    options = {"trust_remote_code": False, "dtype": "float32", "max_model_len": 64, "skip_tokenizer_init": True}
    options |= {"generation_config": "vllm", "seed": 1, "model": str(tmp_path / "base")}
    with contextlib.ExitStack() as stack:
        yield lambda adapter=None: stack.enter_context(contextlib.closing(Engine(options, adapter=adapter)))


def decoding(batch_rows=5, ends=(2,)):
    return evaluate.Decoding(max_new_tokens=9, batch_rows=batch_rows, end_ids=ends, pad_id=0)


def job(run, base, *words):
    """A folder as the sweep leaves it to a job."""
    [cell] = cells(get_args_parser().parse_intermixed_args([*QUICK, f"model.path={base}", *words]), root=run)
    run.mkdir()
    runs.write_text(run / "config.yaml", json.dumps(cell.config))
    return run


def begun(run, **environment):
    known = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    with (run / "run.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune.train", str(run)], env=known, cwd=ROOT, stdout=log, stderr=log
        )


def ended(run, **environment):
    assert begun(run, **environment).wait(timeout=200) == 0, (run / "run.log").read_text()


@pytest.mark.parametrize("tuned", [False, True], ids=["base", "lora"])
def test_prompts_and_answers_are_those_of_the_own_decoding(engine, standin, tuned, tmp_path, examples):
    model, method = tiny_base("qwen2", seed=1), build({"name": "lora", "adapter": LORA})
    if tuned:
        model = method.attach(model, tokenizer=None, num_steps=1, train_rows=())
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4) if parameter.requires_grad else None
        method.save(model, tmp_path / "adapter")
    prompts, how = [example.ids for example in examples], decoding(ends=tuple(range(2, 12)))
    own = list(evaluate.predict(model, prompts, how))
    assert list(engine(tmp_path / "adapter" if tuned else None).predict(prompts, how)) == own
    assert {answer.finish_reason for batch in own for answer in batch} == {"stop", "length"}
    _, given = standin
    [start] = given("start")
    assert (start["max_num_seqs"], start["max_lora_rank"]) == (5, 8 if tuned else None)
    assert {*given("adapter")} == {str(tmp_path / "adapter") if tuned else None}
    assert [len(batch) for batch in given("prompts")] == [len(batch) for batch in own] == [5, 5, 2]


def test_it_starts_with_the_first_question_and_is_gone_with_the_last(engine, standin, examples):
    _, given = standin
    opened = engine()
    assert list(opened.predict([], decoding())) == []
    assert given("start") == []
    for _ in range(2):
        assert len(list(opened.predict([examples[0].ids], decoding()))) == 1
    [start] = given("start")
    assert psutil.pid_exists(start["pid"])
    opened.close()
    assert not psutil.pid_exists(start["pid"])


@pytest.mark.parametrize(
    ("fault", "said"),
    [({"STANDIN_BREAKS": "1"}, "a kernel failed"), ({"STANDIN_ROOM": "2"}, "CUDA out of memory")],
    ids=["second-batch", "start"],
)
def test_its_error_is_said_and_leaves_no_process(engine, standin, monkeypatch, examples, fault, said):
    for name, value in fault.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=said):
        list(engine().predict([example.ids for example in examples], decoding()))
    _, given = standin
    assert not any(psutil.pid_exists(start["pid"]) for start in given("start"))


def test_its_death_is_said(engine, standin, monkeypatch, examples):
    monkeypatch.setenv("STANDIN_LOG", "/nowhere/log")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent / 'nothing'}")
    monkeypatch.setattr("finetune.vllm_engine.ENVIRONMENT", {"PYTHONHOME": "/nowhere"})
    with pytest.raises(RuntimeError, match="vLLM ended with status 1"):
        list(engine().predict([examples[0].ids], decoding()))


@pytest.mark.faults  # whole jobs
def test_a_run_is_the_same_by_either_backend(base, standin, tmp_path):
    environment, given = standin
    folders = [job(tmp_path / name, base, "method=lora", *words) for name, words in (("own", ()), ("vllm", (VLLM,)))]
    for folder in folders:
        ended(folder, **environment, STANDIN_ROOM="2")  # less than batch_rows
    own, other = (json.loads((folder / "scores.json").read_text()) for folder in folders)
    for key in ("scores", "rewording", "loss", "checks"):
        assert own[key] == other[key], key
    assert (tmp_path / "own/predictions.jsonl").read_text() == (tmp_path / "vllm/predictions.jsonl").read_text()
    assert other["cost"]["prediction_batch_halvings"] == 1
    starts = given("start")  # not once more for the rows in other words
    assert [start["max_num_seqs"] for start in starts] == [4, 2]
    assert {(start["model"], start["dtype"]) for start in starts} == {(str(base), "float32")}
    assert {*given("adapter")} == {str(tmp_path / "vllm" / "adapter")}
    assert not any(psutil.pid_exists(start["pid"]) for start in starts)


@pytest.mark.faults  # whole jobs
def test_a_job_that_is_killed_takes_it_along_and_asks_for_the_rest_later(base, standin, tmp_path):
    environment, given = standin
    folder = job(tmp_path / "run", base, "method=none", VLLM, "evaluate.rewording_rows=0")
    process = begun(folder, **environment, STANDIN_HANGS="1")
    wait_for(lambda: len(given("prompts")) == 2, while_runs=process)
    [start] = given("start")
    process.kill()
    process.wait()
    wait_for(lambda: not psutil.pid_exists(start["pid"]), seconds=10)
    ended(folder, **environment)
    assert [len(batch) for batch in given("prompts")] == [4, 4, 4, 2]
    assert given("prompts")[1] == given("prompts")[2]
    assert len((folder / "predictions.jsonl").read_text().splitlines()) == 10
