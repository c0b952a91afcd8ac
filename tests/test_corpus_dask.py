"""A Dask cluster writes the same corpus as one process, even if a worker is killed on the way."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from small_corpus import make_cells, make_tokenizer

from screformer.tokenization import build_corpus

distributed = pytest.importorskip("distributed")


def corpus_bytes(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "build_log.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Dask's own warnings, of ports and of unclosed sockets of the killed worker.
@pytest.mark.filterwarnings("ignore")
def test_a_killed_worker_of_a_cluster_changes_nothing(tmp_path) -> None:
    for seed in range(2):
        make_cells(600, seed=seed).write_h5ad(tmp_path / f"{seed}.h5ad")
    files = sorted(tmp_path.glob("*.h5ad"))
    options = {"tokenizer": make_tokenizer(), "obs_columns": ["donor"], "cells_per_shard": 10}
    expected = build_corpus(files, tmp_path / "alone", **options)
    killed: list[int] = []

    def kill_after_ten_shards(pid: int) -> None:
        work = tmp_path / "cluster.partial" / "work"
        while len(list(work.glob("cells-*.json"))) < 10:
            time.sleep(0.01)
        os.kill(pid, signal.SIGKILL)
        killed.append(len(list(work.glob("cells-*.json"))))

    with (
        distributed.LocalCluster(processes=True, n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        pids = list(client.run(os.getpid).values())
        assert len(set(pids)) == 2
        assert os.getpid() not in pids
        killer = threading.Thread(target=kill_after_ten_shards, args=(pids[0],), daemon=True)
        killer.start()
        build_corpus(files, tmp_path / "cluster", scheduler=cluster.scheduler_address, **options)
        killer.join()
    assert killed[0] < len(expected.manifest["shards"]) == 120
    assert corpus_bytes(tmp_path / "cluster") == corpus_bytes(tmp_path / "alone")
