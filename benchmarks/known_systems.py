"""Every rival by name."""

from __future__ import annotations

from collections.abc import Callable

from screformer.benchmarks.cell_type_systems import CellTypeSystem
from screformer.benchmarks.system_sccatch import ScCatch, ScCatchOfTable
from screformer.benchmarks.system_scpred import ScPred
from screformer.benchmarks.systems_simple import (
    LinearSVCSystem,
    LogisticRegressionSystem,
    MajorityClass,
    NearestNeighbors,
)

SYSTEMS: dict[str, Callable[[], CellTypeSystem]] = {
    "majority_class": MajorityClass,
    "logistic_regression": LogisticRegressionSystem,
    "linear_svc": LinearSVCSystem,
    "knn": NearestNeighbors,
    "scpred": ScPred,
    "sccatch": ScCatch,
    "sccatch_cellmatch": ScCatchOfTable,
}
