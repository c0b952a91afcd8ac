import anndata
import numpy as np
import pytest
import sklearn
from scipy import sparse

from screformer.benchmarks.simple_baselines import log1p_cp10k
from screformer.benchmarks.system_celltypist import CellTypist


def made_up_cells(seed: int) -> tuple[anndata.AnnData, list[str]]:
    """120 cells of three types, each with 20 genes of its own among 600, one of which no cell has."""
    generator = np.random.default_rng(seed)
    kinds = np.arange(120) % 3
    rates = np.full((120, 600), 0.5)
    for kind in range(3):
        rates[kinds == kind, 20 * kind : 20 * kind + 20] = 1.5
    rates[:, -1] = 0
    adata = anndata.AnnData(sparse.csr_matrix(generator.poisson(rates).astype(np.float32)))
    return adata, [f"type{kind}" for kind in kinds]


# scikit-learn before 1.8 says that the package's argument will go.
@pytest.mark.filterwarnings("ignore:'multi_class' was deprecated:FutureWarning")
def test_all_genes_give_what_the_package_gives(monkeypatch, tmp_path):
    monkeypatch.setenv("CELLTYPIST_FOLDER", str(tmp_path))
    if tuple(int(part) for part in sklearn.__version__.split(".")[:2]) >= (1, 8):
        pytest.skip("CellTypist passes scikit-learn an argument that 1.8 no longer has")
    package = pytest.importorskip("celltypist")
    (train, labels), (test, _) = made_up_cells(0), made_up_cells(1)
    system = CellTypist(num_top_genes=None)
    system.fit(train, labels)
    named = system.predict(test)
    for cells in (train, test):
        cells.X = log1p_cp10k(cells.X).toarray()
    model = package.train(train, labels=labels)
    theirs = package.annotate(test, model=model)
    assert theirs.predicted_labels["predicted_labels"].tolist() == named.labels
    # lbfgs stops at a gradient of 1e-4 of the penalised sum over cells.
    np.testing.assert_allclose(named.scores, theirs.probability_matrix.to_numpy(), atol=1e-3)
