"""scCATCH (Shao et al. 2020, iScience 23:100882): clusters named by the marker genes that a database lists.

Written from the paper. The original takes the user's clusters; here Ward's method makes them, on the principal
components of the training cells. Markers come from a table like CellMatch, which is GPL and never packaged, or from
the training cells.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import sparse
from scipy.stats import mannwhitneyu
from sklearn.cluster import AgglomerativeClustering

from screformer.benchmarks.cell_type_systems import NamedCells
from screformer.benchmarks.system_scpred import Components, check_label_sizes, fit_components
from screformer.benchmarks.systems_features import query_features, training_cells

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]

MIN_SHARE, MIN_LOG_FOLD, MAX_P_VALUE = 0.25, 0.25, 0.05
NUM_TRAINED_MARKERS = 50  # of a label, so that no label wins by the length of its list
COLUMNS = ("species", "tissue", "cancer", "celltype", "gene", "pmid")


class Marker(NamedTuple):
    """One row of a marker table: a paper says that a gene marks a cell type."""

    cell_type: str
    gene: str
    paper: str


class ScCatch:
    """scCATCH as a `CellTypeSystem`; transductive: it names clusters of the cells it is given, and gives no scores.

    Attributes
    ----------
    title
        What tables call it.

    Parameters
    ----------
    markers
        A csv file with the columns of CellMatch; None takes markers from the training cells.
    tissues
        Which tissues of the file to use; empty is all.
    label_of_type
        Cell type of the file -> label; a type that is not in it competes, and its cells get no label.
    num_clusters
        None is the number of labels.
    """

    is_inductive = False

    def __init__(
        self,
        *,
        markers: str | Path | None = None,
        tissues: Sequence[str] = (),
        label_of_type: Mapping[str, str] | None = None,
        num_clusters: int | None = None,
    ) -> None:
        if num_clusters is not None and num_clusters < 1:
            raise ValueError(f"num_clusters got {num_clusters}; it must be at least 1, or None: as many as labels")
        source = "training markers" if markers is None else "marker table"
        self.title = f"scCATCH (own port, {source})"
        self._table = None if markers is None else read_markers(markers, tissues=tissues)
        self._label_of_type = label_of_type
        self._num_clusters = num_clusters
        self._genes: list[str] | None = None
        self._classes: tuple[str, ...] = ()
        self._components: Components | None = None
        self._markers: list[Marker] = []

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Learn components, and markers if there is no table; `groups` and `seed` have no effect: nothing is drawn.

        Raises
        ------
        ValueError
            There is not one label a cell, there are too few labels or cells, or counts are not raw.
        """
        cells = training_cells(adata, labels)
        check_label_sizes(cells)
        self._components = fit_components(adata.X, cells.features)
        self._genes, self._classes = cells.genes, cells.classes
        if self._table is not None:
            self._markers = self._table
            return
        found = cluster_markers(cells.features, cells.class_ids)
        self._markers = [
            Marker(label, cells.genes[gene], "training cells")
            for label, columns in zip(self._classes, found, strict=True)
            for gene in columns[:NUM_TRAINED_MARKERS]
        ]

    def predict(self, adata: AnnData) -> NamedCells:
        """Name each cluster of the given cells; "" where no marker or no label fits.

        Raises
        ------
        ValueError
            The genes are others, nothing has been fitted, or counts are not raw.
        """
        features = query_features(adata, self._genes)
        assert self._components is not None
        num_clusters = min(self._num_clusters or len(self._classes), adata.n_obs)
        projected = self._components.project(features)
        clusters = np.zeros(adata.n_obs, dtype=np.int64)
        if num_clusters > 1:
            clusters = AgglomerativeClustering(num_clusters).fit_predict(projected)
        listed = {marker.gene for marker in self._markers}
        columns = np.array([i for i, gene in enumerate(self._genes or []) if gene in listed], dtype=np.int64)
        found = cluster_markers(sparse.csr_array(features[:, columns]), clusters)
        names = [self._name({str(adata.var_names[columns[gene]]) for gene in genes}) for genes in found]
        return NamedCells([names[cluster] for cluster in clusters], None, self._classes)

    def _name(self, genes: set[str]) -> str:
        scores = type_scores(self._markers, genes)
        best = max(sorted(scores), key=scores.__getitem__, default="")
        return best if self._label_of_type is None else self._label_of_type.get(best, "")


def read_markers(path: str | Path, *, tissues: Sequence[str] = ()) -> list[Marker]:
    """Return the human markers of normal tissue in a csv file with the columns of CellMatch.

    Raises
    ------
    ValueError
        Columns are missing, or no row is left.
    """
    table = pd.read_csv(path, dtype=str)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise ValueError(f"markers lacks the columns {missing}; give a csv file with {list(COLUMNS)}")
    kept = table[(table["species"] == "Human") & (table["cancer"] == "Normal")]
    kept = kept[kept["tissue"].isin(list(tissues))] if tissues else kept
    rows = kept[["celltype", "gene", "pmid"]].dropna()
    if rows.empty:
        raise ValueError(f"markers has no human row of normal tissue in tissues={list(tissues)}; name others")
    return [Marker(*map(str, row)) for row in rows.itertuples(index=False)]


def type_scores(markers: Sequence[Marker], genes: set[str]) -> dict[str, float]:
    """Return cell type -> sqrt(n/(n+1) * p/(p+1)): n rows with one of the genes, p papers of these rows."""
    papers: dict[str, list[str]] = {}
    for marker in markers:
        if marker.gene in genes:
            papers.setdefault(marker.cell_type, []).append(marker.paper)
    return {
        name: float(np.sqrt(len(rows) / (len(rows) + 1) * len(set(rows)) / (len(set(rows)) + 1)))
        for name, rows in papers.items()
    }


def cluster_markers(features: sparse.csr_array, clusters: Int64Array) -> list[Int64Array]:
    """Return each cluster's marker genes, the one furthest above its nearest cluster first.

    A gene is in at least a quarter of the cluster's cells, and against each other cluster its mean log1p CP10k is at
    least 0.25 higher and the one-sided Wilcoxon p-value is below 0.05.

    Parameters
    ----------
    features
        (cells, genes), log1p CP10k.
    clusters
        (cells,), from 0 without gaps.
    """
    parts = [features[clusters == cluster] for cluster in range(int(clusters.max()) + 1)]
    means = np.stack([np.asarray(part.mean(axis=0)).ravel() for part in parts])
    shares = np.stack([np.asarray((part > 0).mean(axis=0)).ravel() for part in parts])
    found = []
    for cluster, part in enumerate(parts):
        others = [other for other in range(len(parts)) if other != cluster]
        lead = means[cluster] - (means[others].max(axis=0) if others else 0)
        genes = np.flatnonzero((shares[cluster] >= MIN_SHARE) & (lead >= MIN_LOG_FOLD))
        for other in others:
            if len(genes):
                genes = genes[exceeds(part[:, genes].toarray(), parts[other][:, genes].toarray())]
        found.append(genes[np.argsort(-lead[genes], kind="stable")])
    return found


def exceeds(ours: FloatArray, theirs: FloatArray) -> npt.NDArray[np.bool_]:
    """Return (genes,): whether values (cells, genes) are higher by a one-sided Wilcoxon rank sum test, p < 0.05."""
    p_values = mannwhitneyu(ours, theirs, alternative="greater", method="asymptotic", axis=0).pvalue
    return np.asarray(p_values < MAX_P_VALUE)
