"""The same cells in every format, written by hand where no library is there to write it."""

import gzip
import warnings

import anndata
import h5py
import numpy as np
import pytest
import scipy.io
from scipy import sparse


def write_h5ad(adata, folder, *, form=sparse.csr_matrix, **options):
    """Write h5ad; options go to anndata, as compression="gzip"."""
    adata = adata.copy()
    adata.X = form(adata.X)
    adata.write_h5ad(folder / "cells.h5ad", **options)
    return folder / "cells.h5ad"


def write_zarr(adata, folder, *, form=sparse.csr_matrix):
    pytest.importorskip("zarr", reason="zarr is not installed")
    adata = adata.copy()
    adata.X = form(adata.X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's own, of formats to come
        adata.write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


def write_tenx_h5(adata, folder, *, version=3, genome="GRCh38", feature_types=None):
    path = folder / "filtered_feature_bc_matrix.h5"
    counts = sparse.csr_matrix(adata.X)  # cells x genes by rows is genes x cells by columns
    with h5py.File(path, "a") as file:
        group = file.create_group("matrix" if version == 3 else genome)
        group["data"] = counts.data.astype(np.int32)
        group["indices"], group["indptr"] = counts.indices.astype(np.int64), counts.indptr.astype(np.int64)
        group["shape"] = np.array(counts.shape[::-1], np.int32)
        group["barcodes"] = _bytes(adata.obs_names)
        if version == 3:
            group["features/id"], group["features/name"] = _bytes(adata.var["ensembl_id"]), _bytes(adata.var_names)
            group["features/feature_type"] = _bytes(feature_types or ["Gene Expression"] * adata.n_vars)
            group["features/genome"] = _bytes([genome] * adata.n_vars)
        else:
            group["genes"], group["gene_names"] = _bytes(adata.var["ensembl_id"]), _bytes(adata.var_names)
    return path


def write_tenx_folder(adata, folder, *, version=3, compressed=True, prefix="", order="cells", field="integer"):
    """Write matrix.mtx and its tables; `order` of the entries: by "cells" as Cell Ranger does, or by "genes"."""
    folder = folder / "filtered_feature_bc_matrix"
    folder.mkdir()
    transposed = (sparse.csc_matrix if order == "cells" else sparse.csr_matrix)(sparse.csr_matrix(adata.X).T).tocoo()
    header = f"%%MatrixMarket matrix coordinate {field} general\n%made for a test\n"
    header += f"{adata.n_vars} {adata.n_obs} {transposed.nnz}\n"
    number = "{}" if field == "integer" else "{:.1f}"
    lines = [
        f"{gene + 1} {cell + 1} {number.format(value)}\n"
        for gene, cell, value in zip(transposed.row, transposed.col, transposed.data, strict=True)
    ]
    features = zip(adata.var["ensembl_id"], adata.var_names, strict=True)
    end = "\tGene Expression" if version == 3 else ""
    texts = {
        "matrix.mtx": header + "".join(lines),
        "features.tsv" if version == 3 else "genes.tsv": "".join(f"{gene}\t{name}{end}\n" for gene, name in features),
        "barcodes.tsv": "".join(f"{name}\n" for name in adata.obs_names),
    }
    for name, text in texts.items():
        path = folder / f"{prefix}{name}{'.gz' if compressed else ''}"
        path.write_bytes(gzip.compress(text.encode(), 1) if compressed else text.encode())
    return folder


def write_mmwrite_folder(adata, folder):
    """Write what scipy.io.mmwrite makes, with tables without compression."""
    path = write_tenx_folder(adata, folder, version=2, compressed=False)
    scipy.io.mmwrite(path / "matrix.mtx", sparse.coo_matrix(sparse.csr_matrix(adata.X).T), field="integer")
    return path


def write_loom(adata, folder, *, chunks=(64, 64), layers=()):
    """Write as loompy does: genes x cells, chunked and compressed; without chunks, as one run of bytes."""
    path = folder / "cells.loom"
    with h5py.File(path, "w") as file:
        fitting = chunks and (min(chunks[0], adata.n_vars), min(chunks[1], adata.n_obs))
        options = {"chunks": fitting, "compression": "gzip"} if chunks else {}
        file.create_dataset("matrix", data=sparse.csr_matrix(adata.X).toarray().T, **options)
        file.create_group("layers")
        for name, values in dict(layers).items():
            file["layers"].create_dataset(name, data=values.T, **options)
        file["row_attrs/Gene"], file["row_attrs/Accession"] = _bytes(adata.var_names), _bytes(adata.var["ensembl_id"])
        file["col_attrs/CellID"] = _bytes(adata.obs_names)
        for name in adata.obs:
            file[f"col_attrs/{name}"] = _bytes(adata.obs[name])
        file["col_attrs/embedding"] = np.zeros((adata.n_obs, 2))
    return path


def write_soma(adata, folder, *, form=sparse.csr_matrix, **options):
    """Write a TileDB-SOMA experiment; options go to tiledbsoma.io.from_anndata."""
    pytest.importorskip("tiledbsoma", reason="tiledbsoma is not installed")
    import tiledbsoma.io

    adata = adata.copy()
    adata.X = form(adata.X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiledbsoma.io.from_anndata(
            str(folder / "soma"), adata, **{"measurement_name": "RNA", "X_layer_name": "raw", **options}
        )
    return folder / "soma"


def write_old_h5ad(adata, folder, *, version="0.7"):
    """Write the layout of anndata 0.7 (categories apart, by reference) or 0.6 (records, categories in uns)."""
    path = folder / "old.h5ad"
    counts = sparse.csr_matrix(adata.X)
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group["data"], group["indices"], group["indptr"] = counts.data, counts.indices, counts.indptr
        if version == "0.7":
            group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": counts.shape})
            _write_table_07(file.create_group("obs"), adata.obs)
            _write_table_07(file.create_group("var"), adata.var)
        else:
            group.attrs.update({"h5sparse_format": b"csr", "h5sparse_shape": counts.shape})
            file["obs"], file["var"] = _records(adata.obs), _records(adata.var)
            for name in adata.obs.select_dtypes("category"):
                file[f"uns/{name}_categories"] = _bytes(adata.obs[name].cat.categories)
    return path


def _write_table_07(group, table):
    group.attrs.update({"_index": "index", "column-order": list(table.columns), "encoding-type": "dataframe"})
    group.attrs["encoding-version"] = "0.1.0"
    group["index"] = np.array(table.index, dtype=h5py.string_dtype())
    for name in table:
        if table[name].dtype == "category":
            categories = table[name].cat.categories
            stored = group.create_dataset(f"__categories/{name}", data=np.array(categories, h5py.string_dtype()))
            group[name] = table[name].cat.codes.to_numpy()
            group[name].attrs["categories"] = stored.ref
        else:
            group[name] = np.array(table[name], dtype=h5py.string_dtype())


def _records(table):
    columns = {"index": _bytes(table.index)}
    for name in table:
        is_category = table[name].dtype == "category"
        columns[name] = table[name].cat.codes.to_numpy() if is_category else _bytes(table[name])
    records = np.zeros(len(table), [(name, values.dtype) for name, values in columns.items()])
    for name, values in columns.items():
        records[name] = values
    return records


def _bytes(texts):
    return np.array([str(text).encode() for text in texts])


def take_cells(adata, num_cells, num_genes):
    """Return cells and genes spread over `adata`, with what all formats can store of it."""
    genes = np.sort(np.asarray(adata.X.sum(0)).ravel().argsort()[-num_genes:])
    cells = np.linspace(0, adata.n_obs - 1, num_cells).astype(int)
    taken = adata[cells][:, genes].copy()
    taken.var.index.name = taken.obs.index.name = None
    return anndata.AnnData(
        sparse.csr_matrix(taken.X.astype(np.int32)),
        obs=taken.obs[["cell_type", "donor"]].astype("category"),
        var=taken.var[["ensembl_id"]].astype(object),
    )
