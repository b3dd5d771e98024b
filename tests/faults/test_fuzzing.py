"""The loaders on damaged files: every one is read, or refused with its name. `FUZZ_EXAMPLES` says how many."""

import json
import os
import random

import pytest

from finetune.data import rows, sources

READERS = {"json_lines": sources.json_lines, "json_list": sources.json_list, "csv": sources.csv}
PIECES = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b'"', b"\\", b"\\ud800", b"{", b"}", b"[", b"]", b",", b"\n", b"\r",
    b"\xe2\x80\xa8", b"null", b"1e999", b"NaN", b"-", b'\\u0000', "长".encode()[:2], b" ", b"\t", b"true", b":",
]  # fmt: skip


def seeds():
    """A good file of each sort."""
    items = [{"prompt": f"问题 {n}", "target": '回答, "x"\n', "choices": ["是", "否"], "n": n} for n in range(6)]
    lines = "\n".join(json.dumps(item, ensure_ascii=n % 2 == 0) for n, item in enumerate(items))
    table = "prompt,target\n" + "\n".join(f'"问题 {n}","回答 ""x"",\n"' for n in range(6))
    return {"json_lines": lines, "json_list": json.dumps(items, indent=1, ensure_ascii=False), "csv": table}


def damaged(raw, draw):
    """One to four bites, insertions, repetitions and swaps."""
    for _ in range(draw.randint(1, 4)):
        place, length = draw.randrange(len(raw) + 1), draw.randint(1, 12)
        kind = draw.randrange(4)
        if kind == 0:
            raw = raw[:place] + raw[place + length :]
        elif kind == 1:
            raw = raw[:place] + draw.choice(PIECES) * draw.choice((1, 1, 1, 500)) + raw[place:]
        elif kind == 2:
            raw = raw[:place] + raw[place : place + length] * 3 + raw[place + length :]
        else:
            raw = raw[:place] + bytes([draw.randrange(256)]) + raw[place + 1 :]
    return raw


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


def fuzz(tmp_path, examples):
    draw, counts = random.Random(0), {}
    for number in range(examples):
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
    examples = int(os.environ.get("FUZZ_EXAMPLES", "20000"))
    counts = fuzz(tmp_path, examples)
    assert sum(counts.values()) == examples
    with capsys.disabled():
        print("\n", {" ".join(key): count for key, count in sorted(counts.items())})
