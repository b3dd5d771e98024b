"""Damage, drawn at random: of bytes, and of values that YAML and JSON can hold."""

import copy
import os

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
