"""What every system that names cell types offers to the comparison: learn from labelled cells, name others."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray = npt.NDArray[np.float32]


class NamedCells(NamedTuple):
    """What a system says of cells.

    Attributes
    ----------
    labels
        A label a cell; "" where the system gives none, which counts as an error.
    scores
        (cells, classes), the higher the likelier; rows of probabilities where the system has them. None where it has
        no scores.
    classes
        Of the columns of `scores`.
    """

    labels: list[str]
    scores: FloatArray | None
    classes: tuple[str, ...]


class CellTypeSystem(Protocol):
    """A way to name cell types. It sees raw counts in `X` and gene names in `var_names`, and nothing of the test cells.

    Attributes
    ----------
    title
        What tables call it.
    is_inductive
        A cell's label does not depend on which others are named with it. Tables mark systems that are not so.
    """

    title: str
    is_inductive: bool

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Learn from labelled cells.

        Parameters
        ----------
        adata
            Raw counts.
        labels
            Of each cell.
        groups
            Donor or data set of each cell, for systems that search their settings by held-out groups.
        seed
            Fixes all that is drawn.

        Raises
        ------
        ImportError
            A package is missing; the message says how to get it.
        ValueError
            There are too few cells or labels.
        """
        ...

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells with the same genes as those it was fitted to.

        Raises
        ------
        ValueError
            The genes are others, or nothing has been fitted.
        """
        ...


def need(package: str, module: str | None = None) -> None:
    """Raise ImportError, with the remedy, unless a package is installed.

    Parameters
    ----------
    package
        As pip calls it.
    module
        As Python calls it, if that is another name.
    """
    if find_spec(module or package) is None:
        raise ImportError(f"{package} is not installed: pip install {package}")


def check_genes(fitted: Sequence[str] | None, adata: AnnData) -> None:
    """Raise ValueError unless a system was fitted, and to these genes in this order."""
    if fitted is None:
        raise ValueError("fit() comes before predict()")
    if list(fitted) != [str(name) for name in adata.var_names]:
        raise ValueError(
            f"adata has {adata.n_vars} genes that are not the {len(fitted)} of fit() in the same order; subset it: "
            "adata[:, fitted_genes]"
        )
