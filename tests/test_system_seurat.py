import os
import shutil
import stat
import tempfile
from functools import partial

import anndata
import h5py
import numpy as np
import pytest
from scipy import sparse

from screformer.benchmarks import system_seurat
from screformer.benchmarks.cell_type_systems import need
from screformer.benchmarks.known_systems import REQUIREMENTS, SYSTEMS, missing_packages
from screformer.benchmarks.system_seurat import SeuratLabelTransfer, run_r, write_cells

LABELS = ["T cell, CD4+ (naive)", "T cell, CD4+ [naive]", "β cell/max"]  # which R would mangle, two of them alike
CHECKING = '[ "$2" = -e ] && { printf "5.1.0\\n1.3.8\\n4.2.2"; exit 0; }\n'  # the packages are there


def made_up_cells(seed: int, num_cells: int = 60) -> tuple[anndata.AnnData, list[str]]:
    """Cells of three types, each with eight genes of its own among 80."""
    generator = np.random.default_rng(seed)
    kinds = np.arange(num_cells) % len(LABELS)
    rates = np.full((num_cells, 80), 2.0)
    for kind in range(len(LABELS)):
        rates[kinds == kind, 8 * kind : 8 * kind + 8] = 10
    adata = anndata.AnnData(sparse.csr_matrix(generator.poisson(rates).astype(np.float32)))
    adata.var_names = [f"a_gene-{number}" for number in range(80)]
    return adata, [LABELS[kind] for kind in kinds]


@pytest.fixture
def fake_rscript(tmp_path, monkeypatch):
    """Return a function that puts a shell script in the place of Rscript."""

    def put(lines: str) -> None:
        path = tmp_path / "Rscript"
        path.write_text(f"#!/bin/sh\n{lines}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")

    return put


def has_seurat() -> bool:
    return not missing_packages("seurat")


# Without R


def test_without_rscript_fit_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImportError, match=r"no Rscript on the PATH: make benchmark-deps, or apt-get install .*seurat"):
        SeuratLabelTransfer().fit(*made_up_cells(0))
    [missing] = missing_packages("seurat")
    assert "R is not installed" in missing


@pytest.mark.parametrize(
    ("printed", "missing"), [(r"\n1.3.8\n4.2.2", "R lacks Seurat:"), (r"\n\n4.2.2", "R lacks Seurat and hdf5r: make")]
)
def test_missing_packages_of_r_are_named(fake_rscript, printed, missing):
    fake_rscript(f"printf '{printed}'")
    with pytest.raises(ImportError, match=missing):
        SeuratLabelTransfer().fit(*made_up_cells(0))


def test_an_r_that_does_not_run_counts_as_missing(fake_rscript):
    fake_rscript("echo cannot open libR.so >&2; exit 127")
    with pytest.raises(ImportError, match=r"(?s)exit code 127; .*make benchmark-deps.*cannot open libR\.so"):
        SeuratLabelTransfer().fit(*made_up_cells(0))


def test_a_failing_script_shows_what_r_wrote_and_leaves_no_files(fake_rscript, tmp_path, monkeypatch):
    fake_rscript(CHECKING + 'for i in $(seq 30); do echo "line $i" >&2; done; exit 3')
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    adata, labels = made_up_cells(0)
    system = SeuratLabelTransfer()
    system.fit(adata, labels)
    assert (system.seurat_version, system.r_version) == ("5.1.0", "4.2.2")
    with pytest.raises(ChildProcessError, match=r"(?s)exit code 3; if a package is .*\nline 11\n.*line 30$"):
        system.predict(adata)
    assert not list(folder.iterdir())


def test_a_killed_r_is_said_to_lack_memory(fake_rscript):
    fake_rscript("kill -9 $$")
    with pytest.raises(ChildProcessError, match=r"exit code -9; most likely it ran out of memory.*\n\(nothing\)"):
        run_r(["-e", "1"])


