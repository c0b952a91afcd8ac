"""Errors of the system, such as a full disk, that do not say which file they are about."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def name_in_system_errors(path: Path) -> Iterator[None]:
    """Add the name of a file or folder that is written to an error of the system that names none.

    Raises
    ------
    OSError
        What was raised within, with `path` as its filename.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
