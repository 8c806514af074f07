"""Guards of every loader: whatever a file holds, the error is one line that names the file."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from influence_fast.errors import DataError, InfluenceFastError, one_line

#: Errors of writing: of the disk, and of no file that is read.
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISSOCK, "a socket"),
)


@contextlib.contextmanager
def reading(what: object, kind: type[InfluenceFastError] = DataError) -> Iterator[None]:
    """Turn any unforeseen error inside the block into one of class `kind` that names `what` is being read.

    Errors of this package pass unchanged, and so do errors of a full disk: what is written there is reported under its
    own name.
    """
    try:
        yield
    except InfluenceFastError:
        raise
    except OSError as error:
        if error.errno in _OF_THE_DISK:
            raise
        why = error.strerror or one_line(error)
        raise kind(f"{what}: cannot be read ({why}); check the path and the file") from error
    except RecursionError as error:
        raise kind(f"{what}: is nested too deeply to be read; write it flatter") from error
    except UnicodeError as error:
        raise kind(f"{what}: holds text that is no Unicode ({one_line(error, 120)}); save it as UTF-8") from error
    except BaseException as error:
        # Libraries written in Rust raise a PanicException, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            raise kind(f"{what}: needs more memory than there is ({one_line(error, 160) or 'none is left'})") from error
        raise kind(unforeseen(what, error)) from error


def unforeseen(what: object, error: BaseException) -> str:
    """Return the message for an error on reading `what` that no check expects."""
    return (
        f"{what}: cannot be read, for a reason that was not foreseen ({type(error).__name__}: {one_line(error, 200)}); "
        "check the file, and please report this with it (--debug shows the traceback)"
    )


def check_no_pipe(path: str | os.PathLike[str], kind: type[InfluenceFastError] = DataError) -> None:
    """Raise `kind` where `path` is a pipe, a device or a socket, which never ends or cannot be read twice."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        # Whoever opens a missing file or an invalid path reports it.
        return
    for holds, name in _KINDS:
        if holds(mode):
            raise kind(f"{path}: is {name}, not a file; write its contents to a file and give that")


def read_text(path: Path, kind: type[InfluenceFastError], most: int) -> str:
    """Read a small UTF-8 file. Raises `kind`: no regular file, more than `most` bytes, not UTF-8; FileNotFoundError."""
    check_no_pipe(path, kind)
    try:
        with path.open("rb") as file:
            body = file.read(most + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or one_line(error)
        raise kind(f"{path}: cannot be read ({why}); check the path") from None
    if len(body) > most:
        raise kind(f"{path}: has more than {most:,} bytes, which no file of its kind needs; give the right one")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise kind(f"{path}: not UTF-8 text; save it as that") from None
