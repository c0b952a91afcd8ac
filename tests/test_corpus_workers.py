"""Items give the same results wherever they are run, and a worker that dies is an error one can act on."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_corpus import make_cells, make_tokenizer

from screformer.tokenization import build_corpus, corpus_workers
from screformer.tokenization.corpus_shards import ShardItem, close_sources, write_shard
from screformer.tokenization.corpus_workers import Workers, available_cores


def corpus_bytes(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "build_log.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def run(function, items, *options):
    with Workers(*options) as workers:
        return list(workers.run(function, items))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_every_item_is_done_once(num_workers: int) -> None:
    before = dict(os.environ)
    assert sorted(run(abs, range(-9, 0), num_workers)) == list(range(1, 10))
    assert dict(os.environ) == before


def test_workers_have_one_thread() -> None:
    assert run(os.getenv, ["OMP_NUM_THREADS"] * 3, 2) == ["1"] * 3


def test_what_an_item_raises_is_raised() -> None:
    with pytest.raises(ValueError, match=r"math domain error|nonnegative"):
        run(math.sqrt, [4.0, -1.0, 9.0], 2)


def test_a_worker_that_dies_is_named() -> None:
    with pytest.raises(ChildProcessError, match=r"a worker process died; .* call it again with the same arguments"):
        run(os._exit, [9, 9, 9], 2)


# What runs the tests may ignore Ctrl-C, and so would what it starts in its own process.
INTERRUPTED = """
import os, signal, subprocess, sys, tempfile, threading, time
from pathlib import Path

from screformer.tokenization.corpus_workers import Workers

folder = Path(sys.argv[1])

def wait_with_a_child(number):
    with tempfile.TemporaryDirectory(dir=folder):
        subprocess.run(["sleep", "300.5"], check=True)

def interrupt():
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.1)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt, daemon=True).start()
    with Workers(2) as workers:
        list(workers.run(wait_with_a_child, range(6)))
"""


def test_control_c_does_not_wait_for_what_is_being_done_and_nothing_is_left_of_it(tmp_path) -> None:
    (tmp_path / "waits.py").write_text(INTERRUPTED)
    (tmp_path / "work").mkdir()
    given = [sys.executable, str(tmp_path / "waits.py"), str(tmp_path / "work")]
    ended = subprocess.run(given, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert "KeyboardInterrupt" in ended.stderr
    assert not list((tmp_path / "work").iterdir())
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(b"300.5" in command for command in commands)


def test_two_workers_write_the_same_bytes_as_one(tmp_path) -> None:
    paths = []
    for seed in range(2):
        paths.append(tmp_path / f"{seed}.h5ad")
        make_cells(60, seed=seed).write_h5ad(paths[-1])
    for num_workers in (1, 2):
        build_corpus(
            paths,
            tmp_path / str(num_workers),
            tokenizer=make_tokenizer(),
            obs_columns=["donor"],
            cells_per_shard=25,
            num_workers=num_workers,
        )
    assert corpus_bytes(tmp_path / "1") == corpus_bytes(tmp_path / "2")
    assert json.loads((tmp_path / "2" / "build_log.json").read_text())["num_workers"] == 2


def test_without_dask_the_extra_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ImportError, match=r'scheduler: needs Dask.*pip install "screformer\[distributed\]"'):
        run(abs, [1], 1, "tcp://127.0.0.1:1")


@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_does_not_answer_is_named(monkeypatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr(corpus_workers, "CONNECT_SECONDS", 0.3)
    for address in ("tcp://127.0.0.1:1", "nonsense://"):
        with pytest.raises(ConnectionError, match=f"no Dask scheduler answers at '{address}'"):
            run(abs, [1], 1, address)


def test_a_worker_elsewhere_needs_the_same_folder_and_release(tmp_path) -> None:
    make_cells(5).write_h5ad(tmp_path / "cells.h5ad")
    item = ShardItem(
        run="run",
        folder=str(tmp_path / "absent"),
        file="cells-00000.arrow",
        source=0,
        matrix={"path": str(tmp_path / "cells.h5ad")},
        first_cell=0,
        num_cells=5,
        fingerprint="other",
        obs_columns=(),
        allow=(),
        filters=None,
        keep_empty=False,
    )
    with pytest.raises(FileNotFoundError, match="a file system that all workers share"):
        write_shard(item)
    make_tokenizer().save_pretrained(tmp_path / "absent" / "tokenizer")
    with pytest.raises(ValueError, match="and other here; install the same release of screformer everywhere"):
        write_shard(item)
    close_sources()


def test_cores_are_those_this_process_may_use() -> None:
    assert 1 <= available_cores() <= os.cpu_count()
