"""What a path leads to is told by its content; what is no file of cells gives one clear error."""

import errno
import os
import sys
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from format_writers import take_cells, write_h5ad, write_loom, write_old_h5ad, write_tenx_h5, write_zarr
from scipy import sparse

from screformer.tokenization import GeneVocabulary, anndata_file, cell_formats, example_cells_path, open_count_matrix
from screformer.tokenization.cell_file import reading


@pytest.fixture(scope="module")
def cells():
    return take_cells(anndata.read_h5ad(example_cells_path()), 30, 120)


@pytest.fixture(scope="module")
def vocabulary(cells):
    return GeneVocabulary(
        [f"ENSG{at:011d}" for at in range(cells.n_vars)], symbols=[str(name) for name in cells.var_names]
    )


def _refuses(path, vocabulary, error, message):
    with pytest.raises(error, match=message) as caught, open_count_matrix(path, vocabulary=vocabulary) as matrix:
        for _ in matrix.blocks(7):
            pass
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cells.h5ad is an empty file"),
        (b"genes", "cells.h5ad is not an h5ad file, nor one of the other formats"),
        (b"\x1f\x8b\x08 and so on", "is compressed with gzip; unpack it first"),
        (b"PK\x03\x04 and so on", "is a zip archive"),
        (b"BZh9 and so on", "is compressed with bzip2"),
        (b"\x28\xb5\x2f\xfd and so on", "is compressed with zstandard"),
        (b"RDX3 and so on", "is R data; write its counts as matrix.mtx"),
        (b"\x89HDF\r\n\x1a\n and so on", "cannot be read .* It is damaged or was cut off"),
    ],
)
def test_other_content_is_refused_by_name(tmp_path, vocabulary, content, message):
    (tmp_path / "cells.h5ad").write_bytes(content)
    _refuses(tmp_path / "cells.h5ad", vocabulary, ValueError, message)


