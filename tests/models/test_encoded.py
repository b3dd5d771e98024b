"""Rows from the cache are the rows that would be encoded, whatever happens to the cache."""

import dataclasses

import pytest
from test_tokenizer import HISTORY, LIMITS, loaded, row

from finetune.models import encoded, sources
from finetune.models.tokenizer import encode_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return sources.cache_folder() / "encoded"


@pytest.fixture(params=["chatml", "plain"])
def tokenizer(request, tmp_path):
    return loaded(request.param, tmp_path / "base")


def rows(count=encoded.FEWEST_ROWS):
    texts = [("头痛" * (i % 300) + str(i), "答" * (i % 130 + 1), HISTORY[: i % 3]) for i in range(count)]
    return [row(prompt, target, history, name=f"a:{i}") for i, (prompt, target, history) in enumerate(texts)]


def files(folder):
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_second_time_they_come_from_the_file(tokenizer, folder, monkeypatch):
    asked = rows()
    expected = encode_rows(asked, tokenizer, **LIMITS)
    assert any(example.prompt_cut for example in expected)
    assert any(example.target_cut for example in expected)
    assert encoded.encoded_rows(asked, tokenizer, **LIMITS) == expected
    monkeypatch.setattr(encoded, "encode_rows", None)
    found = encoded.encoded_rows(asked, tokenizer, **LIMITS)
    assert found == expected
    assert {type(value) for value in vars(found[0]).values()} == {list, int, bool}
    assert all(type(i) is int for i in found[0].ids)
    assert len(files(folder)) == 1


def test_whatever_ids_follow_from_has_a_file_of_its_own(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(encoded, "FEWEST_ROWS", 8)
    one = loaded("chatml", tmp_path / "one")
    other = loaded("glm", tmp_path / "other")
    ended = loaded("chatml", tmp_path / "ended", control=("<|im_start|>", "<|im_end|>", "</s>"))
    asked = rows(8)
    changed = [dataclasses.replace(asked[0], target="x"), *asked[1:]]
    turned = [dataclasses.replace(asked[0], history=(("早", "好"),)), *asked[1:]]
    for tokenizer in (one, other, ended):
        for some in (asked, changed, turned, asked[::-1]):
            for limits in (LIMITS, {**LIMITS, "max_target_tokens": 50}):
                before = len(files(folder))
                found = encoded.encoded_rows(some, tokenizer, **limits)
                assert found == encode_rows(some, tokenizer, **limits)
                assert len(files(folder)) == before + 1


def test_the_same_rows_under_other_names_share_a_file(tokenizer, folder):
    asked = rows()
    renamed = [dataclasses.replace(some, id=f"b:{n}", task="other") for n, some in enumerate(asked)]
    for some in (asked, renamed):
        encoded.encoded_rows(some, tokenizer, **LIMITS)
    assert len(files(folder)) == 1


DAMAGE = {
    "cut short": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "another byte": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "not safetensors": lambda data: b"x" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_written_again(damage, tmp_path, folder):
    tokenizer, asked = loaded("plain", tmp_path / "base"), rows()
    expected = encoded.encoded_rows(asked, tokenizer, **LIMITS)
    [file] = files(folder)
    whole = file.read_bytes()
    file.write_bytes(DAMAGE[damage](whole))
    assert encoded.encoded_rows(asked, tokenizer, **LIMITS) == expected
    assert file.read_bytes() == whole


def test_few_rows_and_an_unwritable_cache_leave_nothing(tokenizer, folder, monkeypatch):
    encoded.encoded_rows(rows(encoded.FEWEST_ROWS - 1), tokenizer, **LIMITS)
    assert not files(folder)
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where the folder should be")
    assert encoded.encoded_rows(rows(), tokenizer, **LIMITS) == encode_rows(rows(), tokenizer, **LIMITS)


def test_what_was_not_used_for_longest_goes_first(tmp_path, folder, monkeypatch):
    tokenizer, asked = loaded("plain", tmp_path / "base"), rows()
    for first in range(3):
        encoded.encoded_rows(asked[first:] + asked[:first], tokenizer, **LIMITS)
    oldest, middle, newest = sorted(files(folder), key=lambda file: file.stat().st_mtime_ns)
    size = newest.stat().st_size
    encoded.encoded_rows(asked, tokenizer, **LIMITS)  # used again
    monkeypatch.setattr(encoded, "MOST_BYTES", 3 * size + size // 2)
    encoded.encoded_rows(asked[9:] + asked[:9], tokenizer, **LIMITS)
    assert oldest.exists()
    assert newest.exists()
    assert not middle.exists()
    assert len(files(folder)) == 3


def test_the_tokenizers_settings_have_a_part_in_it(tmp_path, folder):
    asked = rows()
    encoded.encoded_rows(asked, loaded("plain", tmp_path / "base"), **LIMITS)
    settings = tmp_path / "base" / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("{", '{"add_bos_token": true, ', 1))
    again = loaded("plain", tmp_path / "other")
    again.name_or_path = str(tmp_path / "base")
    encoded.encoded_rows(asked, again, **LIMITS)
    assert len(files(folder)) == 2
