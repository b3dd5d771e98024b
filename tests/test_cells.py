import itertools
import textwrap

import pytest
from hydra._internal.utils import get_args_parser

from finetune import runs
from finetune.cells import CONF, Invalid, cells
from finetune.config import learning_rate

CHOICES = {
    group: sorted(p.stem for p in (CONF / group).glob("*.yaml")) for group in ("model", "method", "task", "optim")
}


def compose(*words, root):
    return cells(get_args_parser().parse_args(list(words)), root=root)


def test_every_configuration_composes(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_DATA", str(tmp_path))
    longest = max(map(len, CHOICES.values()))
    for n in range(longest):  # every file of every group at least once; groups do not depend on each other
        words = [f"{group}={names[n % len(names)]}" for group, names in CHOICES.items()]
        words.append(f"scale={('tiny', 'small', 'full')[n % 3]}")
        words.append("task.source.path=x.jsonl" if "task=jsonl" in words else "seed=1")
        [cell] = compose(*words, root=tmp_path)
        for group in CHOICES:
            assert cell.config[group]["name"] == CHOICES[group][n % len(CHOICES[group])]


def test_a_single_cell_has_the_folder_that_it_has_in_a_grid(tmp_path):
    words = ("deterministic=true", "method.adapter.r=4", "optim.lr=1e-3", "model.linear=[q_proj, v_proj]")
    [alone], [of_grid] = compose(*words, root=tmp_path), compose("-m", *words, root=tmp_path)
    assert alone == of_grid


def test_a_file_that_bears_another_name_is_refused(tmp_path):
    (tmp_path / "method").mkdir()
    lora = (CONF / "method" / "lora.yaml").read_text()
    (tmp_path / "method" / "mine.yaml").write_text(lora.replace("r: 16", "r: 2"))
    with pytest.raises(Invalid, match=r"method/mine\.yaml has name: lora; it must be mine"):
        compose(f"--config-dir={tmp_path}", "method=mine", root=tmp_path)


def test_the_documented_task_composes(tmp_path):
    text = (CONF.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    block = [line for line in text.splitlines() if line.startswith("    ")]
    end = next(n for n, line in enumerate(block) if line.startswith("    max_target_tokens")) + 1
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "my_task.yaml").write_text(textwrap.dedent("\n".join(block[:end])))
    [cell] = compose(f"--config-dir={tmp_path}", "task=my_task", f"data_dir={tmp_path}", root=tmp_path)
    assert cell.config["task"]["fields"]["target"] == "{answer}"


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONF / "experiment").glob("*.yaml")))
def test_every_experiment_is_a_grid(name, tmp_path):
    found = compose(f"+experiment={name}", root=tmp_path)
    assert len(found) > 1
    assert {cell.config["study"] for cell in found} == {name}


def test_the_original_experiment_is_what_it_says(tmp_path):
    found = compose("+experiment=original", root=tmp_path)
    grid = {(c.config["model"]["name"], c.config["method"]["name"]) for c in found}
    methods = ("qlora", "lora_qkv", "prefix", "prompt", "ptuning")
    assert grid == set(itertools.product(("qwen", "llama", "chatglm"), methods))
    for config in (cell.config for cell in found):
        assert config["task"]["name"] == "promptcblue_three"
        assert config["task"]["max_prompt_tokens"] == 2048
        assert (config["model"]["precision"], config["model"]["rope_scaling"]) == ("float16", "linear")
        assert (config["optim"]["epochs"], config["optim"]["accumulation"], config["optim"]["schedule"]) == (
            10,
            4,
            "cosine",
        )
        assert learning_rate(config) == 1e-3


def test_the_practice_grid_is_what_it_says(tmp_path):
    found = compose("+experiment=practice", root=tmp_path)
    grid = {(c.config["model"]["name"], c.config["method"]["name"]) for c in found}
    methods = ("full", "lora", "llama_adapter", "prompt", "prefix")
    assert grid == set(itertools.product(("llama", "chinese_llama", "chatglm", "bloom"), methods))
    for config in (cell.config for cell in found):
        assert (config["task"]["name"], config["task"]["max_prompt_tokens"]) == ("alpaca_zh", 512)
        assert config["model"]["precision"] == "float16"
        assert (config["optim"]["epochs"], config["optim"]["batch_rows"], config["optim"]["accumulation"]) == (3, 16, 4)
        assert learning_rate(config) == 1e-4


def test_the_command_line_wins_over_an_experiment(tmp_path):
    words = ("+experiment=original", "scale=tiny", "task=clinic", "optim.epochs=1", "method=lora", "optim.lr=0.5")
    found = compose(*words, root=tmp_path)
    assert {c.config["model"]["name"] for c in found} == {"qwen", "llama", "chatglm"}
    for config in (cell.config for cell in found):
        assert (config["task"]["name"], config["optim"]["epochs"], config["method"]["name"]) == ("clinic", 1, "lora")
        assert learning_rate(config) == 0.5


