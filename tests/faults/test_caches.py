"""What is kept between runs and was damaged is made again."""

import json
import shutil

import pytest

from finetune.models import miniature, sources

TINY = miniature.Recipe("qwen", tokenizer_documents=300, num_steps=2, rows=2, length=32)


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


DAMAGE = {
    "weights-cut": cut,
    "weights-gone": lambda folder: (folder / "model.safetensors").unlink(),
    "tokenizer-cut": lambda folder: (folder / "tokenizer.json").write_text('{"version"'),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One that holds a miniature."""
    found = tmp_path_factory.mktemp("cache")
    miniature.make(TINY, name="qwen", cache=found, log=lambda line: None)
    return found


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_miniature_is_made_anew(tmp_path, cache, damage):
    shutil.copytree(cache, tmp_path, dirs_exist_ok=True)
    [folder] = [path.parent for path in tmp_path.rglob("model.safetensors")]
    before = (folder / "model.safetensors").read_bytes()
    damage(folder)
    said = []
    assert miniature.make(TINY, name="qwen", cache=tmp_path, log=said.append) == folder
    assert (folder / "model.safetensors").read_bytes() == before
    json.loads((folder / "tokenizer.json").read_text())
    assert "is damaged" in said[0]


def test_a_damaged_note_of_a_hash_is_not_believed(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    right = sources._file_hash(file)
    [note] = (tmp_path / "cache" / "hashes").iterdir()
    note.write_text(right[:10])
    assert sources._file_hash(file) == right
