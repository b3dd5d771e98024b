"""Files -> text: where a file is missing, unreadable or in another encoding, the error says what to do about it."""

import codecs
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

MAX_LISTED = 20  # problems shown of one file: a wrong file is wrong in every row


class BadRows(ValueError):
    """Some rows are wrong; the message lists the first and counts them, `kept` are the others."""

    def __init__(self, problems: Sequence[str], kept: Sequence[Any]) -> None:
        super().__init__(listed(problems))
        self.problems, self.kept = list(problems), list(kept)


def read_text(path: str, *, encoding: str) -> str:
    """The decoded file without a byte order mark; never empty, never with NUL characters."""
    raw = _read_bytes(path)
    text = _decode(raw, path=path, encoding=encoding).removeprefix("\ufeff")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        refuse(f"{path}:{line}: NUL bytes: not a text file, damaged, or UTF-16 (task.source.encoding=utf-16)")
    if not text.strip():
        refuse(f"{path} is empty")
    return text


def near(word: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`; did you mean 'ask'?`, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


def refuse(problem: str) -> NoReturn:
    """Raise the person's mistake as ValueError."""
    raise ValueError(problem)


def refuse_all(problems: Sequence[str]) -> None:
    """Raise the first problems together with how many there are; nothing when there are none."""
    if problems:
        refuse(listed(problems))


def refuse_rows(problems: Sequence[str], *, kept: Sequence[Any]) -> None:
    """Raise `BadRows`; nothing when no row is wrong."""
    if problems:
        raise BadRows(problems, kept)


def listed(problems: Sequence[str]) -> str:
    """The first problems, a line each, and how many there are."""
    more = len(problems) - MAX_LISTED
    lines = "\n".join(problems[:MAX_LISTED]) + (f"\nand {more} more" if more > 0 else "")
    return lines if len(problems) == 1 else f"{len(problems)} problems:\n{lines}"


def _read_bytes(path: str) -> bytes:
    if not path or path == "???":
        refuse("no data file is named: task.source.path=FILE")
    file = Path(str(path)).expanduser()
    try:
        if file.exists() and not file.is_file() and not file.is_dir():
            refuse(f"{path} is not a regular file, and rows are read more than once: task.source.path=FILE")
        return file.read_bytes()
    except FileNotFoundError:
        there = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        hint = near(file.name, there) if there else f" (there is no folder {file.parent})"
        refuse(f"no file {path}: name it with task.source.path=FILE (or valid_path), or set FINETUNE_DATA=FOLDER{hint}")
    except IsADirectoryError:
        refuse(f"{path} is a folder, not a file: task.source.path=FILE")
    except OSError as error:
        refuse(f"{path} cannot be read: {error.strerror or error}")


def _decode(raw: bytes, *, path: str, encoding: str) -> str:
    """Strict decoding that says which encoding is the likely right one."""
    try:
        text = raw.decode(encoding)
    except LookupError:
        known = ("utf-8", "gb18030", "gbk", "big5", "utf-16")
        refuse(
            f"task.source.encoding={encoding} is unknown{near(encoding.lower(), known)} (there are {', '.join(known)})"
        )
    except UnicodeError as error:
        start = error.start if isinstance(error, UnicodeDecodeError) else 0
        line = raw.count(b"\n", 0, start) + 1
        refuse(f"{path}:{line}: not {encoding} (byte {start}, 0x{raw[start]:02x}): {_likely(raw, start=start)}")
    # GB18030 and latin-1 accept most UTF-8 files and give nonsense; Chinese that is valid UTF-8 is UTF-8. Characters
    # of two bytes prove nothing (GBK's 联通 is valid UTF-8).
    if codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig") and _is_utf8(raw):
        refuse(f"{path} is UTF-8, not {encoding}: task.source.encoding=utf-8")
    return text


def _likely(raw: bytes, *, start: int) -> str:
    """What the file may be, from the bytes around the first one (at `start`) that does not decode."""
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "looks like UTF-16: task.source.encoding=utf-16"
    if _is_utf8(raw):
        return "looks like UTF-8: task.source.encoding=utf-8"
    if _is_utf8(raw[:start]):  # Chinese that decoded up to here: the encoding was right
        return "a damaged byte, or the file is cut off here"
    try:
        raw.decode("gb18030")
    except UnicodeDecodeError:
        return "give its encoding with task.source.encoding=NAME"
    return "looks like GB18030: task.source.encoding=gb18030"


def _is_utf8(raw: bytes) -> bool:
    """Whether the bytes are UTF-8 with at least one character of three bytes, as every Chinese one is."""
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return re.search(rb"[\xe0-\xef][\x80-\xbf]{2}", raw) is not None
