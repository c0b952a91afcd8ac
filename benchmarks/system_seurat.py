"""Seurat's label transfer (Stuart et al. 2019, Cell 177:1888), run by R: ``seurat_transfer.R`` beside this file.

Log-normalised counts, 2,000 variable genes and 30 principal components of the training cells; anchors between these and
the cells to name, which are projected; labels go over by the anchors' weights. Settings are Seurat's own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import h5py
import numpy as np
import numpy.typing as npt
from scipy import sparse

from screformer.benchmarks.cell_type_systems import NamedCells
from screformer.benchmarks.systems_features import Int64Array, query_features, training_cells
from screformer.benchmarks.systems_simple import named_by_scores

if TYPE_CHECKING:
    from anndata import AnnData

R_SCRIPT = "seurat_transfer.R"
R_PACKAGES = ("Seurat", "hdf5r")
REMEDY = "make benchmark-deps, or apt-get install r-base-core r-cran-seurat r-cran-hdf5r"
MIN_CELLS = 3  # to learn from, and to name: of fewer, R makes a vector where Seurat expects a matrix
MAX_COUNTS = 2**31 - 1  # R numbers the entries of a sparse matrix with 32 bits
NUM_SHOWN_LINES = 20


class SeuratLabelTransfer:
    """Seurat's label transfer as a `CellTypeSystem`; transductive: anchors are found with all cells to name together.

    What R needs of memory is not in the peak that the comparison measures, which is that of Python.

    Attributes
    ----------
    seurat_version, r_version
        Of what is installed; None before fit().
    """

    title = "Seurat label transfer"
    is_inductive = False

    def __init__(self) -> None:
        self.seurat_version: str | None = None
        self.r_version: str | None = None
        self._genes: list[str] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Keep the cells: all that Seurat learns, it learns in predict(). `groups` have no effect.

        Raises
        ------
        ImportError
            R or a package of it is missing; the message says which.
        ValueError
            There is not one label a cell, there are too few labels or cells, or counts are not raw.
        """
        self.seurat_version, self.r_version = need_seurat()
        cells = training_cells(adata, labels)
        _check_number_of_cells(adata)
        self._counts, self._class_ids, self._seed = sparse.csr_array(adata.X), cells.class_ids, seed
        self._genes, self._classes = cells.genes, cells.classes

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells; scores are shares of the anchors' weights, and sum to 1.

        Raises
        ------
        ChildProcessError
            R failed; the message has what it wrote last.
        ValueError
            The genes are others, nothing has been fitted, counts are not raw, or there are too few cells.
        """
        query_features(adata, self._genes)  # for its checks
        _check_number_of_cells(adata)
        with TemporaryDirectory(prefix="seurat-") as folder:
            given, answer = Path(folder) / "cells.h5", Path(folder) / "scores.h5"
            write_cells(given, self._counts, sparse.csr_array(adata.X), self._class_ids, len(self._classes))
            with as_file(files("screformer.benchmarks") / R_SCRIPT) as script:
                run_r([str(script), str(given), str(answer), str(self._seed)])
            with h5py.File(answer) as file:
                scores = file["scores"][:]
        return named_by_scores(scores, self._classes)


def need_seurat() -> tuple[str, str]:
    """Return the versions of Seurat and R, or raise ImportError, with the remedy, unless R has it and hdf5r."""
    if shutil.which("Rscript") is None:
        raise ImportError(f"R is not installed, there is no Rscript on the PATH: {REMEDY}")
    named = ", ".join(f"'{name}'" for name in R_PACKAGES)
    look = (
        f"for (p in c({named})) cat(if (nzchar(system.file(package = p))) format(packageVersion(p)), '\\n'); "
        "cat(format(getRversion()))"
    )
    try:
        *versions, r_version = (line.strip() for line in run_r(["-e", look]).splitlines())
    except ChildProcessError as error:
        raise ImportError(str(error)) from error
    missing = [name for name, version in zip(R_PACKAGES, versions, strict=True) if not version]
    if missing:
        raise ImportError(f"R lacks {' and '.join(missing)}: {REMEDY}")
    return versions[0], r_version


def run_r(arguments: Sequence[str]) -> str:
    """Run Rscript, without the user's profile, and return what it printed.

    Raises
    ------
    ChildProcessError
        It ended with another exit code than 0.
    """
    command = ["Rscript", "--no-init-file", *arguments]
    environment = {**os.environ, "LC_ALL": "C"}  # messages in English
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    if done.returncode:
        written = "\n".join(done.stderr.strip().splitlines()[-NUM_SHOWN_LINES:]) or "(nothing)"
        remedy = (
            "most likely it ran out of memory: take fewer cells"
            if done.returncode < 0
            else f"if a package is broken: {REMEDY}"
        )
        raise ChildProcessError(f"Rscript ended with exit code {done.returncode}; {remedy}. It wrote:\n{written}")
    return done.stdout


def write_cells(
    path: Path, reference: sparse.csr_array, query: sparse.csr_array, class_ids: Int64Array, num_classes: int
) -> None:
    """Write what ``seurat_transfer.R`` reads.

    Parameters
    ----------
    path
        Of a new HDF5 file.
    reference, query
        Raw counts (cells, genes).
    class_ids
        (reference cells,), from 0.
    num_classes
        How many there are.

    Raises
    ------
    ValueError
        There are more counts than R's sparse matrices hold.
    """
    with h5py.File(path, "w") as file:
        for name, counts in (("reference", reference), ("query", query)):
            if counts.nnz > MAX_COUNTS:
                raise ValueError(
                    f"the {name} cells have {counts.nnz} counts above 0; R's sparse matrices hold {MAX_COUNTS}: "
                    "take fewer cells"
                )
            counts = counts.copy()
            counts.sum_duplicates()  # which also sorts, as R wants them
            group = file.create_group(name)
            group["data"] = counts.data.astype(np.float64)
            group["indices"], group["indptr"] = _int32(counts.indices), _int32(counts.indptr)
            group["shape"] = _int32(counts.shape)
        file["class_ids"] = _int32(class_ids)
        file["num_classes"] = _int32([num_classes])


def _int32(values: npt.ArrayLike) -> npt.NDArray[np.int32]:
    return np.asarray(values, dtype=np.int32)


def _check_number_of_cells(adata: AnnData) -> None:
    if adata.n_obs < MIN_CELLS:
        raise ValueError(f"adata has {adata.n_obs} cells; Seurat needs at least {MIN_CELLS}: add cells")
