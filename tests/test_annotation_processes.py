"""A killed annotation loses a block at most, and several processes give what one gives."""

import signal
import sys

import anndata
import numpy as np
import pandas as pd
import pytest
from annotation_processes import annotate_in_processes
from small_corpus import make_cells
from test_annotate import save_checkpoint

from screformer.annotation import annotate_file

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes are not killed and forked so there")


@pytest.fixture
def arguments(tiny_config, tmp_path):
    make_cells(num_cells=52).write_h5ad(tmp_path / "cells.h5ad")
    checkpoint = save_checkpoint(tiny_config, tmp_path / "finetuned")
    (tmp_path / "out").mkdir()
    annotate_file(tmp_path / "cells.h5ad", checkpoint, tmp_path / "expected.h5ad", progress=False)
    return tmp_path / "cells.h5ad", checkpoint, tmp_path / "out" / "out.h5ad"


def check(arguments):
    found, expected = (anndata.read_h5ad(path) for path in (arguments[2], arguments[0].parent / "expected.h5ad"))
    pd.testing.assert_frame_equal(found.obs, expected.obs, rtol=1e-5)
    key = "screformer_probabilities"
    np.testing.assert_allclose(found.obsm[key], expected.obsm[key], atol=1e-6)


def test_a_killed_run_keeps_all_blocks_but_the_one_it_was_at(arguments):
    folder = arguments[2].parent
    assert annotate_in_processes(arguments, killed_at=3) == [-signal.SIGKILL]
    assert annotate_in_processes(arguments, killed_at=2) == [-signal.SIGKILL]
    assert [path.name for path in folder.iterdir()] == ["out.h5ad.partial"]
    assert len(list(folder.glob("out.h5ad.partial/*.npy"))) == 5
    assert annotate_in_processes(arguments) == [0]
    assert (folder / "written_by_0_of_1.txt").read_text() == "5 6"  # of seven blocks
    assert not list(folder.glob("*.partial"))
    check(arguments)


def test_two_processes_share_the_blocks_and_one_writes_them_in_order(arguments):
    folder = arguments[2].parent
    assert annotate_in_processes(arguments, num_processes=2) == [0, 0]
    shares = [(folder / f"written_by_{rank}_of_2.txt").read_text() for rank in range(2)]
    assert shares == ["0 2 4 6", "1 3 5"]
    check(arguments)


def test_a_run_of_two_processes_goes_on_with_one(arguments):
    assert -signal.SIGKILL in annotate_in_processes(arguments, num_processes=2, killed_at=2)
    assert annotate_in_processes(arguments) == [0]
    check(arguments)
