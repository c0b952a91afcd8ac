"""The same cells give the same counts, names and tokens, whatever the format they are stored in."""

import json
from functools import partial
from itertools import pairwise

import anndata
import h5py
import numpy as np
import pytest
from format_writers import (
    take_cells,
    write_h5ad,
    write_loom,
    write_mmwrite_folder,
    write_old_h5ad,
    write_soma,
    write_tenx_folder,
    write_tenx_h5,
    write_zarr,
)
from scipy import sparse

from screformer.tokenization import (
    GeneVocabulary,
    ScReformerTokenizer,
    example_cells_path,
    open_count_matrix,
    stored_rows,
    tenx_file,
)
from screformer.tokenization import count_matrix as count_matrix_module

NUM_CELLS, NUM_GENES = 53, 700
WRITERS = {
    "h5ad": ("h5ad", write_h5ad),
    "h5ad-gzip": ("h5ad", partial(write_h5ad, compression="gzip")),
    "h5ad-columns": ("h5ad", partial(write_h5ad, form=sparse.csc_matrix)),
    "h5ad-dense": ("h5ad", partial(write_h5ad, form=lambda counts: counts.toarray())),
    "h5ad-dense-gzip": ("h5ad", partial(write_h5ad, form=lambda counts: counts.toarray(), compression="gzip")),
    "h5ad-0.7": ("h5ad", write_old_h5ad),
    "h5ad-0.6": ("h5ad", partial(write_old_h5ad, version="0.6")),
    "zarr": ("zarr", write_zarr),
    "zarr-columns": ("zarr", partial(write_zarr, form=sparse.csc_matrix)),
    "zarr-dense": ("zarr", partial(write_zarr, form=lambda counts: counts.toarray())),
    "10x-h5-v2": ("10x-h5", partial(write_tenx_h5, version=2)),
    "10x-h5-v3": ("10x-h5", write_tenx_h5),
    "10x-mtx-v2": ("10x-mtx", partial(write_tenx_folder, version=2, compressed=False)),
    "10x-mtx-v3": ("10x-mtx", write_tenx_folder),
    "10x-mtx-by-genes": ("10x-mtx", partial(write_tenx_folder, order="genes", field="real", prefix="GSM1_")),
    "10x-mtx-scipy": ("10x-mtx", write_mmwrite_folder),
    "loom": ("loom", write_loom),
    "loom-unchunked": ("loom", partial(write_loom, chunks=None)),
    "loom-odd-chunks": ("loom", partial(write_loom, chunks=(700, 7))),
    "soma": ("soma", write_soma),
    "soma-dense": ("soma", partial(write_soma, form=lambda counts: counts.toarray())),
}
HAS_NO_OBS = ("10x-h5", "10x-mtx")


@pytest.fixture(scope="module")
def cells():
    return take_cells(anndata.read_h5ad(example_cells_path()), NUM_CELLS, NUM_GENES)


@pytest.fixture(scope="module")
def tokenizer(cells):
    vocabulary = GeneVocabulary.human_v1()
    known = [name for name in cells.var_names if vocabulary.map_names([name]).positions[0] >= 0]
    return ScReformerTokenizer(vocabulary.subset(known, name="these"))


@pytest.fixture(scope="module")
def expected_tokens(cells, tokenizer):
    mapping = tokenizer.gene_vocabulary.map_names(list(cells.var_names))
    return tokenizer.tokenize_counts(cells.X, mapping)


@pytest.fixture(scope="module", params=WRITERS)
def stored(request, cells, tmp_path_factory):
    """Path, name of the format."""
    name, write = WRITERS[request.param]
    return write(cells, tmp_path_factory.mktemp("stored")), name


def _all(matrix, num_rows=10, **run):
    return sparse.vstack(list(matrix.blocks(num_rows, **run)), format="csr")


