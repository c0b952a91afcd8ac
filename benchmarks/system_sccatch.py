"""scCATCH (Shao et al. 2020, iScience 23:100882): clusters named by the marker genes that a database lists.

Written from the paper and from the manual of its package. Markers come from a table like CellMatch, see
`marker_tables`, or from the training cells. Cell types are named, not the subtypes that CellMatch has of some.

The original takes the user's clusters, and leaves it to the user whether a cluster's genes must be above each other
cluster or above all others together. Both decide more than the markers do, so both are searched on training cells: the
held-out ones are clustered, by Ward's method or k-means, and named by markers of the rest. The graph of shared
neighbours, cut up by Louvain's method, as toolkits do it, was tried there too: it left no cluster for the rarest types
of a few hundred cells.

What limits it: cells whose types differ little, like CD8 T and NK cells, share a cluster. A table also misses types
that it lists under another name or with few rows (CellMatch has one row for ductal cells, a hundred for beta cells),
and with few cells its inner score, which chooses the clustering, says little: on the random split of pbmc3k and on a
held-out pancreas donor the chosen one was worse than Ward's with as many clusters as labels. It is left as chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.stats import mannwhitneyu
from sklearn.cluster import AgglomerativeClustering, KMeans

from screformer.benchmarks.cell_type_systems import NamedCells
from screformer.benchmarks.marker_tables import Marker, MarkersMissingError, MarkerTable, MarkerTypes, read_markers
from screformer.benchmarks.simple_baselines import inner_folds
from screformer.benchmarks.system_scpred import Components, check_label_sizes, fit_components
from screformer.benchmarks.systems_features import (
    BoolArray,
    TrainingCells,
    check_groups,
    held_out_scores,
    query_features,
    training_cells,
)

if TYPE_CHECKING:
    from anndata import AnnData

FloatArray = npt.NDArray[np.float64]
Int64Array = npt.NDArray[np.int64]
Others = Literal["each", "together"]
Method = Literal["ward", "k_means"]

MIN_SHARE, MIN_LOG_FOLD, MAX_P_VALUE = 0.25, 0.25, 0.05
NUM_TRAINED_MARKERS = 20  # of a label, so that no label wins by the length of its list
MAX_WARD_CELLS = 20_000  # 2 GB: memory grows with their square
NUM_STARTS = 10  # of k-means


class Clustering(NamedTuple):
    """How cells are clustered, and what a cluster's genes must be above.

    Attributes
    ----------
    method
        Ward's, or k-means.
    clusters_per_label
        So many times the training labels is the number of clusters.
    others
        Each other cluster, which fails where a type has two clusters, or all others together.
    """

    method: Method
    clusters_per_label: int
    others: Others


METHODS: tuple[Method, ...] = ("ward", "k_means")
# More clusters than labels were never better against each other cluster: a type's clusters have no gene of their own.
CLUSTERINGS = tuple(
    Clustering(method, number, "each" if number == 1 else "together") for number in (1, 2, 3, 4) for method in METHODS
)


class ScCatch:
    """scCATCH as a `CellTypeSystem`; transductive: it names clusters of the cells it is given, and gives no scores.

    Markers are those of the training cells.

    Attributes
    ----------
    title
        What tables call it.
    method, clusters_per_label, others
        Of the chosen `Clustering`; None before `fit`.
    """

    title = "scCATCH (own port, training markers)"
    is_inductive = False

    def __init__(self) -> None:
        self.method: str | None = None
        self.clusters_per_label: int | None = None
        self.others: str | None = None
        self._genes: list[str] | None = None
        self._classes: tuple[str, ...] = ()
        self._components: Components | None = None
        self._markers: list[Marker] = []
        self._seed = 0

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Choose the clustering on held-out training cells, then learn components and markers of all.

        Raises
        ------
        ValueError
            There is not one label or group a cell, there are too few labels or cells, or counts are not raw.
        """
        cells = training_cells(adata, labels)
        check_label_sizes(cells)
        check_groups(groups, adata.n_obs)
        counts = sparse.csr_array(adata.X)
        folds = inner_folds(cells.class_ids, groups, seed)
        class_of = {label: number for number, label in enumerate(cells.classes)}

        def predict_held_out(train: BoolArray, test: BoolArray) -> list[Int64Array]:
            places = fit_components(counts[train], cells.features[train]).project(cells.features[test])
            markers, features = self._find_markers(cells, train), sparse.csr_array(cells.features[test])
            found = []
            for clustering in CLUSTERINGS:
                clusters = cluster_cells(places, clustering, len(cells.classes), seed=seed)
                types = name_clusters(features, cells.genes, clusters, markers, others=clustering.others)
                ids = np.array([class_of.get(self._label_of(name), -1) for name in types], dtype=np.int64)
                found.append(ids[clusters])
            return found

        scores = held_out_scores(cells.class_ids, folds, predict_held_out, num_settings=len(CLUSTERINGS))
        # On equal scores argmax() takes the first, the fewest clusters.
        self.method, self.clusters_per_label, self.others = self._clustering = CLUSTERINGS[int(scores.argmax())]
        self._components = fit_components(counts, cells.features)
        self._markers = self._find_markers(cells, np.ones(adata.n_obs, dtype=np.bool_))
        self._genes, self._classes, self._seed = cells.genes, cells.classes, seed

    def predict(self, adata: AnnData) -> NamedCells:
        """Name each cluster of the given cells; "" where no marker or no label fits.

        Raises
        ------
        ValueError
            The genes are others, nothing has been fitted, or counts are not raw.
        """
        features = query_features(adata, self._genes)
        assert self._components is not None
        assert self._genes is not None
        places = self._components.project(features)
        clusters = cluster_cells(places, self._clustering, len(self._classes), seed=self._seed)
        types = name_clusters(features, self._genes, clusters, self._markers, others=self._clustering.others)
        labels = [self._label_of(name) for name in types]
        return NamedCells([labels[cluster] for cluster in clusters], None, self._classes)

    def _find_markers(self, cells: TrainingCells, rows: BoolArray) -> list[Marker]:
        present, ids = np.unique(cells.class_ids[rows], return_inverse=True)
        found = cluster_markers(sparse.csr_array(cells.features[rows]), ids.astype(np.int64))
        return [
            Marker(cells.classes[label], cells.genes[gene], "training cells")
            for label, columns in zip(present, found, strict=True)
            for gene in columns[:NUM_TRAINED_MARKERS]
        ]

    def _label_of(self, cell_type: str) -> str:
        return cell_type


