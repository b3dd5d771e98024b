"""Untrusted text (model output, file contents, names) -> text that stays text in Markdown, CSV and a terminal."""

from __future__ import annotations

import re
import unicodedata
from urllib.parse import quote

_ACTIVE = re.compile(r"[\\`*\[\]>|~#$]|(?<![^\W_])_|_(?![^\W_])")  # `ptuning_v2` needs no escape, `_v2_` does


def one_line(text: str, *, limit: int = 300) -> str:
    """Put on one line, without control and direction characters, cut at `limit` characters."""
    if not text.isprintable():
        text = _visible(text)
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _visible(text: str) -> str:
    spaced = "".join(" " if unicodedata.category(character) in ("Cc", "Zl", "Zp") else character for character in text)
    return "".join(character for character in spaced if unicodedata.category(character) not in ("Cf", "Cs"))


def markdown(text: str) -> str:
    """Escape for a cell of a Markdown table."""
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;")
    return _ACTIVE.sub(lambda found: f"\\{found[0]}", line)


def markdown_path(path: str) -> str:
    """Escape for the target of a Markdown link."""
    return quote(path, safe="/+=,")


_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "±": r"$\pm$",
    "–": "--",
    "…": r"\dots{}",
}


def latex(text: str) -> str:
    """Escape for the text of a LaTeX table; brackets are guarded, since one after `\\\\` would be an option."""
    escaped = "".join(_LATEX.get(character, character) for character in one_line(text))
    return f"{{}}{escaped}" if escaped.startswith(("[", "*")) else escaped


def spreadsheet(value: object) -> object:
    """Keep a spreadsheet from taking text for a formula; numbers stay numbers."""
    if not isinstance(value, str):
        return value
    text = value.replace("\r", " ").replace("\0", "")
    return f"'{text}" if text.lstrip()[:1] in tuple("=+-@") or text[:1] in tuple("\t\n") else text
