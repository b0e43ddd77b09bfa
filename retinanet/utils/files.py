"""Files that are whole or absent, and what to say when the disk does not take them."""

import contextlib
import errno
import os
from pathlib import Path

from retinanet.errors import UserError


def write_atomically(path: Path, write) -> None:
    """Call `write(binary file)` and give the result the name `path`, whole or not at all.

    An existing file keeps its content until the new one is on the disk. Raises `UserError` when the disk is full or
    the folder cannot be written; the unfinished file is removed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):  # it may never have been made, below a parent that is a file
            partial.unlink()
        cause = _system_error(error)
        if cause is None:
            raise
        raise not_written(path, cause) from error


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the `OSError` that led to `error`: torch's writer ends in a RuntimeError of its own on a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def not_written(path: Path, error: Exception) -> UserError:
    """Return the error that says why `path` could not be written and what to do; `error` is the system's."""
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, None)
    remedy = "free some space" if full else "check the folder and its permissions"
    reason = getattr(error, "strerror", None) or error
    return UserError(f"{path}: cannot be written ({reason}); {remedy}, or choose another folder")


@contextlib.contextmanager
def writing(path: Path):
    """Turn an `OSError` inside the block into the `UserError` of `not_written`."""
    try:
        yield
    except OSError as error:
        raise not_written(path, error) from error