def _assert_same_tokens(tokens, expected):
    for found, wanted in zip(tokens[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_every_format_gives_the_same_counts_names_and_tokens(stored, cells, tokenizer, expected_tokens):
    path, file_format = stored
    with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
        assert matrix.format == file_format
        assert (matrix.num_cells, matrix.num_genes) == cells.shape
        assert matrix.gene_names == list(cells.var_names)
        assert matrix.cell_ids == list(cells.obs_names)
        assert matrix.read_cell_ids(start=3, stop=9) == list(cells.obs_names[3:9])
        if file_format in HAS_NO_OBS:
            assert matrix.obs_columns == []
        else:
            assert matrix.obs_columns == ["cell_type", "donor"]
            assert matrix.obs_column("donor") == list(cells.obs["donor"])
            assert matrix.obs_column("cell_type", start=50) == list(cells.obs["cell_type"][50:])
        counts = _all(matrix)
        np.testing.assert_array_equal(counts.toarray(), cells.X.toarray())
        tokens = tokenizer.tokenize_counts(counts, matrix.map_genes(tokenizer.gene_vocabulary))
        _assert_same_tokens(tokens, expected_tokens)
        evidence = matrix.evidence[0]
        assert evidence.is_counts
        assert evidence.share_integers == 1
        assert evidence.largest == cells.X.max()
        assert evidence.num_cells_sampled == NUM_CELLS
        sums = np.asarray(cells.X.sum(1))
        assert evidence.cell_sums == (sums.min(), np.median(sums), sums.max())


def test_blocks_of_every_size_are_the_rows_asked_for(stored, cells, tokenizer):
    path, _ = stored
    counts = cells.X.toarray()
    with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
        for num_rows in (1, 7, 13, 52, 53, 1000):
            blocks = list(matrix.blocks(num_rows))
            assert [block.shape[0] for block in blocks[:-1]] == [num_rows] * (len(blocks) - 1)
            assert all(isinstance(block, sparse.csr_matrix) for block in blocks)
            np.testing.assert_array_equal(sparse.vstack(blocks).toarray(), counts)
        for start, stop in ((0, 1), (4, 40), (50, 53), (52, 99)):
            np.testing.assert_array_equal(_all(matrix, 7, start=start, stop=stop).toarray(), counts[start:stop])
        assert list(matrix.blocks(7, start=20, stop=20)) == []


def test_another_process_can_open_the_same_matrix(stored, cells, tokenizer, monkeypatch):
    path, _ = stored
    with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
        for is_prepared in (False, True):
            if is_prepared:
                assert matrix.prepare() == (matrix.notes != [])
                # Whatever had to be rewritten by rows is shared from now on.
                monkeypatch.setattr(count_matrix_module, "rewrite_by_rows", None)
                monkeypatch.setattr(tenx_file, "RowsWriter", None)
            with open_count_matrix(**json.loads(json.dumps(matrix.source))) as other:
                assert other.gene_names == matrix.gene_names
                assert other.gene_source == matrix.gene_source
                assert other.count_source == matrix.count_source
                assert other.evidence == matrix.evidence
                assert (_all(other) != cells.X).nnz == 0
                assert not is_prepared or other.notes == matrix.notes
        assert (_all(matrix) != cells.X).nnz == 0
        source = matrix.source
    monkeypatch.undo()
    with open_count_matrix(**source) as later:  # what was shared is gone by now
        assert (_all(later) != cells.X).nnz == 0


@pytest.mark.parametrize(
    "dtype", ["float32", "float64", "float16", "int8", "uint8", "int16", "uint16", "int64", "uint64", ">i4", ">f4"]
)
@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, lambda counts: counts.toarray()])
def test_numbers_of_every_type_are_the_same_counts(cells, tokenizer, tmp_path, dtype, form):
    small = cells.copy()
    small.X.data = np.minimum(small.X.data, 100)
    path = write_h5ad(small, tmp_path, form=form)
    with h5py.File(path, "r+") as file:
        holder, key = (file["X"], "data") if isinstance(file["X"], h5py.Group) else (file, "X")
        values, attributes = holder[key][:], dict(holder[key].attrs)
        del holder[key]
        holder.create_dataset(key, data=values.astype(dtype)).attrs.update(attributes)
    with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
        block = _all(matrix)
        assert block.dtype.isnative
        np.testing.assert_array_equal(block.toarray(), small.X.toarray())


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix])
def test_entries_in_any_order_and_repeated_give_the_same_tokens(cells, tokenizer, expected_tokens, tmp_path, form):
    path = write_h5ad(cells, tmp_path, form=form)
    generator = np.random.default_rng(0)
    with h5py.File(path, "r+") as file:
        group = file["X"]
        data, indices, indptr = (group[key][:] for key in ("data", "indices", "indptr"))
        parts = [[], []]
        for first, stop in pairwise(indptr):
            run = data[first:stop]
            halves = np.concatenate([run // 2, run - run // 2])  # every entry twice, in disorder
            order = generator.permutation(len(halves))
            parts[0].append(halves[order])
            parts[1].append(np.tile(indices[first:stop], 2)[order])
        for key, values in (("data", np.concatenate(parts[0])), ("indices", np.concatenate(parts[1]))):
            del group[key]
            group[key] = values.astype(np.int64)
        del group["indptr"]
        group["indptr"] = indptr.astype(np.int64) * 2
    with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
        counts = _all(matrix)
        assert counts.nnz == 2 * cells.X.nnz
        np.testing.assert_array_equal(counts.toarray(), cells.X.toarray())
        tokens = tokenizer.tokenize_counts(counts, matrix.map_genes(tokenizer.gene_vocabulary))
        _assert_same_tokens(tokens, expected_tokens)


def test_small_pieces_give_what_large_ones_give(cells, tokenizer, tmp_path, monkeypatch):
    """Everything that is read in pieces is, with pieces of a few values."""
    monkeypatch.setattr(stored_rows, "ENTRIES_AT_ONCE", 97)
    monkeypatch.setattr(tenx_file, "ENTRIES_AT_ONCE", 97)
    monkeypatch.setattr(stored_rows, "VALUES_AT_ONCE", 1000)
    monkeypatch.setattr(stored_rows, "MAX_BAND_VALUES", 100)
    monkeypatch.setattr("screformer.tokenization.temporary_rows.ENTRIES_PER_BAND", 61)
    for write in (
        partial(write_h5ad, form=sparse.csc_matrix),
        partial(write_h5ad, form=lambda counts: counts.toarray()),
        partial(write_tenx_folder, order="genes"),
        write_loom,
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        taken = cells[:20, :300].copy()
        with open_count_matrix(write(taken, folder), vocabulary=tokenizer.gene_vocabulary) as matrix:
            block = _all(matrix)
            assert (block != taken.X).nnz == 0
            assert block.has_sorted_indices
            if matrix.format == "loom":
                assert "stored in chunks that span too many cells" in matrix.notes[0]


def test_features_that_are_no_genes_are_left_out(cells, tokenizer, tmp_path):
    kinds = ["Gene Expression"] * (NUM_GENES - 3) + ["Antibody Capture"] * 2 + ["CRISPR Guide Capture"]
    note = (
        "features that are no gene expression were left out: 2 of type 'Antibody Capture', 1 of type 'CRISPR Guide "
        "Capture'."
    )
    adata = cells.copy()
    adata.var["feature_types"] = kinds
    for path in (write_tenx_h5(cells, tmp_path, feature_types=kinds), write_h5ad(adata, tmp_path)):
        with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
            assert matrix.num_genes == len(matrix.gene_names) == NUM_GENES - 3
            assert matrix.notes == [note]
            assert (_all(matrix) != cells.X[:, :-3]).nnz == 0
            with open_count_matrix(**matrix.source) as other:
                assert other.gene_names == matrix.gene_names


def test_of_two_genomes_one_must_be_named(cells, tokenizer, tmp_path):
    path = write_tenx_h5(cells, tmp_path, version=2, genome="hg19")
    write_tenx_h5(cells[:, ::-1].copy(), tmp_path, version=2, genome="mm10")
    with pytest.raises(ValueError, match=r"Several places hold counts.*Pass layer= one of \['hg19', 'mm10'\]"):
        open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary)
    with open_count_matrix(path, layer="mm10", vocabulary=tokenizer.gene_vocabulary) as matrix:
        assert matrix.count_source == "mm10"
        assert matrix.gene_names == list(cells.var_names[::-1])


def test_cells_are_those_of_the_named_genome(cells, tokenizer, tmp_path):
    path = write_tenx_h5(cells[:40], tmp_path, version=2, genome="hg19")
    write_tenx_h5(cells[40:], tmp_path, version=2, genome="mm10")
    for genome, part in (("hg19", cells[:40]), ("mm10", cells[40:])):
        with open_count_matrix(path, layer=genome, vocabulary=tokenizer.gene_vocabulary) as matrix:
            assert matrix.cell_ids == list(part.obs_names)
            assert (_all(matrix) != part.X).nnz == 0
            with open_count_matrix(**matrix.source, vocabulary=tokenizer.gene_vocabulary) as other:
                assert other.cell_ids == list(part.obs_names)


def test_a_layer_of_loom_and_of_a_measurement_can_be_chosen(cells, tokenizer, tmp_path):
    spliced = cells.X.toarray() // 2
    path = write_loom(cells, tmp_path, layers={"spliced": spliced, "empty": np.zeros_like(spliced)})
    with open_count_matrix(path, layer="spliced", vocabulary=tokenizer.gene_vocabulary) as matrix:
        assert matrix.count_source == "layers/spliced"
        assert [one.source for one in matrix.evidence] == ["layers/spliced", "matrix", "layers/empty"]
        np.testing.assert_array_equal(_all(matrix).toarray(), spliced)
    pytest.importorskip("tiledbsoma", reason="tiledbsoma is not installed")
    adata = cells.copy()
    adata.raw = cells
    adata.X = np.log1p(cells.X)
    path = write_soma(adata, tmp_path, X_layer_name="data")
    for layer in (None, "raw/X/data"):
        with open_count_matrix(path, layer=layer, vocabulary=tokenizer.gene_vocabulary) as matrix:
            assert matrix.count_source == "raw/X/data"
            assert (_all(matrix) != cells.X).nnz == 0
    with pytest.raises(ValueError, match=r"layer='data' is not in soma, which has the layers \['RNA/X/data', 'raw/X/d"):
        open_count_matrix(path, layer="data", vocabulary=tokenizer.gene_vocabulary)
    with pytest.raises(ValueError, match=r"RNA/X/data: counts: .*log-transformed"):
        open_count_matrix(path, layer="RNA/X/data", vocabulary=tokenizer.gene_vocabulary)


def test_the_matrix_may_be_named_instead_of_its_folder(cells, tokenizer, tmp_path):
    folder = write_tenx_folder(cells, tmp_path)
    with open_count_matrix(folder / "matrix.mtx.gz", vocabulary=tokenizer.gene_vocabulary) as matrix:
        assert matrix.name == "matrix.mtx.gz"
        assert (_all(matrix) != cells.X).nnz == 0


def test_ids_are_the_names_where_the_vocabulary_knows_more_of_them(cells, tmp_path):
    vocabulary = GeneVocabulary.human_v1()
    strange = cells.copy()
    strange.var_names = [f"feature{at}" for at in range(NUM_GENES)]
    for write, column in ((write_tenx_h5, "gene_ids"), (write_loom, "Accession"), (write_tenx_folder, "gene_ids")):
        folder = tmp_path / column / write.__name__
        folder.mkdir(parents=True)
        with open_count_matrix(write(strange, folder), vocabulary=vocabulary) as matrix:
            assert matrix.gene_source == f"var[{column!r}]"
            wanted = [gene or name for gene, name in zip(cells.var["ensembl_id"], strange.var_names, strict=True)]
            assert matrix.gene_names == wanted


def test_only_the_rows_of_a_block_are_read(cells, tokenizer, tmp_path, monkeypatch):
    path = write_h5ad(cells, tmp_path)
    with open_count_matrix(path, vocabulary=tokenizer.gene_vocabulary) as matrix:
        monkeypatch.setattr(count_matrix_module, "examine_counts", None)
        read = []
        original = h5py.Dataset.__getitem__

        def spy(dataset, key, **arguments):
            values = original(dataset, key, **arguments)
            read.append((dataset.name, np.size(values)))
            return values

        monkeypatch.setattr(h5py.Dataset, "__getitem__", spy)
        block = next(matrix.blocks(3, start=6))
        assert read == [("/X/indptr", 4), ("/X/indices", block.nnz), ("/X/data", block.nnz)]
        read.clear()
        matrix.obs_column("cell_type", start=5, stop=8)
        assert ("/obs/cell_type/codes", 3) in read
