"""`evaluate.backend=vllm`: which runs it is refused for, before anything starts, and that it makes no other run of old ones."""

import importlib.util

import pytest
from grids import QUICK
from hydra._internal.utils import get_args_parser

from finetune import runs
from finetune.backend import rank_limit
from finetune.cells import Invalid, cells
from finetune.config import differences

HALF = ("evaluate.backend=vllm", "model.precision=bfloat16")


def compose(*words, root):
    return cells(get_args_parser().parse_intermixed_args(list(words)), root=root)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method=qlora"], "method=qlora has its base in nf4"),
        (["method=prefix"], "method=prefix is neither"),
        (["method=dora"], "use_dora=True (method=dora)"),
        (["method=pissa"], "init_lora_weights=pissa (method=pissa)"),
        (["method=lora", "+method.adapter.bias=all"], "bias=all"),
        (["method=lora", "+method.adapter.modules_to_save=[norm]"], "modules_to_save=['norm']"),
        (["method=lora", "method.adapter.r=1024"], "rank 1024, and vLLM takes 512"),
        (["method=lora", "+method.adapter.rank_pattern={q_proj: 600}"], "rank 600, and vLLM takes 512"),
        (["method=delta_lora", "method.adapter.r=300"], "rank 600, and vLLM takes 512"),
        (["method=lora", "model=bloom"], "no LoRA for model=bloom"),
        (["method=lora", "model.precision=float32"], "use model.precision=bfloat16"),
        (["method=lora", "model.rope_scaling=linear"], "use model.rope_scaling=null"),
        (["method=lora", "launch.num_processes=2"], "use launch.num_processes=1"),
        (["method=lora", "deterministic=true"], "use deterministic=false"),
    ],
    ids=lambda part: part[-1] if isinstance(part, list) else "",
)
def test_what_it_cannot_is_named_with_the_way_out(tmp_path, words, said):
    with pytest.raises(Invalid) as error:
        compose(*HALF, *words, root=tmp_path)
    assert said in str(error.value)
    assert "leave evaluate.backend out" in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_another_word_is_refused(tmp_path):
    with pytest.raises(Invalid, match=r'evaluate.backend="own": .*vllm'):
        compose("evaluate.backend=own", root=tmp_path)


def test_answers_by_vllm_are_another_run(tmp_path):
    [own], [other] = compose(HALF[1], root=tmp_path), compose(*HALF, root=tmp_path)
    assert own.folder != other.folder
    assert "evaluate.backend=vllm" in other.folder.parts[-2]
    assert differences(own.config, other.config) == ["evaluate.backend: None -> vllm"]


@pytest.mark.parametrize(("rank", "limit"), [(1, 1), (2, 8), (16, 16), (17, 32), (512, 512), (513, None)])
def test_there_is_room_for_the_rank(rank, limit):
    assert rank_limit(rank) == limit


@pytest.mark.skipif(bool(importlib.util.find_spec("vllm")), reason="vLLM is installed")
def test_a_command_is_refused_without_the_package_or_a_gpu(command, tmp_path):
    (tmp_path / "vllm").mkdir()  # a folder of that name is no package
    result = command("-m", "method=none,lora", *HALF, "launch.device=cpu")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "nothing was started:",
        "  - evaluate.backend=vllm: the package vllm is not installed: pip install vllm, or leave evaluate.backend out",
        "  - evaluate.backend=vllm: it needs a GPU (launch.device=cpu); leave evaluate.backend out",
    ]
    assert not (tmp_path / "multirun").exists()


def test_a_grid_with_methods_that_it_cannot_answer_does_not_start(command, tmp_path):
    result = command("-m", "method=lora,qlora,prefix", *HALF)
    assert result.returncode == 2
    assert result.stderr.count("evaluate.backend=vllm: ") == 2
    assert not (tmp_path / "multirun").exists()


def test_cells_that_are_done_need_no_vllm(command, base, tmp_path):
    words = (*QUICK, f"model.path={base}", "model.linear=[q_proj,v_proj]", "method=none", *HALF)
    [cell] = compose(*words, root=tmp_path / "multirun")
    cell.folder.mkdir(parents=True)
    runs.begin(cell.folder, cell.config)
    runs.write_json(cell.folder / "scores.json", {})
    result = command("method=none", *HALF)
    assert (result.returncode, "1 done" in result.stderr) == (0, True), result.stderr