@pytest.mark.parametrize("share", [0.3, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(cells, vocabulary, tmp_path, share):
    for write in (write_h5ad, write_loom, write_tenx_h5):
        path = write(cells, tmp_path)
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        _refuses(path, vocabulary, ValueError, f"{path.name}: the file cannot be read .*copy or download it again")
        path.unlink()


def test_damage_within_is_found_when_it_is_read(cells, vocabulary, tmp_path):
    path = write_h5ad(cells, tmp_path, compression="gzip")
    with h5py.File(path) as file:
        offset = file["X/data"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[offset : offset + 40] = b"\xff" * 40
    path.write_bytes(content)
    _refuses(path, vocabulary, ValueError, r"cells.h5ad: .*cannot be read .*It was compressed by a plugin|damaged")


def test_a_missing_codec_is_named(cells, vocabulary, tmp_path, monkeypatch):
    path = write_h5ad(cells, tmp_path)

    def fail(*_):
        raise OSError("can't open directory: required filter 'blosc' is not registered")

    monkeypatch.setattr(anndata_file, "open_element", fail)
    _refuses(path, vocabulary, ValueError, "compressed by a plugin: `pip install hdf5plugin`")


def test_places_that_are_no_files_are_refused(cells, vocabulary, tmp_path):
    absent = tmp_path / "absent.h5ad"
    _refuses(absent, vocabulary, FileNotFoundError, "there is no file .*absent.h5ad$")
    (tmp_path / "dangling").symlink_to(absent)
    _refuses(tmp_path / "dangling", vocabulary, FileNotFoundError, "the link leads nowhere")
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    _refuses(tmp_path / "one", vocabulary, ValueError, "a symbolic link that leads back to itself")
    os.mkfifo(tmp_path / "pipe")
    _refuses(tmp_path / "pipe", vocabulary, ValueError, "neither a file nor a folder but a device or pipe")
    (tmp_path / "folder").mkdir()
    for number in range(12):
        (tmp_path / "folder" / f"{number:02}.txt").write_text("")
    _refuses(tmp_path / "folder", vocabulary, ValueError, r"holds none of the formats.*'09.txt', '...'\]")
    path = write_h5ad(cells, tmp_path)
    (tmp_path / "link.h5ad").symlink_to(path)
    with open_count_matrix(tmp_path / "link.h5ad", vocabulary=vocabulary) as matrix:
        assert matrix.num_cells == 30


def test_a_file_that_may_not_be_read_is_said_to_be(cells, vocabulary, tmp_path, monkeypatch):
    path = write_h5ad(cells, tmp_path)
    with monkeypatch.context() as patch:  # root may read everything
        patch.setattr(os, "access", lambda *_: False)
        _refuses(path, vocabulary, PermissionError, "may not be read by this user; ask its owner")

    class Closed(type(path)):
        def stat(self, **options):
            raise PermissionError(13, "Permission denied")

    with pytest.raises(PermissionError, match="may not be read"):
        cell_formats._check_readable(Closed(path))


def test_hdf5_of_other_kinds_is_refused(vocabulary, tmp_path):
    with h5py.File(tmp_path / "cells.h5mu", "w") as file:
        file.create_group("mod/rna")
        file.create_group("mod/atac")
    _refuses(tmp_path / "cells.h5mu", vocabulary, ValueError, r"is MuData, with the modalities \['atac', 'rna'\]")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["matrix"] = np.ones(3)
    _refuses(tmp_path / "other.h5", vocabulary, ValueError, r"other.h5 is HDF5 but not h5ad \(it has \['matrix'\]")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file: file["X/indptr"].__setitem__(5, 0), r"indptr\[5\] is 0, which runs backwards"),
        (lambda file: file["X/indptr"].__setitem__(-1, 10**6), r"indptr\[30\] is 1000000, which runs .* beyond"),
        (lambda file: file["X/indptr"].__setitem__(0, -3), r"indptr\[0\] is -3, which runs backwards"),
        (lambda file: file["X/indices"].__setitem__(-1, 120), "indices of cells .* is 120, allowed are 0 to 119"),
        (lambda file: file["X/indices"].__setitem__(0, -1), "indices of cells .* is -1, allowed are 0 to 119"),
        (lambda file: _replace(file, "X/indptr", file["X/indptr"][:-1]), "30 entries of indptr for 30 rows or columns"),
        (lambda file: _replace(file, "X/data", file["X/data"][:-1]), "values, .* indices and 31 entries of indptr"),
        (lambda file: file["X"].attrs.__setitem__("shape", (30, 121)), "but there are 30 cells in obs and 120 genes"),
        (lambda file: file["X"].attrs.__setitem__("shape", (30,)), r"not a matrix: its shape is \[30\]"),
        (lambda file: file["X"].attrs.__setitem__("encoding-type", "dict"), "not a matrix: it is encoded as 'dict'"),
        (lambda file: file["X"].__delitem__("data"), r"encoded as 'csr_matrix' without \['data'\]"),
        (lambda file: _replace(file, "X", np.ones(30)), r"a matrix of cells x genes is needed.*the shape \(30,\)"),
        (lambda file: _replace(file, "X", [["1"] * 120] * 30), "the values are of type .*not numbers; convert them"),
        (lambda file: file["obs"].__delitem__("_index"), "/obs has no index '_index'"),
        (lambda file: file.__delitem__("X"), "cells.h5ad has no raw counts. It has no matrix at all"),
    ],
)
def test_a_matrix_whose_parts_disagree_is_refused(cells, vocabulary, tmp_path, edit, message):
    path = write_h5ad(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        edit(file)
    assert "cells.h5ad" in _refuses(path, vocabulary, ValueError, message)


def _replace(file, key, value):
    attributes = dict(file[key].attrs)
    del file[key]
    file[key] = value
    if key != "X":
        file[key].attrs.update(attributes)


def test_a_row_beyond_the_cells_is_refused_in_columns(cells, vocabulary, tmp_path):
    path = write_h5ad(cells, tmp_path, form=sparse.csc_matrix)
    with h5py.File(path, "r+") as file:
        file["X/indices"][0] = 30
    _refuses(path, vocabulary, ValueError, r"rows of a matrix stored by columns\) is 30, allowed are 0 to 29")


def test_no_cells_and_no_genes_are_refused(vocabulary, tmp_path):
    names = {"obs": pd.DataFrame(index=["a", "b"]), "var": pd.DataFrame(index=["GENE1"])}
    anndata.AnnData(sparse.csr_matrix((0, 1)), var=names["var"]).write_h5ad(tmp_path / "cells.h5ad")
    _refuses(tmp_path / "cells.h5ad", vocabulary, ValueError, "cells.h5ad has no cells")
    for form in (sparse.csr_matrix, sparse.csc_matrix, np.zeros):
        anndata.AnnData(form((2, 0)), obs=names["obs"]).write_h5ad(tmp_path / "cells.h5ad")
        _refuses(tmp_path / "cells.h5ad", vocabulary, ValueError, "X: it has no genes")


def test_a_transposed_file_is_refused_with_the_fix(cells, vocabulary, tmp_path):
    for write in (write_h5ad, write_loom):
        turned = cells.T.copy()
        turned.var["ensembl_id"], turned.obs = "", turned.obs[[]]
        path = write(turned, tmp_path)
        message = _refuses(path, vocabulary, ValueError, "looks transposed: 120 of 120 names of cells")
        assert "Write it with cells as rows" in message
    strange = cells.copy()  # neither genes nor cells are known by name: that is said elsewhere
    strange.var_names = [f"feature{at}" for at in range(120)]
    strange.var["ensembl_id"] = ""
    with open_count_matrix(write_h5ad(strange, tmp_path), vocabulary=vocabulary) as matrix:
        assert matrix.map_genes(vocabulary).report.num_mapped == 0


def test_loom_without_gene_names_or_of_two_sizes_is_refused(cells, vocabulary, tmp_path):
    path = write_loom(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        file["row_attrs/strange"] = file["row_attrs/Gene"][:]
        del file["row_attrs/Gene"], file["row_attrs/Accession"]
    _refuses(path, vocabulary, ValueError, r"names its genes in none of .*its row attributes are \['strange'\]")
    with h5py.File(path, "r+") as file:
        file["row_attrs/Gene"] = file["row_attrs/strange"][:-1]
    _refuses(path, vocabulary, ValueError, "matrix is 120 genes x 30 cells, but there are 119 gene names")


def test_loom_without_cell_names_numbers_its_cells(cells, vocabulary, tmp_path):
    path = write_loom(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["col_attrs"]
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.cell_ids == [str(at) for at in range(30)]
        assert matrix.obs_columns == []


def test_a_zarr_folder_that_is_no_anndata_is_refused(vocabulary, tmp_path, monkeypatch):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    zarr.open_group(str(tmp_path / "other.zarr"), mode="w").create_group("var")
    _refuses(
        tmp_path / "other.zarr", vocabulary, ValueError, r"other.zarr is no AnnData \(it has \['var'\], obs and var"
    )
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ImportError, match=r"other.zarr is a zarr folder, .* pip install .screformer\[zarr\]"):
        open_count_matrix(tmp_path / "other.zarr", vocabulary=vocabulary)


@pytest.mark.parametrize("key", ["data", "indices"])
def test_a_zarr_folder_that_lacks_files_is_refused(cells, vocabulary, tmp_path, key):
    """What is missing reads as zeros: counts of 0, or all counts on the first gene."""
    path = write_zarr(cells, tmp_path)
    files = [one for one in (path / "X" / key).rglob("*") if one.is_file()]
    (chunk,) = (one for one in files if not one.name.startswith(".z") and one.name != "zarr.json")
    chunk.unlink()
    _refuses(path, vocabulary, ValueError, f"1 of the 1 files of /X/{key} are missing: copy the folder again")


def test_a_zarr_folder_in_shards_is_whole_or_refused(cells, vocabulary, tmp_path):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    with anndata.settings.override(zarr_write_format=3):
        path = write_zarr(cells, tmp_path)
    group = zarr.open_group(str(path / "X"), mode="r+")
    for key in ("data", "indices"):
        values = group[key][:]
        assert len(values) % 400 != 0
        group.create_array(key, data=values, chunks=(100,), shards=(400,), overwrite=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's own, of formats to come
        zarr.consolidate_metadata(str(path))
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert (sparse.vstack(list(matrix.blocks(9))) != cells.X).nnz == 0
    (path / "X" / "data" / "c" / "1").unlink()
    _refuses(path, vocabulary, ValueError, r"files of /X/data are missing: copy the folder again")


def test_what_lies_in_another_file_is_not_read_for_this_one(cells, vocabulary, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_bytes(b"TOPSECRET-0123456789" * 400)

    def external_storage(file):
        del file["obs/_index"]
        file.create_dataset("obs/_index", shape=(len(cells),), dtype="S8", external=[(str(secret), 0, 8 * len(cells))])

    def link(file):
        file["obs/other"] = h5py.ExternalLink(str(tmp_path / "plain.h5ad"), "/X/data")

    def put_together(file):
        layout = h5py.VirtualLayout(shape=(4,), dtype="f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "plain.h5ad"), "X/data", shape=(4,))
        file["uns"].create_virtual_dataset("other", layout)

    write_h5ad(cells, tmp_path).rename(tmp_path / "plain.h5ad")
    for change, place in ((external_storage, "/obs/_index"), (link, "/obs/other"), (put_together, "/uns/other")):
        path = write_h5ad(cells, tmp_path)
        with h5py.File(path, "a") as file:
            file["obs/same"] = h5py.SoftLink("/obs/_index")  # within the file: as it was
            file["zoo"] = file["obs"]
            change(file)
        with pytest.raises(ValueError, match=rf"cells\.h5ad takes {place} from another file, which is not read"):
            open_count_matrix(path, vocabulary=vocabulary)
        path.unlink()


def test_attributes_may_be_texts_of_fixed_length(cells, vocabulary, tmp_path):
    path = write_h5ad(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        for table in (file["obs"], file["var"]):
            table.attrs["_index"] = np.bytes_(table.attrs["_index"])
            table.attrs["column-order"] = np.array(list(table.attrs["column-order"]), "S20")
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.obs_columns == ["cell_type", "donor"]
        assert matrix.cell_ids == list(cells.obs_names)
        assert matrix.obs_column("donor") == list(cells.obs["donor"])


def test_categories_of_an_old_file_are_not_taken_for_what_they_are_not(cells, vocabulary, tmp_path):
    cells = cells[:, :].copy()
    cells.obs["single"] = pd.Categorical(["one"] * 29 + [None])
    cells.obs["other"] = pd.Categorical(["a", "b", "c"] * 10)
    path = write_old_h5ad(cells, tmp_path, version="0.6")
    with h5py.File(path, "r+") as file:
        del file["uns/single_categories"], file["uns/other_categories"]
        file["uns/single_categories"] = "one"  # as anndata wrote a single one
        file["uns/other_categories"] = np.array([b"a", b"b"])
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.obs_column("single", start=28) == ["one", None]
        assert matrix.obs_column("other", stop=3) == ["0", "1", "2"]
        assert matrix.obs_column("donor") == list(cells.obs["donor"])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_limits_of_the_machine_are_not_called_damage(number):
    with pytest.raises(OSError, match="the machine") as caught, reading("cells.h5ad", "X"):
        raise OSError(number, "the machine")
    assert caught.value.errno == number


def test_columns_of_every_kind_become_text(cells, vocabulary, tmp_path):
    cells = cells.copy()
    size = cells.n_obs - 3
    cells.obs = pd.DataFrame(
        {
            "text": ["a", "b", ""] + ["c"] * size,
            "whole": range(cells.n_obs),
            "part": [0.5, np.nan, 2.0] + [1.0] * size,
            "single": np.array([0.1, np.nan, 2.0] + [1.0] * size, np.float32),
            "truth": [True, False, True] + [True] * size,
            "nullable": pd.array([1, None, 3] + [4] * size, dtype="Int64"),
            "maybe": pd.array([True, None, False] + [True] * size, dtype="boolean"),
            "kind": pd.Categorical(["x", None, "y"] + ["x"] * size),
            "numbers": pd.Categorical([3, 1, None] + [1] * size),
        },
        index=cells.obs_names,
    )
    with open_count_matrix(write_h5ad(cells, tmp_path), vocabulary=vocabulary) as matrix:
        assert matrix.obs_columns == list(cells.obs.columns)
        found = {name: matrix.obs_column(name, stop=3) for name in matrix.obs_columns}
    assert found == {
        "text": ["a", "b", ""],
        "whole": ["0", "1", "2"],
        "part": ["0.5", None, "2.0"],
        "single": ["0.1", None, "2.0"],
        "truth": ["True", "False", "True"],
        "nullable": ["1", None, "3"],
        "maybe": ["True", None, "False"],
        "kind": ["x", None, "y"],
        "numbers": ["3", "1", None],
    }


def test_a_column_of_an_unknown_kind_is_refused_when_asked_for(cells, vocabulary, tmp_path):
    path = write_h5ad(cells, tmp_path)
    with h5py.File(path, "r+") as file:
        del file["obs/donor"]
        file.create_group("obs/donor").attrs["encoding-type"] = "rec-array"
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        with pytest.raises(ValueError, match="/obs/donor is encoded as 'rec-array', which cannot be read as a column"):
            matrix.obs_column("donor")
        assert len(matrix.obs_column("cell_type")) == 30


def test_raw_of_an_old_file_is_found(cells, vocabulary, tmp_path):
    path = write_old_h5ad(cells, tmp_path, version="0.6")
    with h5py.File(path, "r+") as file:
        for part in ("X", "var"):
            file.copy(part, f"raw.{part}")
        file["X/data"][:] = 0
    with open_count_matrix(path, vocabulary=vocabulary) as matrix:
        assert matrix.count_source == "raw"
        assert (sparse.vstack(list(matrix.blocks(9))) != cells.X).nnz == 0
