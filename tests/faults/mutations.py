"""Damage, drawn at random: of bytes, and of values that YAML and JSON can hold."""

import contextlib
import copy
import json
import os

import pytest
import yaml

PIECES = [
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x80", b'"', b"\\", b"\\ud800", b"{", b"}", b"[", b"]", b",", b"\n", b"\r",
    b"\xe2\x80\xa8", b"null", b"1e999", b"NaN", b"-", b'\\u0000', "长".encode()[:2], b" ", b"\t", b"true", b":",
]  # fmt: skip
VALUES = [
    None, True, -1, 0, 10**30, 1.5, float("nan"), float("inf"), "", "???", "../..", "a\0b", "\ud800", "x" * 5000, [], {},
    [[]], {"_target_": "os.system"}, {"_args_": [1]}, {1: 2}, "${oc.env:HOME}", "2001-01-01",
]  # fmt: skip


def examples(share):
    """How many files a test damages: `FUZZ_EXAMPLES` for the whole project, of which it has a share."""
    return max(1, int(int(os.environ.get("FUZZ_EXAMPLES", "4000")) * share))


def damaged(raw, draw, *, most=4):
    """One to four bites, insertions, repetitions and swaps."""
    for _ in range(draw.randint(1, most)):
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


def changed(value, draw):
    """The value with one to three of its parts replaced, removed or added, at any depth."""
    value = copy.deepcopy(value)
    for _ in range(draw.randint(1, 3)):
        places = [place for place in _places(value) if place]
        if not places:
            return draw.choice(VALUES)
        *parts, last = draw.choice(places)
        section = value
        for part in parts:
            section = section[part]
        kind = draw.randrange(4)
        if kind == 0:
            del section[last]
        elif kind == 1 and isinstance(section, dict):
            section[draw.choice(["_target_", "x", 7, "", "name", "r"])] = copy.deepcopy(draw.choice(VALUES))
        else:
            section[last] = copy.deepcopy(draw.choice(VALUES))
    return value


def _places(value, before=()):
    """The keys that lead to every part."""
    yield before
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        yield from _places(item, (*before, key))


FEW = 1 / 80  # of the files of a whole run, for the tests that always run
many = pytest.mark.parametrize(
    "share", [pytest.param(FEW, id="few"), pytest.param(1, id="many", marks=pytest.mark.faults)]
)


def spoiled_text(raw, draw, *, write, load):
    """The file's bytes or its values damaged."""
    if draw.random() < 0.5:
        return damaged(raw, draw)
    with contextlib.suppress(ValueError, yaml.YAMLError, UnicodeError):
        return write(changed(load(raw), draw)).encode(errors="surrogatepass")
    return damaged(raw, draw)


def as_json(raw, draw):
    return spoiled_text(raw, draw, write=json.dumps, load=json.loads)


def as_yaml(raw, draw):
    return spoiled_text(raw, draw, write=lambda v: yaml.safe_dump(v, allow_unicode=True), load=yaml.safe_load)


def only_refused(act):
    """`read`, or `refused` for a ValueError that says so in a few words."""
    said = ""
    try:
        act()
    except ValueError as error:
        said = str(error) or "nothing"
    assert len(said) < 20_000
    return "refused" if said else "read"
