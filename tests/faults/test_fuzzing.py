"""The readers of rows on damaged files: every one is read, or refused with its name."""

import json
import random

import pytest
from mutations import damaged, examples

from finetune.data import rows


def seeds():
    """A good file of each sort."""
    items = [{"prompt": f"问题 {n}", "target": '回答, "x"\n', "choices": ["是", "否"], "n": n} for n in range(6)]
    lines = "\n".join(json.dumps(item, ensure_ascii=n % 2 == 0) for n, item in enumerate(items))
    table = "prompt,target\n" + "\n".join(f'"问题 {n}","回答 ""x"",\n"' for n in range(6))
    return {"json_lines": lines, "json_list": json.dumps(items, indent=1, ensure_ascii=False), "csv": table}


def outcome(path, name, encoding):
    """`read`, `refused`, or `rows` when the whole way to rows succeeded."""
    task = {
        "name": "x", "version": 1, "only": None, "train_rows": None, "valid_rows": None, "valid_fraction": 0.3,
        "source": {"_target_": f"finetune.data.sources.{name}", "path": path, "encoding": encoding},
        "fields": {"task": "t", "kind": "dialogue", "prompt": "{prompt}", "target": "{target}"},
        "on_bad_row": "skip", "max_bad_share": 1.0,
    }  # fmt: skip
    try:
        found = rows.load(task)
    except ValueError as error:
        text = str(error)
        assert len(text) < 20_000
        assert "data" in text or "task." in text  # the file or the key is named
        return "refused"
    for row in (*found.train, *found.valid):
        row.prompt.encode()
        assert row.prompt.strip()
        assert row.target.strip()
    assert found.notes["read"] == found.notes["bad"] + found.notes["skipped"] + len(found.train) + len(found.valid)
    return "rows"


def fuzz(tmp_path, count):
    draw, counts = random.Random(0), {}
    for number in range(count):
        name, text = draw.choice(sorted(seeds().items()))
        encoding = draw.choice(("utf-8", "utf-8", "gb18030", "utf-16"))
        path = tmp_path / "data"
        path.write_bytes(damaged(text.encode(draw.choice(("utf-8", "utf-8", encoding))), draw))
        try:
            key = (name, outcome(str(path), name, encoding))
        except BaseException:
            (tmp_path / f"finding-{number}").write_bytes(path.read_bytes())
            raise
        counts[key] = counts.get(key, 0) + 1
    return counts


def test_three_hundred_damaged_files(tmp_path):
    counts = fuzz(tmp_path, 300)
    assert sum(counts.values()) == 300
    assert {kind for _, kind in counts} == {"rows", "refused"}


@pytest.mark.faults
def test_thousands_of_damaged_files(tmp_path, capsys):
    count = examples(1)
    counts = fuzz(tmp_path, count)
    assert sum(counts.values()) == count
    with capsys.disabled():
        print("\n", {" ".join(key): count for key, count in sorted(counts.items())})
