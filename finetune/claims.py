"""Who works on a run folder: `owner.json`, its heartbeat, and how a dead owner's claim is taken over.

Ownership only ever changes by creating a file that was not there, whole, with a hard link: the first claim is
`owner.json`, the claim after the one whose digest is D is `.owner.D.json`, and the last file of that chain is the
owner. So of any number of processes exactly one gets a folder; locks, which network file systems may lack, are not
needed. The heartbeat is the time of the owner's file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEAT_SECONDS = 5.0  # between two heartbeats
STALE_SECONDS = 120.0  # an owner on another host is dead after so long without one
# Of these the taker must have seen so many itself: a clock that jumps makes every heartbeat look old, but not missing.
CONFIRM_SECONDS = 15.0

# Run folder -> (the owner's heartbeat, monotonic time at which this process saw it first).
Seen = dict[Path, tuple[tuple[str, int], float]]


class Taken(Exception):
    """Another process works on this folder."""


@dataclass(frozen=True)
class Link:
    """One file of the chain."""

    path: Path
    digest: str  # of its content, which no other claim has
    owner: dict[str, Any]  # empty if it cannot be read
    beat: int  # nanoseconds, by the file server's clock

    @property
    def next(self) -> Path:
        """Where the claim after this one lies."""
        return self.path.with_name(f".owner.{self.digest}.json")


def take(run: Path, *, seen: Seen | None = None) -> None:
    """Make the folder ours; raises `Taken`. `seen` remembers the heartbeats of owners on other hosts between calls."""
    last = next(reversed(_chain(run)), None)
    if last and _lives(last, run, seen):
        raise Taken(f"{run}: another process works on it ({_who(last.owner)})")
    place = last.next if last else run / "owner.json"
    if not _create(place, _me()):
        raise Taken(f"{run}: another process has just taken it")
    if not _mine(run):  # what we followed was given back meanwhile, and leads nowhere
        place.unlink(missing_ok=True)
        raise Taken(f"{run}: another process has just taken it")


def beat(run: Path) -> bool:
    """Say that we live; False when the folder is ours no more."""
    with contextlib.suppress(OSError):  # a file server that is away for a moment
        chain = _mine(run)
        if not chain:
            return False
        os.utime(chain[-1].path)
    return True


def release(run: Path) -> None:
    """Give the folder back; nothing where it is not ours."""
    with contextlib.suppress(OSError):  # a full disk: the claim ends with this process
        chain = _mine(run)
        if not chain:
            return
        with contextlib.suppress(OSError):
            # From here on nobody can take it over, so that what is removed is ours.
            if not _create(chain[-1].next, {**_me(), "ended": True}):
                return
        for path in [*(link.path for link in chain), chain[-1].next]:
            path.unlink(missing_ok=True)


def lives(run: Path) -> bool:
    """Does somebody work on the folder, as far as one look can tell?"""
    last = next(reversed(_chain(run)), None)
    return last is not None and _lives(last, run, None)


def _chain(run: Path) -> list[Link]:
    found: list[Link] = []
    path = run / "owner.json"
    with contextlib.suppress(FileNotFoundError):
        while True:
            raw = path.read_bytes()
            owner = {}
            with contextlib.suppress(ValueError, RecursionError):
                owner = json.loads(raw)
            known = owner if isinstance(owner, dict) else {}
            found.append(Link(path, hashlib.sha256(raw).hexdigest()[:16], known, path.stat().st_mtime_ns))
            path = found[-1].next
    return found


def _mine(run: Path) -> list[Link]:
    """The chain, if it ends with this process; else nothing."""
    chain = _chain(run)
    if not chain or chain[-1].owner.get("ended"):
        return []
    me, owner = _me(), chain[-1].owner
    return chain if all(owner.get(key) == me[key] for key in ("host", "machine", "pid", "start")) else []


def _lives(link: Link, run: Path, seen: Seen | None) -> bool:
    owner = link.owner
    if owner.get("ended"):
        return False
    me = _me()
    pid = owner.get("pid")
    if isinstance(pid, int) and [owner.get("host"), owner.get("machine", me["machine"])] == [me["host"], me["machine"]]:
        start = process_start(pid)
        return start is not None and owner.get("start", start) == start
    age = (_server_time(run) - link.beat) / 1e9
    if seen is None:
        return age < STALE_SECONDS
    now, stamp = time.monotonic(), (link.digest, link.beat)
    if seen.get(run, (None, 0.0))[0] != stamp:
        seen[run] = (stamp, now)
    watched = now - seen[run][1]
    return watched < (CONFIRM_SECONDS if age >= STALE_SECONDS else STALE_SECONDS)


def process_start(pid: int) -> float | None:
    """When that process of this machine began, on a clock that never jumps; None when there is none."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if words[0] in "ZX" else float(words[19])  # man 5 proc: state, starttime in ticks since boot
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    import psutil  # a system without /proc

    with contextlib.suppress(psutil.Error):
        return float(psutil.Process(pid).create_time())
    return None


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "start": process_start(pid),
        "started": time.time(),
        "once": secrets.token_hex(8),
    }


def _machine() -> str:
    """What process ids are counted in: this boot of this kernel, and the container. Host names repeat."""
    parts = []
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _who(owner: dict[str, Any]) -> str:
    return f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"


def _server_time(run: Path) -> int:
    """Nanoseconds by the clock that stamps this folder's files; ours where nothing can be written."""
    try:
        with _part(run) as part:
            part.touch()
            return part.stat().st_mtime_ns
    except OSError:
        return time.time_ns()


def _create(place: Path, content: dict[str, Any]) -> bool:
    """Create the file with that content, unless it is there."""
    with _part(place.parent) as part:
        part.write_text(json.dumps(content))
        try:
            os.link(part, place)
        except FileExistsError:
            return part.stat().st_nlink > 1  # an answer that NFS lost: it was us
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.ENOENT):
                raise
            return _create_without_links(place, content)
    return True


def _create_without_links(place: Path, content: dict[str, Any]) -> bool:
    """As `_create`, on a file system without hard links; whoever reads it half written takes it for a stranger's."""
    try:
        with place.open("x") as file:
            file.write(json.dumps(content))
    except FileExistsError:
        return False
    return True


@contextlib.contextmanager
def _part(run: Path) -> Iterator[Path]:
    part = run / f".claim.{os.getpid()}.{secrets.token_hex(4)}"
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)
