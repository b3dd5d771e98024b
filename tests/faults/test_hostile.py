"""Folders, files and answers of strangers: nothing of them runs."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from grids import ROOT
from hydra._internal.utils import get_args_parser

from finetune import config as settings
from finetune import runs
from finetune.cells import Invalid, cells


def compose(*words, root):
    return cells(get_args_parser().parse_args(list(words)), root=root)


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    return json.dumps(compose(root=tmp_path_factory.mktemp("root"))[0].config)


@pytest.fixture
def config(composed):
    return json.loads(composed)


def changed(config, place, value):
    """The configuration with another value at a dotted place."""
    *parts, last = place.split(".")
    section = config
    for part in parts:
        section = section[part]
    section[last] = value
    return config


RUNS = "finetune.runs.write_text"
HOSTILE = {
    "call in place of an adapter": ("method.adapter._target_", "os.system"),
    "a function of ours as an adapter": ("method.adapter._target_", RUNS),
    "pickle in place of an adapter": ("method.adapter._target_", "torch.load"),
    "a part of PEFT that is no config": ("method.adapter._target_", "peft.PeftModel"),
    "an attribute of an attribute": ("method.adapter._target_", "finetune.methods.weights.os.system"),
    "a reader as an adapter": ("method.adapter._target_", "finetune.data.sources.csv"),
    "call in place of a reader": ("task.source._target_", "os.system"),
    "a method as a reader": ("task.source._target_", "finetune.methods.full.Full"),
    "a private function as a reader": ("task.source._target_", "finetune.data.files._read_bytes"),
    "call in place of an optimizer": ("optim.optimizer._target_", "builtins.eval"),
    "a module below torch.optim": ("optim.optimizer._target_", "torch.optim.lr_scheduler.LambdaLR"),
    "a call among the arguments": ("method.adapter.r", {"_target_": "os.system", "command": "id"}),
    "a call in a list of arguments": ("method.adapter.target_modules", [{"_target_": "os.system"}]),
    "positional arguments": ("method.adapter._args_", [1]),
    "a partial call": ("method.adapter._partial_", True),
    "a study above the tree": ("study", ".."),
    "a study with a path": ("study", "../../etc"),
    "a hidden study": ("study", ".git"),
    "a name with a path": ("method.name", "../x"),
    "a project with a path": ("wandb.project", "a/b"),
    "an unknown key": ("hydra", {"callbacks": {"x": {"_target_": "os.system"}}}),
    "code that comes with the weights, as a word": ("model.trust_remote_code", "yes"),
}


@pytest.mark.parametrize(("place", "value"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_configuration_from_a_stranger_is_refused(config, place, value):
    with pytest.raises(ValueError, match=r"^config.yaml: "):
        settings.refuse(changed(config, place, value))


@pytest.mark.parametrize(
    "target", ["peft.PeftConfigMixin", "finetune.methods.method.Path", "finetune.methods.peft.Tensor", "peft.NoConfig"]
)
def test_what_looks_like_a_method_and_is_none_is_not_built(target):
    from finetune.methods.build import build

    with pytest.raises(ValueError, match="neither a config of PEFT nor a method"):
        build({"name": "x", "adapter": {"_target_": target}})


def test_a_folder_of_a_stranger_runs_nothing(tmp_path, config):
    """A job, as a worker forks it, on a folder that somebody else wrote."""
    from finetune import worker

    folder = tmp_path / "multirun" / "main" / "clinic" / "qwen" / "lora" / "seed1"
    folder.mkdir(parents=True)
    bait = tmp_path / "touched"
    hostile = changed(config, "method.adapter", {"_target_": "pathlib.Path.touch", "self": str(bait)})
    (folder / "config.yaml").write_text(yaml.safe_dump(hostile))
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = sys.stderr = os.fdopen(1, "w")  # pytest's own are not the job's
            worker.become(folder, threads=1)
        finally:  # an error here must not go on as a second pytest
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert "is not allowed here" in (folder / "run.log").read_text()
    assert "Traceback" not in (folder / "run.log").read_text()
    assert not bait.exists()
    assert runs.read_json(folder / "failure.json")["kind"] == "error"


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system [id]", "a: &a [*a]", "- 1", "{", "\0", "a: " + "[" * 5000],
    ids=["python-object", "circle", "list", "cut", "nul", "deep"],
)
def test_a_configuration_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    try:
        found = runs.read_config(tmp_path)
    except (ValueError, yaml.YAMLError, RecursionError):
        return
    with pytest.raises(ValueError, match=r"config.yaml: "):
        settings.refuse(found)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("data_dir=${oc.env:HOME}", "is refused"),
        ("study=${oc.env:USER,x}", "is refused"),
        ("study=..", "study"),
        ("study=null", "study"),
        ("~task", "task"),
        ("seed=${now:%s}", "seed"),
        ("--config-name=other", "other"),
        ("--config-path=/etc", "--config-dir"),
        ("+task.on_bad_rows=skip", "did you mean on_bad_row"),
        ("task.on_bad_row=ignore", "'refuse' or 'skip'"),
        ("task.max_bad_share=2", "max_bad_share"),
    ],
)
def test_what_a_command_may_not_say(word, said, tmp_path):
    with pytest.raises(Invalid, match=said):
        compose(word, root=tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_files_of_one_name_are_two_cells(tmp_path):
    with pytest.raises(Invalid, match="two cells want"):
        compose("-m", "task=jsonl", "task.source.path=a/x.jsonl,b/x.jsonl", root=tmp_path)


def test_a_base_with_code_of_its_own_is_not_run(tmp_path):
    from report_runs import write_base

    from finetune.models.load import load

    base = write_base(tmp_path / "base")
    bait = tmp_path / "touched"
    (base / "modeling_x.py").write_text(f"open({str(bait)!r}, 'w').write('x')\n")
    known = json.loads((base / "config.json").read_text())
    known |= {
        "model_type": "stranger",
        "auto_map": {"AutoConfig": "modeling_x.C", "AutoModelForCausalLM": "modeling_x.M"},
    }
    (base / "config.json").write_text(json.dumps(known))
    model = {
        "name": "x", "path": str(base), "architecture": "Qwen2ForCausalLM", "precision": "float32", "hub": "huggingface",
        "trust_remote_code": False, "rope_scaling": None, "eos_tokens": ["<eos>"], "template": None,
    }  # fmt: skip
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(model, scale="tiny", quantize=None, device="cpu", max_tokens=64, log=print)
    assert not bait.exists()


def test_hostile_answers_are_text_in_every_report(make_run, tmp_path):
    """From the file that a job writes to each page: nothing is markup, a formula or a broken file."""
    from report_runs import row

    texts = [
        "<script>alert(1)</script>",
        '=HYPERLINK("http://x","y")',
        "a|b\n| c |",
        "nul\0",
        "half \ud800",
        "\\input{x}",
    ]
    lines = [row(number, 10.0 + number, prediction=text, task=text[:8]) for number, text in enumerate(texts)]
    for method in ("lora", "none"):
        folder = make_run(method=method, tasks=[text[:8] for text in texts])
        (folder / "predictions.jsonl").unlink(missing_ok=True)
        runs.append_lines(folder / "predictions.jsonl", lines)
    line = [sys.executable, "-m", "finetune.report", str(tmp_path / "multirun")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pages = {
        path.suffix: path.read_bytes().decode("utf-8") for path in (tmp_path / "multirun" / "main").glob("report.*")
    }
    assert {".md", ".csv", ".html"} <= pages.keys()
    assert all("\0" not in page for page in pages.values())
    assert "<script>alert" not in pages[".html"] + pages[".md"]
    assert not any(cell.startswith("=") for line in pages[".csv"].splitlines() for cell in line.split(","))
