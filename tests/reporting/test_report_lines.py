import json
import math

import pytest

from finetune.reporting.lines import dump, load


@pytest.mark.parametrize(
    "value", [{"a": "诊断\n"}, {"a": "\ud83d"}, {"a": [1.5, None, True]}, {"a": 2**70}, {"a": {"b": "\x00"}}]
)
def test_what_is_written_is_read(value):
    line = dump(value)
    assert b"\n" not in line
    assert load(line) == json.loads(line) == value


def test_numbers_that_are_none():
    assert math.isnan(load(b'{"a": NaN}')["a"])


@pytest.mark.parametrize("line", [b"", b"{", b'{"a": 1} x', b"\xff"])
def test_no_json(line):
    with pytest.raises(ValueError):  # noqa: PT011
        load(line)
