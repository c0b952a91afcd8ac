"""The files that travel with the package are what ATTRIBUTION.md says, and small."""

import gzip
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from screformer.tokenization import ScReformerTokenizer, example_cells_path
from screformer.tokenization.build_example_cells import (
    MEMBER,
    SAMPLE_DATA,
    build_example_cells,
    match_ensembl_ids,
    read_came_wheel,
    write_example_cells,
)


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    return anndata.read_h5ad(example_cells_path())


def test_example_cells_are_small_whole_counts(cells: anndata.AnnData) -> None:
    assert example_cells_path().stat().st_size < 5_000_000
    assert cells.shape == (2142, 20125)
    assert cells.X.nnz == 4_015_200
    assert cells.X.sum() == 12_261_492
    assert (np.asarray(cells.X.sum(axis=1)) > 500).all()


def test_example_cells_have_labels_of_four_donors(cells: anndata.AnnData) -> None:
    assert list(cells.obs.columns) == ["cell_type", "donor", "library", "dataset"]
    assert cells.obs["donor"].nunique() == 4
    assert cells.obs["cell_type"].nunique() == 14
    assert cells.obs["cell_type"].value_counts().to_dict()["beta"] == 623
    assert "GSE84133" in cells.uns["dataset_info"]["study"]


def test_example_cells_express_the_hormone_of_their_type(cells: anndata.AnnData) -> None:
    for cell_type, hormone in (("alpha", "GCG"), ("beta", "INS"), ("delta", "SST"), ("gamma", "PPY")):
        is_type = (cells.obs["cell_type"] == cell_type).to_numpy()
        values = cells[:, hormone].X.toarray()[:, 0].astype(float)
        assert np.median(values[is_type]) > 10 * np.median(values[~is_type])


def test_no_ensembl_id_of_the_example_cells_is_given_twice(cells: anndata.AnnData) -> None:
    ids = cells.var["ensembl_id"]
    assert (ids != "").sum() == 19_162
    assert not ids[ids != ""].duplicated().any()


def test_default_tokenizer_covers_the_example_cells(cells: anndata.AnnData) -> None:
    tokenizer = ScReformerTokenizer(min_gene_coverage=0.95)
    encoded = tokenizer(cells[:50], gene_space="expressed")
    assert encoded["attention_mask"].sum(axis=1).min() > 500


def test_attribution_names_every_packaged_file() -> None:
    folder = example_cells_path().parent
    text = (folder / "ATTRIBUTION.md").read_text()
    for path in [*folder.glob("*.gz"), *folder.glob("*.h5ad")]:
        assert f"`{path.name}`" in text


def _source() -> anndata.AnnData:
    counts = scipy.sparse.csr_matrix(np.array([[0, 1, 5], [0, 2, 0]], dtype=np.float32))
    labels = {"cell_type1": ["alpha", "beta"], "donor": ["h1", "h2"], "library": ["l1", "l1"], "other": ["x", "y"]}
    obs = pd.DataFrame(labels, index=["cell1", "cell2"])
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=["CD3D", "SEPT4", "SEPTIN4"]))


def test_example_cells_are_built_from_the_command_line_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    _source().write_h5ad(tmp_path / MEMBER)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as samples:
        samples.write(tmp_path / MEMBER, MEMBER)
    with zipfile.ZipFile(tmp_path / "came.whl", "w") as wheel:
        wheel.writestr(SAMPLE_DATA, inner.getvalue())

    rows = b"ENSG00000167286,CD3D,1,100,protein_coding\nENSG00000108387,SEPTIN4,1,100,protein_coding\n"
    (tmp_path / "gencode.csv.gz").write_bytes(gzip.compress(rows))
    command = [sys.executable, "-m", "screformer.tokenization.build_example_cells"]
    command += ["--came-wheel", "came.whl", "--gencode", "gencode.csv.gz", "-o", "cells.h5ad"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    built = anndata.read_h5ad(tmp_path / "cells.h5ad")
    assert built.var_names.tolist() == ["SEPT4", "SEPTIN4", "CD3D"]
    assert built.var["ensembl_id"].tolist() == ["", "ENSG00000108387", "ENSG00000167286"]
    assert built.X.toarray().tolist() == [[1, 5, 0], [2, 0, 0]]
    source = read_came_wheel(tmp_path / "came.whl")
    ids = match_ensembl_ids(list(source.var_names), tmp_path / "gencode.csv.gz")
    write_example_cells(build_example_cells(source, ids), tmp_path / "again.h5ad")
    assert (tmp_path / "again.h5ad").read_bytes() == (tmp_path / "cells.h5ad").read_bytes()


def test_example_cells_that_are_not_counts_are_refused() -> None:
    source = _source()
    source.X = source.X * 0.5
    with pytest.raises(ValueError, match=r"counts from 0 to 65535 are expected, got 0\.5 to 2\.5"):
        build_example_cells(source, {})