def test_other_genes_few_cells_and_predict_before_fit_are_refused(fake_rscript):
    fake_rscript(CHECKING)
    adata, labels = made_up_cells(0)
    system = SeuratLabelTransfer()
    with pytest.raises(ValueError, match="comes before predict"):
        system.predict(adata)
    with pytest.raises(ValueError, match="at least 2 labels"):
        system.fit(adata, LABELS[:1] * 60)
    with pytest.raises(ValueError, match="adata has 2 cells; Seurat needs at least 3"):
        system.fit(adata[:2], labels[:2])
    system.fit(adata, labels)
    with pytest.raises(ValueError, match="not the 80 of fit"):
        system.predict(adata[:, ::-1])
    with pytest.raises(ValueError, match="adata has 2 cells; Seurat needs at least 3"):
        system.predict(adata[:2])


def test_the_file_for_r_has_the_counts_sorted_by_gene(tmp_path, monkeypatch):
    dense = np.array([[0, 2, 1], [3, 0, 0]])
    unsorted = sparse.csr_array((np.array([1.0, 2, 3]), np.array([2, 1, 0]), np.array([0, 2, 3])), shape=(2, 3))
    write_cells(tmp_path / "cells.h5", unsorted, unsorted[:1], np.array([1, 0]), 2)
    with h5py.File(tmp_path / "cells.h5") as file:
        group = file["reference"]
        assert group["indices"][:].tolist() == [1, 2, 0]
        kept = sparse.csr_array((group["data"][:], group["indices"][:], group["indptr"][:]), shape=group["shape"][:])
        np.testing.assert_array_equal(kept.toarray(), dense)
        assert file["query/shape"][:].tolist() == [1, 3]
        assert file["class_ids"][:].tolist() == [1, 0]
    assert unsorted.indices.tolist() == [2, 1, 0]  # the caller's stay as they are
    monkeypatch.setattr(system_seurat, "MAX_COUNTS", 2)
    with pytest.raises(ValueError, match="reference cells have 3 counts above 0; R's sparse matrices hold 2"):
        write_cells(tmp_path / "more.h5", unsorted, unsorted, np.array([1, 0]), 2)


# Which systems are ready


def test_what_is_missing_is_what_fit_would_say(monkeypatch):
    needed = (partial(need, "no-such-package", "no_such_package"), partial(need, "numpy"), partial(need, "nor-this"))
    monkeypatch.setitem(REQUIREMENTS, "knn", needed)
    assert missing_packages("knn") == [
        "no-such-package is not installed: pip install no-such-package",
        "nor-this is not installed: pip install nor-this",
    ]
    assert missing_packages("majority_class") == []


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name in REQUIREMENTS])
def test_fit_of_a_system_raises_for_the_first_package_that_is_missing(name):
    missing = missing_packages(name)
    if not missing:
        pytest.skip("all is installed")
    with pytest.raises(ImportError) as raised:
        SYSTEMS[name]().fit(*made_up_cells(0))
    assert str(raised.value) == missing[0]


# With R


@pytest.mark.slow
@pytest.mark.skipif(not has_seurat(), reason="needs R with Seurat and hdf5r: make benchmark-deps")
@pytest.mark.parametrize(("num_train", "num_test", "least"), [(300, 240, 0.9), (60, 12, 0.6), (6, 3, 0.6)])
def test_it_names_new_cells_however_few(num_train, num_test, least):
    (train, train_labels), (test, test_labels) = made_up_cells(0, num_train), made_up_cells(1, num_test)
    system = SeuratLabelTransfer()
    system.fit(train, train_labels, seed=1)
    named = system.predict(test)
    right = np.mean([label == truth for label, truth in zip(named.labels, test_labels, strict=True)])
    assert right > least  # chance is a third
    assert named.classes == tuple(sorted(LABELS))
    assert named.labels == [named.classes[index] for index in named.scores.argmax(axis=1)]
    np.testing.assert_allclose(named.scores.sum(axis=1), 1, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not has_seurat(), reason="needs R with Seurat and hdf5r: make benchmark-deps")
def test_same_seed_same_scores_and_global_generators_stay():
    (train, labels), (test, _) = made_up_cells(0), made_up_cells(1)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    scores = []
    for _ in range(2):
        system = SeuratLabelTransfer()
        system.fit(train, labels, seed=3)
        scores.append(system.predict(test).scores)
    np.testing.assert_array_equal(*scores)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.skipif(shutil.which("Rscript") is None, reason="needs R: make benchmark-deps")
def test_the_script_is_r_that_parses():
    script = system_seurat.files("screformer.benchmarks") / system_seurat.R_SCRIPT
    run_r(["-e", f"invisible(parse({str(script)!r}))"])