class ScCatchOfTable(ScCatch):
    """scCATCH with the markers of a table like CellMatch, which the user names; see `ScCatch`.

    Training labels choose the clustering, and by `MarkerTable.types_of` the tissue. A type of the table that stands for
    none of them competes, and its cells get no label.

    Parameters
    ----------
    table
        None: `fit` raises, so that the system is left out of a comparison.
    """

    title = "scCATCH (own port, marker table)"

    def __init__(self, table: MarkerTable | None = None) -> None:
        super().__init__()
        self._table = table
        # In the record of a run, so that another table is another run.
        self.table = None if table is None else table.describe()
        self._types = MarkerTypes("", (), {})
        self._listed: list[Marker] = []
        self.tissues: str | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Read the markers, and choose the clustering; see `ScCatch.fit`.

        Raises
        ------
        MarkersMissingError
            No table was named, or none of its types stands for a label.
        ValueError
            The table has another form, or as for `ScCatch.fit`.
        """
        if self._table is None:
            raise MarkersMissingError(
                "no marker table is named: --marker-table FILE[:TISSUE,TISSUE], a csv file with the columns of "
                "CellMatch, which is GPL and comes with the R package scCATCH"
            )
        self._types = self._table.types_of(labels)
        self._listed = read_markers(self._table.path, tissues=self._types.tissues)
        self.tissues = ", ".join(self._types.tissues)
        super().fit(adata, labels, groups=groups, seed=seed)

    def _find_markers(self, cells: TrainingCells, rows: BoolArray) -> list[Marker]:
        return self._listed

    def _label_of(self, cell_type: str) -> str:
        return self._types.label_of_type.get(cell_type, "")


def cluster_cells(places: FloatArray, clustering: Clustering, num_labels: int, *, seed: int) -> Int64Array:
    """Return each cell's cluster, from 0 without gaps.

    Parameters
    ----------
    places
        (cells, components).
    clustering
        Its method and number of clusters; there are fewer where fewer cells differ, and above 20,000 cells k-means
        takes the place of Ward's method.
    num_labels
        Of the training cells.
    seed
        Of the starts of k-means; Ward's method draws nothing.
    """
    num_clusters = min(clustering.clusters_per_label * num_labels, len(np.unique(places, axis=0)))
    if num_clusters == 1:
        return np.zeros(len(places), dtype=np.int64)
    if clustering.method == "k_means" or len(places) > MAX_WARD_CELLS:
        clusters = KMeans(num_clusters, n_init=NUM_STARTS, random_state=seed).fit_predict(places)
    else:
        clusters = AgglomerativeClustering(num_clusters).fit_predict(places)
    return np.unique(clusters, return_inverse=True)[1].astype(np.int64)


def name_clusters(
    features: sparse.csr_array,
    genes: Sequence[str],
    clusters: Int64Array,
    markers: Sequence[Marker],
    *,
    others: Others,
) -> list[str]:
    """Return the best cell type of each cluster, the first by name of equals; "" where no marker fits.

    Parameters
    ----------
    features, genes
        (cells, genes), log1p CP10k, and the names of its columns.
    clusters
        (cells,), from 0 without gaps.
    markers
        Of all types that compete.
    others
        As for `cluster_markers`.
    """
    listed = {marker.gene for marker in markers}
    columns = np.array([column for column, gene in enumerate(genes) if gene in listed], dtype=np.int64)
    found = cluster_markers(sparse.csr_array(features[:, columns]), clusters, others=others)
    scores = [type_scores(markers, {genes[columns[gene]] for gene in own}) for own in found]
    return [max(sorted(own), key=own.__getitem__, default="") for own in scores]


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


def cluster_markers(features: sparse.csr_array, clusters: Int64Array, *, others: Others = "each") -> list[Int64Array]:
    """Return each cluster's marker genes, the one furthest above the others first.

    A gene is in at least a quarter of the cluster's cells, and against the others its mean log1p CP10k is at least 0.25
    higher and the one-sided Wilcoxon p-value is below 0.05.

    Parameters
    ----------
    features
        (cells, genes), log1p CP10k.
    clusters
        (cells,), from 0 without gaps.
    others
        ``"each"``: above each other cluster; ``"together"``: above the cells of all others.
    """
    numbers = range(int(clusters.max()) + 1)
    found = []
    for cluster in numbers:
        ours = features[clusters == cluster]
        rivals = [clusters == other for other in numbers if other != cluster]
        if others == "together" and rivals:
            rivals = [clusters != cluster]
        theirs = [features[is_rival] for is_rival in rivals]
        lead = _means(ours) - np.max([_means(part) for part in theirs] or [np.zeros(features.shape[1])], axis=0)
        share = np.asarray((ours > 0).mean(axis=0)).ravel()
        genes = np.flatnonzero((share >= MIN_SHARE) & (lead >= MIN_LOG_FOLD))
        for part in theirs:
            if len(genes):
                genes = genes[exceeds(ours[:, genes].toarray(), part[:, genes].toarray())]
        found.append(genes[np.argsort(-lead[genes], kind="stable")])
    return found


def _means(features: sparse.csr_array) -> FloatArray:
    return np.asarray(features.mean(axis=0)).ravel()


def exceeds(ours: FloatArray, theirs: FloatArray) -> npt.NDArray[np.bool_]:
    """Return (genes,): whether values (cells, genes) are higher by a one-sided Wilcoxon rank sum test, p < 0.05."""
    p_values = mannwhitneyu(ours, theirs, alternative="greater", method="asymptotic", axis=0).pvalue
    return np.asarray(p_values < MAX_P_VALUE)
