"""Write files atomically: others see them complete or not at all."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path


def beside(path: str | Path, suffix: str) -> Path:
    """Return the path next to a folder or file with `suffix` appended to its name; "." has the name of its folder."""
    whole = Path(path).absolute()
    return whole.with_name(whole.name + suffix)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that replaces it when the block succeeds and is removed when it fails.

    Temporary files of the same `path` that killed processes of this host left behind are removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    # The process number alone is not unique where several hosts or containers share the folder.
    temporary = path.with_name(f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        if temporary.is_file():
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        # A full disk gives an error without a file name.
        nameless = error.filename is None and error.errno is not None
        if nameless or str(error.filename) == str(temporary):
            error.filename = str(path)
        raise
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


@functools.cache
def _host() -> str:
    """Return a key of the host, its boot and its process namespace, within which process numbers are comparable.

    Containers of one host number their processes apart, and a restarted host numbers them anew.
    """
    known = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known.append(Path("/proc/sys/kernel/random/boot_id").read_text())
        known.append(os.readlink("/proc/self/ns/pid"))
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:8]


def _sweep(path: Path) -> None:
    """Remove temporary files of `path` that were written under this host's key by processes that no longer run."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{_host()}-*-*.tmp"):
        number = re.search(r"-(\d+)-[0-9a-f]+\.tmp$", left.name)
        if number is None or _runs(int(number[1])):
            continue
        with contextlib.suppress(OSError):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


def _runs(process: int) -> bool:
    # Elsewhere `os.kill` has no signal that only tests for the process.
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # The process runs under another user.
        return True
    return True


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an error of writing inside the block (a full disk) name `path` where the error names no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically: it appears complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
