"""Temporary files of the web page: a folder for each visitor, which goes when the visitor does."""

from __future__ import annotations

import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LONGEST_STAY = 24 * 3600.0


@dataclass
class _Session:
    """Where the files of a visitor are, and what is being done with them."""

    folder: Path
    last_used: float
    upload: Path | None = None
    results: Path | None = None
    num_working: int = 0
    is_closed: bool = False


class SessionFiles:
    """The uploads and results of visitors; safe to use from several threads.

    A visitor has one upload and the results of one annotation: newer ones replace them. Files that are being worked on
    are removed when the work is done.

    Parameters
    ----------
    root
        Folder for all of it.
    longest_stay
        Seconds after which files of visitors who never said goodbye are removed, at the next upload.
    """

    def __init__(self, root: Path, *, longest_stay: float = LONGEST_STAY) -> None:
        self._root = root
        self._longest_stay = longest_stay
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def keep_upload(self, session: str, path: Path) -> Path:
        """Move an uploaded file to the visitor's folder, in place of an earlier one and its results; return its path.

        Raises
        ------
        FileNotFoundError
            It is not there any more, or is no upload: a file in a folder of its own under the root.
        """
        with self._lock:
            self._close_forgotten()
            own = self._open(session)
            own.results = None
            upload = Path(tempfile.mkdtemp(prefix="upload-", dir=own.folder)) / path.name
            try:
                if path.parent.parent != self._root:
                    raise FileNotFoundError
                path.replace(upload)
                own.upload = upload
            except FileNotFoundError as error:
                own.upload = None
                raise FileNotFoundError(f"{path.name} is not on the server any more; choose the file again") from error
            finally:
                self._tidy(own)
            return upload

    def remove_upload(self, session: str) -> None:
        """Remove the visitor's upload and its results, if there are any."""
        with self._lock:
            if session in self._sessions:
                own = self._sessions[session]
                own.upload = own.results = None
                self._tidy(own)

    @contextmanager
    def working(self, session: str) -> Iterator[tuple[Path, Path]]:
        """Give the visitor's upload, and an empty folder for results; both are kept while it is open.

        Raises
        ------
        FileNotFoundError
            Nothing was uploaded.
        """
        with self._lock:
            own = self._sessions.get(session)
            if own is None or own.upload is None:
                raise FileNotFoundError("there is no file yet; choose one, and wait until it is uploaded")
            upload = own.upload
            results = own.results = Path(tempfile.mkdtemp(prefix="results-", dir=own.folder))
            own.num_working += 1
        try:
            yield upload, results
        finally:
            with self._lock:
                own.num_working -= 1
                own.last_used = time.monotonic()
                self._tidy(own)

    def close(self, session: str) -> None:
        """Remove everything of a visitor who has left."""
        with self._lock:
            own = self._sessions.pop(session, None)
            if own is not None:
                own.is_closed = True
                self._tidy(own)

    def hide_folders(self, text: str) -> str:
        """Return a text in which files of visitors have their names only."""
        return re.sub(rf"{re.escape(str(self._root))}/(?:[^/\s]+/)*", "", text)

    def _open(self, session: str) -> _Session:
        if session not in self._sessions:
            # The name comes from the browser and is no part of a path.
            folder = Path(tempfile.mkdtemp(prefix="session-", dir=self._root))
            self._sessions[session] = _Session(folder, last_used=time.monotonic())
        own = self._sessions[session]
        own.last_used = time.monotonic()
        return own

    def _close_forgotten(self) -> None:
        now = time.monotonic()
        for session, own in list(self._sessions.items()):
            if not own.num_working and now - own.last_used > self._longest_stay:
                del self._sessions[session]
                own.is_closed = True
                self._tidy(own)

    def _tidy(self, own: _Session) -> None:
        """Remove what is not current, unless it may be in use."""
        if own.num_working:
            return
        if own.is_closed:
            shutil.rmtree(own.folder, ignore_errors=True)
            return
        kept = {own.upload.parent if own.upload else None, own.results}
        for folder in own.folder.iterdir():
            if folder not in kept:
                shutil.rmtree(folder, ignore_errors=True)
