"""A build killed at any moment, with its workers, leaves what the next run turns into the same corpus."""

import random
import subprocess
import sys
from pathlib import Path

import anndata
import pytest
from small_corpus import make_cells, make_tokenizer

from screformer.tokenization import build_corpus, open_corpus
from screformer.tokenization.corpus_files import only_run

# Imports once, then builds in forked processes, each of which leads a group that can be killed with its workers.
BUILDS = """
import os, signal, sys, time
from pathlib import Path

from screformer.tokenization import ScReformerTokenizer, build_corpus

def build(output, num_workers):
    tokenizer = ScReformerTokenizer.from_pretrained(folder / "tokenizer")
    build_corpus(
        sorted(folder.glob("*.h5ad")), output, tokenizer=tokenizer, obs_columns=["donor"], cells_per_shard=20,
        num_workers=num_workers,
    )

if __name__ == "__main__":
    folder, num_workers = Path(sys.argv[1]), int(sys.argv[2])
    build(folder / "whole", 1)
    began = time.monotonic()
    build(folder / "timed", 1)
    # Workers import the package first, which takes some seconds.
    seconds = time.monotonic() - began + (6 if num_workers > 1 else 0)
    for number, moment in enumerate(map(float, sys.argv[3:])):
        child = os.fork()
        if child == 0:
            os.setsid()
            build(folder / f"killed{number}", num_workers)
            os._exit(0)
        time.sleep(0.05 + moment * seconds)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
        os.waitpid(child, 0)
"""


def corpus_bytes(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "build_log.json"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize(
    ("num_kills", "num_workers"), [(4, 1), pytest.param(10, 2, marks=pytest.mark.slow)], ids=["alone", "workers"]
)
def test_a_build_killed_at_random_moments_gives_the_same_corpus(tmp_path, num_kills: int, num_workers: int) -> None:
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    first, second = make_cells(400, seed=0), make_cells(300, seed=1)
    first.write_h5ad(tmp_path / "a.h5ad")
    # Duplicates, so that the last step has shards to write again.
    second.obs_names = "other" + second.obs_names
    anndata.concat([second, first[::7]]).write_h5ad(tmp_path / "b.h5ad")
    generator = random.Random(2022)
    moments = [str(generator.uniform(0, 1)) for _ in range(num_kills)]
    (tmp_path / "builds.py").write_text(BUILDS)
    command = [sys.executable, tmp_path / "builds.py", tmp_path, str(num_workers), *moments]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    expected = corpus_bytes(tmp_path / "whole")
    num_stopped = 0
    for number in range(num_kills):
        output = tmp_path / f"killed{number}"
        num_stopped += not output.exists()
        corpus = build_corpus(
            sorted(tmp_path.glob("*.h5ad")), output, tokenizer=tokenizer, obs_columns=["donor"], cells_per_shard=20
        )
        assert corpus_bytes(output) == expected
        assert corpus.manifest["totals"]["dropped"] == {"duplicate": 58}
    assert num_stopped
    assert not list(tmp_path.rglob("*.part*"))


def test_a_second_run_into_the_same_output_is_refused(tmp_path) -> None:
    make_cells(20).write_h5ad(tmp_path / "cells.h5ad")
    with (
        only_run(tmp_path / "corpus"),
        pytest.raises(BlockingIOError, match=r"another run is building .*corpus now \(it holds corpus\.lock\)"),
    ):
        build_corpus(tmp_path / "cells.h5ad", tmp_path / "corpus", tokenizer=make_tokenizer())
    # A killed run leaves the file, but not the lock.
    (tmp_path / "corpus.lock").touch()
    build_corpus(tmp_path / "cells.h5ad", tmp_path / "corpus", tokenizer=make_tokenizer())
    assert len(open_corpus(tmp_path / "corpus")) == 20
    assert not (tmp_path / "corpus.lock").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path) -> None:
    make_cells(20).write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "corpus.partial" / "tokenizer").mkdir(parents=True)
    (tmp_path / "corpus.partial" / "tokenizer" / "genes.json").write_text("{")
    (tmp_path / "corpus.partial" / "tokenizer" / "genes.json.0123456789ab.part").write_text("{")
    for name in ("thesis.txt", "work/thesis.txt", "tokenizer/thesis.txt", "thesis.part"):
        path = tmp_path / "corpus.partial" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("years of work")
        with pytest.raises(ValueError, match=rf"corpus\.partial is no corpus that was begun: it has {name}; move it"):
            build_corpus(tmp_path / "cells.h5ad", tmp_path / "corpus", tokenizer=make_tokenizer())
        assert path.read_text() == "years of work"
        path.unlink()
    build_corpus(tmp_path / "cells.h5ad", tmp_path / "corpus", tokenizer=make_tokenizer())
    assert len(open_corpus(tmp_path / "corpus")) == 20
