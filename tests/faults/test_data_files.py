"""Data that change, move, or are wrong, under real commands and under the loader."""

import json
import shutil

import pytest
from grids import folders

from finetune.data import rows

TASK = {
    "name": "jsonl",
    "version": 1,
    "source": {"_target_": "finetune.data.sources.json_lines", "path": "", "encoding": "utf-8"},
    "fields": {"task": "t", "kind": "dialogue", "prompt": "{prompt}", "target": "{target}", "id": None},
    "rewordings": [],
    "only": None,
    "train_rows": None,
    "valid_rows": None,
    "valid_fraction": 0.2,
    "skip_empty": False,
    "on_bad_row": "skip",
    "max_bad_share": 0.5,
    "drop_leaks": False,
}


def line(number):
    return json.dumps({"prompt": f"问题{number}", "target": f"回答{number}"}, ensure_ascii=False)


def written(path, *, count=20, first=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line(number) + "\n" for number in range(first, first + count)), encoding="utf-8")
    return path


def load(path, **changed):
    return rows.load(TASK | {"source": TASK["source"] | {"path": str(path)}} | changed)


WRONG = {
    "a megabyte that is no JSON": "x" * 1_000_000,
    "a cut line": '{"prompt": "a", "tar',
    "a number for a text": '{"prompt": 3, "target": "b"}',
    "null for a text": '{"prompt": null, "target": "b"}',
    "a missing field": '{"prompt": "a"}',
    "deep nesting": '{"prompt": ' + "[" * 200_000,
    "half a surrogate pair": '{"prompt": "\\ud800", "target": "b"}',
    "a NUL": '{"prompt": "a\\u0000", "target": "b"}',
    "a list": "[1, 2]",
    "a key twice": '{"prompt": "a", "prompt": "b", "target": "c"}',
    "an endless number": '{"prompt": "a", "target": "b", "n": ' + "9" * 10_000 + "}",
    "an empty target": '{"prompt": "a", "target": " "}',
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_line_is_named_or_left_out_and_counted(tmp_path, wrong):
    path = written(tmp_path / "rows.jsonl")
    path.write_text(path.read_text(encoding="utf-8") + wrong + "\n" + line(20) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:21: ") as error:
        load(path, on_bad_row="refuse")
    assert len(str(error.value)) < 2000
    split = load(path)
    assert (split.notes["read"], split.notes["bad"]) == (22, 1)
    assert len(split.train) + len(split.valid) == 21
    assert [text.partition(": ")[0] for text in split.bad] == [f"{path}:21"]


def test_problems_of_every_sort_are_listed_together(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([line(0), *WRONG.values(), line(1)]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{len(WRONG)} problems:") as error:
        load(path, on_bad_row="refuse")
    assert {text.split(":")[1] for text in str(error.value).splitlines()[1:]} == {str(n) for n in range(2, 14)}


def test_more_wrong_rows_than_the_stated_share_are_refused(tmp_path):
    path = written(tmp_path / "rows.jsonl", count=97)
    path.write_text(path.read_text(encoding="utf-8") + "{\n" * 3, encoding="utf-8")
    assert load(path, max_bad_share=0.03).notes["bad"] == 3
    with pytest.raises(ValueError, match=r"3 of 100 rows are wrong, more than task\.max_bad_share=0\.02"):
        load(path, max_bad_share=0.02)


def test_a_mended_row_is_another_data_set(tmp_path):
    path = written(tmp_path / "rows.jsonl")
    whole = load(path).data_hash
    path.write_text(path.read_text(encoding="utf-8") + "{\n", encoding="utf-8")
    assert load(path).data_hash == whole
    path.write_text(path.read_text(encoding="utf-8") + line(30) + "\n", encoding="utf-8")
    assert load(path).data_hash != whole


def test_a_megabyte_in_one_good_line_is_a_row(tmp_path):
    path = written(tmp_path / "rows.jsonl")
    long = json.dumps({"prompt": "长" * 400_000, "target": "b"}, ensure_ascii=False)
    path.write_text(path.read_text(encoding="utf-8") + long + "\n", encoding="utf-8")
    split = load(path)
    assert max(len(row.prompt) for row in (*split.train, *split.valid)) == 400_000


@pytest.mark.faults
def test_data_may_move_and_may_not_change(command, tmp_path):
    path = written(tmp_path / "one" / "rows.jsonl")
    words = ("-m", "task=jsonl", "task.train_rows=null", "task.valid_rows=null", "method=lora")
    assert command(*words, f"task.source.path={path}").returncode == 0
    [folder] = folders(tmp_path)
    moved = tmp_path / "two" / "rows.jsonl"
    moved.parent.mkdir()
    shutil.move(path, moved)
    again = command(*words, f"task.source.path={moved}")
    assert again.returncode == 0, again.stderr
    assert folders(tmp_path) == [folder]
    written(moved, first=100)
    changed = command(*words, "seed=1,2", f"task.source.path={moved}")
    assert changed.returncode == 2
    assert "other data" in changed.stderr
    assert str(folder.relative_to(tmp_path)) in changed.stderr
    assert folders(tmp_path) == [folder]