def test_a_learning_rate_belongs_to_the_method(tmp_path):
    found = compose("-m", "method=lora,prompt", root=tmp_path)
    assert [learning_rate(c.config) for c in found] == [c.config["method"]["lr"]["tiny"] for c in found]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("method=loar", r"^method=loar: there is no such file; did you mean lora\? \(there are adalora, "),
        ("lr=1e-3", r"^lr: no such key; did you mean method\.lr or optim\.lr\?$"),
        ("method.r=4", r"^method\.r: no such key; did you mean method\.adapter\.r\?$"),
        ("--config-dir=nowhere", "^--config-dir=nowhere: there is no such folder$"),
        ("method.adapter.r=4,", "^method.adapter.r=4,: is no key=value"),
        ("=3", "must be a string"),
        ("optim.epochz=3", r"did you mean epochs\?"),
        ("+optim.epoch=3", r"optim.epoch: no such key; did you mean epochs\?"),
        ("+typo=1", "typo: no such key"),
        ("optim.epochs=-1", "optim.epochs=-1: .*greater than 0"),
        ("optim.batch_rows=eight", "optim.batch_rows.*integer"),
        ("optim.batch_rows=12 launch.num_processes=8", "try optim.batch_rows=16"),
        ("optim.batch_tokens=all", "optim.batch_tokens=\"all\": .*'auto'"),
        ("optim.batch_tokens=0", "optim.batch_tokens=0: .*greater than or equal to 1"),
        ("task=jsonl", r"task.source.path=\?\?\?"),
        ("task=jsonl task.source.path=${nowhere}", "nowhere"),
        ("optim.schedule=cosin", "'cosine', 'linear' or 'constant'"),
        ("method.adapter._target_=os.system", "not allowed"),
        ("optim.optimizer._target_=builtins.eval", "not allowed"),
        ("model.precision=fp8", "float32"),
        ("study=../../x", "study"),
        ("seed=-1", "seed"),
        ("model=qwen,llama", "add -m"),
        ("+wandb.api_key=canary", "never written"),
        ("method=full method.quantize=nf4", "method.quantize"),
    ],
)
def test_what_is_invalid_is_explained(word, said, tmp_path):
    with pytest.raises(Invalid, match=said):
        compose(*word.split(), root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_budget_of_tokens_takes_the_place_of_rows(tmp_path):
    for tokens in ("auto", 4096):
        words = (f"optim.batch_tokens={tokens}", "optim.batch_rows=3", "launch.num_processes=2")
        [cell] = compose(*words, root=tmp_path)
        assert cell.config["optim"]["batch_tokens"] == tokens


def test_runs_need_a_folder(tmp_path):
    (tmp_path / "multirun").touch()
    with pytest.raises(Invalid, match="multirun is no folder"):
        compose(root=tmp_path / "multirun")


def test_all_problems_are_listed_together(tmp_path):
    with pytest.raises(Invalid) as error:
        compose("-m", "method=lora,loar", "optim.epochs=1,-1", "+typo=1", root=tmp_path)
    assert all(word in str(error.value) for word in ("loar", "optim.epochs=-1", "typo"))


def test_a_folder_of_another_configuration_is_refused(tmp_path):
    [cell] = compose(root=tmp_path)
    old = {**cell.config, "optim": {**cell.config["optim"], "batch_rows": 4}}
    cell.folder.mkdir(parents=True)
    runs.begin(cell.folder, old)
    with pytest.raises(Invalid, match=r"optim.batch_rows: 4 -> 8"):
        compose(root=tmp_path)


@pytest.mark.parametrize(("section", "new"), [("optim", "batch_tokens"), ("evaluate", "backend")])
def test_a_folder_of_an_earlier_version_without_a_key_that_is_null_is_the_same(tmp_path, section, new):
    [cell] = compose(root=tmp_path)
    assert cell.config[section][new] is None
    old = {key: value for key, value in cell.config[section].items() if key != new}
    cell.folder.mkdir(parents=True)
    runs.begin(cell.folder, {**cell.config, section: old})
    [same] = compose(root=tmp_path)
    assert same.folder == cell.folder


def test_launch_and_tracking_are_no_part_of_the_identity(tmp_path):
    [cell] = compose(root=tmp_path)
    cell.folder.mkdir(parents=True)
    runs.begin(cell.folder, cell.config)
    [same] = compose("launch.device=cpu", "wandb.mode=disabled", root=tmp_path)
    assert same.folder == cell.folder


def test_a_configuration_folder_of_ones_own(tmp_path):
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "mine.yaml").write_text(
        "defaults:\n  - lora\n  - _self_\nname: mine\nadapter:\n  r: 3\n"
    )
    [cell] = compose("--config-dir", str(tmp_path / "conf"), "method=mine", root=tmp_path)
    assert cell.config["method"]["adapter"]["r"] == 3
    assert cell.name == "clinic/qwen/mine/seed1"
