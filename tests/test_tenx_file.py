"""10x folders and files whose parts do not fit together give one clear error and leave nothing behind."""

import gzip
import tempfile

import anndata
import h5py
import pytest
from format_writers import take_cells, write_tenx_folder, write_tenx_h5

from screformer.tokenization import GeneVocabulary, example_cells_path, open_count_matrix


@pytest.fixture(scope="module")
def cells():
    return take_cells(anndata.read_h5ad(example_cells_path()), 20, 60)


@pytest.fixture(scope="module")
def vocabulary(cells):
    return GeneVocabulary([f"ENSG{at:011d}" for at in range(60)], symbols=[str(name) for name in cells.var_names])


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


@pytest.fixture
def folder(cells, tmp_path):
    return write_tenx_folder(cells, tmp_path, compressed=False)


def _edit(path, *changes):
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([("%%MatrixMarket", "%MatrixMarket")], "does not begin with %%MatrixMarket but with '%MatrixMarket"),
        ([(" general", "")], "does not begin with %%MatrixMarket"),
        ([("integer", "pattern")], "of the kind 'matrix coordinate pattern general'; needed is"),
        ([("coordinate", "array")], "of the kind 'matrix array integer general'"),
        ([("general", "symmetric")], "of the kind 'matrix coordinate integer symmetric'"),
        ([("60 20 ", "60 21 ")], "is 60 x 21, but beside it are 60 features and 20 barcodes. The three files are not"),
        ([("60 20 ", "20 60 ")], "It is cells x genes; 10x stores genes x cells. Write it with scipy.io.mmwrite"),
        ([("60 20 ", "60 twenty ")], "where its sizes should be: genes, cells, entries"),
        ([("\n1 1 ", "\n61 1 ")], "has an entry for gene 61, cell 1, but is 60 x 20"),
        ([("\n1 1 ", "\n0 1 ")], "has an entry for gene 0, cell 1"),
        ([("\n1 1 ", "\n1 21 ")], "has an entry for gene 1, cell 21"),
        ([("\n1 1 ", "\n1 1 0.")], "says it holds integers and holds others"),
        ([("\n1 1 ", "\n1 1 99999999999")], "says it holds integers and holds others, or some over 2"),
        ([("\n1 1 ", "\n1 one ")], "cannot be read as lines of gene, cell and count"),
        ([("\n1 1 ", "\n1 1 3\n1 1 ")], r"says it has \d+ entries and has \d+: it was cut off, or lines were added"),
    ],
)
def test_a_matrix_that_is_not_as_it_says_is_refused(folder, vocabulary, changes, message):
    _edit(folder / "matrix.mtx", *changes)
    with pytest.raises(ValueError, match=f"matrix.mtx.*{message}"):
        open_count_matrix(folder, vocabulary=vocabulary)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_matrix_that_was_cut_off_is_refused(cells, vocabulary, tmp_path, share):
    for compressed in (False, True):
        place = tmp_path / str(compressed)
        place.mkdir()
        path = write_tenx_folder(cells, place, compressed=compressed) / f"matrix.mtx{'.gz' if compressed else ''}"
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(ValueError, match="cut off"):
            open_count_matrix(path, vocabulary=vocabulary)


def test_a_matrix_that_ends_before_its_sizes_is_refused(folder, vocabulary):
    (folder / "matrix.mtx").write_text("%%MatrixMarket matrix coordinate integer general\n%nothing\n")
    with pytest.raises(ValueError, match="ends before the line with its sizes"):
        open_count_matrix(folder, vocabulary=vocabulary)


def test_missing_tables_and_several_matrices_are_named(folder, vocabulary):
    (folder / "barcodes.tsv").rename(folder / "cells.tsv")
    with pytest.raises(FileNotFoundError, match=r"needs one of \['barcodes.tsv.gz', 'barcodes.tsv'\] beside it"):
        open_count_matrix(folder, vocabulary=vocabulary)
    (folder / "features.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs one of \['features.tsv.gz', 'features.tsv', 'genes.tsv.gz'"):
        open_count_matrix(folder, vocabulary=vocabulary)
    (folder / "matrix.mtx").rename(folder / "a_matrix.mtx")
    (folder / "b_matrix.mtx").write_text("")
    with pytest.raises(ValueError, match=r"has several matrices, \['a_matrix.mtx', 'b_matrix.mtx'\]; name one"):
        open_count_matrix(folder, vocabulary=vocabulary)


def test_tables_that_cannot_be_read_are_refused(folder, vocabulary):
    (folder / "features.tsv").write_text("one\ttwo\none\ttwo\tthree\n")
    with pytest.raises(ValueError, match=r"features.tsv is not a table with tabs between its columns"):
        open_count_matrix(folder, vocabulary=vocabulary)
    (folder / "features.tsv").write_text("")
    with pytest.raises(ValueError, match="60 x 20, but beside it are 0 features"):
        open_count_matrix(folder, vocabulary=vocabulary)
    (folder / "barcodes.tsv").unlink()
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress(b"AAAC\n" * 1000)[:30])
    with pytest.raises(ValueError, match=r"barcodes.tsv.gz cannot be read .*cut off"):
        open_count_matrix(folder, vocabulary=vocabulary)


def test_names_may_be_a_single_column_or_odd(folder, vocabulary, cells):
    names = [str(name) for name in cells.var_names[:-2]]
    (folder / "features.tsv").write_text("\n".join([*names, "NA", '"']) + "\n")
    with open_count_matrix(folder, vocabulary=vocabulary) as matrix:
        assert matrix.gene_names == [*names, "NA", '"']


def test_an_h5_whose_parts_disagree_is_refused(cells, vocabulary, tmp_path):
    path = write_tenx_h5(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        file["matrix/shape"][:] = 61, 20
    with pytest.raises(ValueError, match="matrix is 61 genes x 20 cells, but has names for 60 x 20"):
        open_count_matrix(path, vocabulary=vocabulary)
    with h5py.File(path, "r+") as file:
        del file["matrix/indices"]
    with pytest.raises(ValueError, match=r"matrix has no \['indices'\]: it is no matrix as Cell Ranger writes it"):
        open_count_matrix(path, vocabulary=vocabulary)
