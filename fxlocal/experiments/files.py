"""Files of a run: each is the old one or the new one, and one run at a time writes a folder."""

import fcntl
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

__all__ = ["PARTIAL", "LockedError", "lock", "write_all", "write_file"]

PARTIAL = ".partial"  # behind the name of a file that is being written


Content: TypeAlias = bytes | memoryview | str


class LockedError(OSError):
    """Another run writes into the folder."""


def write_all(contents: Mapping[Path, Content]) -> None:
    """Write files, whose folders are made; if one cannot be written, all stay as they were.

    Raises:
        OSError: saying which and why, in a line.
    """
    partial = {path: path.with_name(path.name + PARTIAL) for path in contents}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial[path], "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
    except BaseException as error:
        for unfinished in partial.values():
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        reason = error.strerror or error
        raise OSError(f"cannot write {path}: {reason}; what was there is as it was") from error
    for path, written in partial.items():
        os.replace(written, path)


def write_file(path: Path, content: Content) -> None:
    """Write one file, as `write_all` does."""
    write_all({path: content})


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, made if it is missing, while the ``with`` block runs.

    The lock is the system's and on the folder itself: it ends with the process, however that ends.

    Raises:
        LockedError: if another run has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LockedError(
                f"another run writes into {folder}: wait for it, or give another --out"
            ) from None
        except OSError:  # a file system without locks, such as some over the network
            pass
        yield
    finally:
        os.close(handle)
