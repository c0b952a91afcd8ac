"""Every rival by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from screformer.benchmarks.cell_type_systems import CellTypeSystem, need
from screformer.benchmarks.system_celltypist import CellTypist
from screformer.benchmarks.system_mlp import Mlp
from screformer.benchmarks.system_scanvi import ScAnvi
from screformer.benchmarks.system_scbert import ScBert
from screformer.benchmarks.system_sccatch import ScCatch, ScCatchOfTable
from screformer.benchmarks.system_scgnn import ScGnn
from screformer.benchmarks.system_scpred import ScPred
from screformer.benchmarks.system_seurat import SeuratLabelTransfer, need_seurat
from screformer.benchmarks.system_singler import SingleR
from screformer.benchmarks.system_xgboost import XGBoost
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
    "mlp": Mlp,
    "celltypist": CellTypist,
    "xgboost": XGBoost,
    "scpred": ScPred,
    "sccatch": ScCatch,
    "sccatch_cellmatch": ScCatchOfTable,
    "seurat": SeuratLabelTransfer,
    "singler": SingleR,
    "scanvi": ScAnvi,
    "scgnn": ScGnn,
    "scbert": ScBert,
}
# What fit() of a system asks for beyond the requirements of this package; each raises ImportError where it is missing.
REQUIREMENTS: dict[str, tuple[Callable[[], object], ...]] = {
    "seurat": (need_seurat,),
    "xgboost": (partial(need, "xgboost-cpu", "xgboost"),),
    "singler": (partial(need, "singler"), partial(need, "compressed_lists")),
    "scanvi": (partial(need, "scvi-tools", "scvi"),),
    "scgnn": (partial(need, "networkx"),),
    "scbert": (partial(need, "performer-pytorch", "performer_pytorch"),),
}


def missing_packages(name: str) -> list[str]:
    """Return what a system lacks on this machine, each with its remedy; nothing if it is ready."""
    missing = []
    for requirement in REQUIREMENTS.get(name, ()):
        try:
            requirement()
        except ImportError as error:
            missing.append(str(error))
    return missing
