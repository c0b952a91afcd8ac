"""Files of the page's visitors: each has its own, and they go in time."""

from pathlib import Path

import pytest

from screformer.annotation import app_sessions
from screformer.annotation.app_sessions import SessionFiles


@pytest.fixture
def upload(tmp_path):
    """Return a function: name, text -> an uploaded file where Gradio puts it."""

    def make(name, text="counts"):
        folder = tmp_path / f"hash-of-{text}"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        return folder / name

    return make


def files_in(root):
    return sorted(path.name for path in root.rglob("*") if path.is_file())


def test_each_visitor_gets_their_own_upload_and_results(upload, tmp_path):
    files = SessionFiles(tmp_path)
    for visitor in ("one", "two"):
        files.keep_upload(visitor, upload("cells.h5ad", visitor))
    for visitor in ("one", "two"):
        with files.working(visitor) as (path, folder):
            assert path.read_text() == visitor
            assert path.name == "cells.h5ad"
            (folder / f"result-{visitor}").touch()
    assert files_in(tmp_path) == ["cells.h5ad", "cells.h5ad", "result-one", "result-two"]
    files.close("one")
    assert files_in(tmp_path) == ["cells.h5ad", "result-two"]
    files.close("one")
    files.close("two")
    assert not list(tmp_path.glob("session-*"))


def test_newer_files_replace_older_ones(upload, tmp_path):
    files = SessionFiles(tmp_path)
    files.keep_upload("one", upload("first.h5ad"))
    for name in ("result-a", "result-b"):
        with files.working("one") as (_, folder):
            (folder / name).touch()
    assert files_in(tmp_path) == ["first.h5ad", "result-b"]
    files.keep_upload("one", upload("second.h5ad"))
    assert files_in(tmp_path) == ["second.h5ad"]
    files.remove_upload("one")
    files.remove_upload("nobody")
    assert files_in(tmp_path) == []


def test_what_is_worked_on_stays_until_the_work_is_done(upload, tmp_path):
    files = SessionFiles(tmp_path)
    files.keep_upload("one", upload("first.h5ad"))
    with files.working("one") as (path, folder):
        files.keep_upload("one", upload("second.h5ad"))
        assert path.exists()
        (folder / "result-of-first").touch()
    assert files_in(tmp_path) == ["second.h5ad"]
    with files.working("one") as (path, folder):
        files.close("one")
        (folder / "result").touch()
        assert path.exists()
    assert not list(tmp_path.glob("session-*"))


def test_work_that_fails_leaves_the_upload_to_try_again(upload, tmp_path):
    files = SessionFiles(tmp_path)
    files.keep_upload("one", upload("cells.h5ad"))
    with pytest.raises(RuntimeError), files.working("one"):
        raise RuntimeError
    with files.working("one") as (path, _):
        assert path.exists()


def test_without_an_upload_there_is_nothing_to_work_on(upload, tmp_path):
    files = SessionFiles(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file yet; choose one"), files.working("one"):
        pass
    files.keep_upload("one", upload("cells.h5ad"))
    files.remove_upload("one")
    with pytest.raises(FileNotFoundError, match="there is no file yet"), files.working("one"):
        pass


def test_an_upload_that_is_gone_or_elsewhere_is_refused(upload, tmp_path):
    files = SessionFiles(tmp_path)
    gone = upload("cells.h5ad")
    gone.unlink()
    mine = files.keep_upload("one", upload("mine.h5ad"))
    (tmp_path.parent / "elsewhere.h5ad").touch()
    for path in (gone, tmp_path.parent / "elsewhere.h5ad", mine):
        with pytest.raises(
            FileNotFoundError, match=f"{path.name} is not on the server any more; choose the file again"
        ):
            files.keep_upload("two", path)
    assert mine.exists()
    assert (tmp_path.parent / "elsewhere.h5ad").exists()


def test_files_of_visitors_who_never_said_goodbye_go_at_the_next_upload(upload, tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(app_sessions.time, "monotonic", lambda: now[0])
    files = SessionFiles(tmp_path, longest_stay=100)
    files.keep_upload("gone", upload("old.h5ad"))
    files.keep_upload("busy", upload("busy.h5ad"))
    with files.working("busy"):
        now[0] = 101
        files.keep_upload("new", upload("new.h5ad"))
        assert files_in(tmp_path) == ["busy.h5ad", "new.h5ad"]


def test_names_of_sessions_are_no_part_of_a_path(upload, tmp_path):
    files = SessionFiles(tmp_path)
    kept = files.keep_upload("../../outside", upload("cells.h5ad"))
    assert kept.resolve().is_relative_to(tmp_path)


def test_messages_name_files_without_folders(tmp_path):
    files = SessionFiles(tmp_path)
    text = f"there is no file {tmp_path}/session-a/upload-b/cells.h5ad; see {Path('/etc/hosts')}"
    assert files.hide_folders(text) == "there is no file cells.h5ad; see /etc/hosts"
