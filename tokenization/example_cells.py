"""Real cells that travel with the package."""

from __future__ import annotations

from pathlib import Path

EXAMPLE_CELLS = "pancreas_baron2016.h5ad"


def example_cells_path() -> Path:
    """Path of 2,142 human pancreas cells of four donors (Baron et al. 2016).

    Raw counts in `X`; `obs` has `cell_type`, `donor`, `library` and `dataset`, `var` has `ensembl_id`.

    Examples
    --------
    >>> import anndata
    >>> anndata.read_h5ad(example_cells_path()).shape
    (2142, 20125)
    """
    return Path(__file__).with_name(EXAMPLE_CELLS)
