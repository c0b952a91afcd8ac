"""Odd and broken files through the public doors: `screformer inspect`, `corpus` and `annotate`.

Each gives one clear error (one line that names the file, exit code 1, no traceback, and nothing left behind), or a
recorded, correct result.

====================================  ==========================================================================
input                                 result
====================================  ==========================================================================
absent file, symlink loop             error: there is no such file
empty file, text, random bytes        error: of no known format
empty folder                          error: of no known format
file that may not be read             error of the system, with the file's name (not as root)
HDF5 cut off, HDF5 of something else  error: damaged; error: not h5ad
no matrix, a matrix without values    error: no raw counts
damaged chunk of compressed values    error: damaged, found in whatever cell it is
indices beyond the genes, rows that   error: damaged
do not end where the values do
more gene names than columns          error
NaN, infinity, negative, above 2^31   error: no counts, with the row
text, complex numbers as counts       error: no numbers
log1p of CP10k, CP10k, scaled         error: no raw counts, with the fix
rounded log1p of CP10k, only 0 and 1  error: no raw counts; used with --allow not-counts
log1p beside a layer of counts        the layer is found and used
all values 0, no cells, no genes      error
some cells without counts             corpus leaves them out and says so; annotate gives no label
one cell, one gene                    used
CSC, dense, float16, unsorted         the same tokens as the plain file
gene names twice                      counts summed
cell names twice                      used, counted in the passport
names in other alphabets              kept to the letter
categorical var_names                 read as names
gene names that are numbers           error: --gene-column; used with it
Ensembl ids with versions             used
mouse symbols, mouse and rat ids      error: wrong species
human and mouse genes together        error: several species
cells and genes exchanged             error: transposed
no layer, column, obs column so named error that lists what there is
obs column of several types           text, None where a value is missing
file that changes while it is read    error
output in a folder that is a file     error
disk full                             error, nothing of the output left
====================================  ==========================================================================
"""

import json
import os
import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import anndata
import h5py
import joblib  # noqa: F401 - tries to write when it is first imported, which a full disk would not let it
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from typer.testing import CliRunner

from screformer import ScReformerConfig
from screformer.cli import app
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization import GeneVocabulary, ScReformerTokenizer, example_cells_path, open_corpus
from screformer.tokenization.count_matrix import CountMatrix

NUM_CELLS, NUM_GENES = 24, 800
LABELS = {0: "alpha", 1: "beta"}


@pytest.fixture(scope="module")
def cells() -> anndata.AnnData:
    """Return real cells with the genes of most counts that the vocabulary knows; no two names mean the same gene."""
    adata = anndata.read_h5ad(example_cells_path())[:NUM_CELLS]
    positions = GeneVocabulary.human_v1().map_names(adata.var_names).positions
    order = np.flatnonzero(positions >= 0)
    first = np.sort(np.unique(positions[order], return_index=True)[1])
    chosen = adata[:, order[first][:NUM_GENES]]
    obs = pd.DataFrame({"cell_type": chosen.obs["cell_type"].astype(str).to_numpy()}, index=chosen.obs_names)
    return anndata.AnnData(chosen.X.astype(np.float32), obs=obs, var=pd.DataFrame(index=chosen.var_names))


@pytest.fixture(scope="module", autouse=True)
def small_vocabulary(cells) -> Iterator[GeneVocabulary]:
    """Let the genes of `cells` be the default vocabulary: the packaged one has 22 times as many."""
    small = GeneVocabulary.human_v1().subset(list(cells.var_names), name="small")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GeneVocabulary, "human_v1", lambda: small)
        yield small


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_vocabulary) -> Path:
    """Return the folder of a tiny classifier whose vocabulary has the genes of `cells`."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = ScReformerTokenizer(small_vocabulary)
    config = ScReformerConfig(
        num_genes=NUM_GENES, hidden_size=16, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32,
        bucket_size=64, num_hashes=1, classifier_hidden_sizes=[8, 8], num_labels=2, id2label=LABELS,
        label2id={label: index for index, label in LABELS.items()}, tokenizer_fingerprint=tokenizer.fingerprint,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ScReformerForCellClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Doors:
    """The three commands, on files of one folder, which is looked at before and after."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.input = folder / "input"
        self.output = folder / "output"
        self.temporary = folder / "temporary"
        for one in (self.input, self.output, self.temporary):
            one.mkdir()
        self._checkpoint = checkpoint

    def commands(self, path: Path, options: list[str], obs: list[str]) -> dict[str, list[str]]:
        model = ["--model", str(self._checkpoint)]
        return {
            "inspect": ["inspect", str(path), *options, "--json", str(self.output / "passport.json")],
            "corpus": ["corpus", str(path), *options, *obs, "-o", str(self.output / "corpus")],
            "annotate": ["annotate", str(path), *options, *model, "-o", str(self.output / "annotated.h5ad")],
        }

    def left(self) -> list[str]:
        folders = (self.output, self.temporary)
        return sorted(str(found.relative_to(self.output.parent)) for one in folders for found in one.rglob("*"))


@pytest.fixture
def doors(tmp_path, checkpoint, monkeypatch) -> Doors:
    made = Doors(tmp_path, checkpoint)
    monkeypatch.setattr(tempfile, "tempdir", str(made.temporary))
    monkeypatch.setenv("TMPDIR", str(made.temporary))
    return made


def assert_is_one_clear_error(result, name: str, message: str) -> None:
    __tracebackhide__ = True
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    last = result.output.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert name in last
    assert_mentions(last, message)


def assert_mentions(text: str, message: str) -> None:
    __tracebackhide__ = True
    for part in message.split(" ... "):
        assert part in text, f"{part!r} is not in {text!r}"
        text = text[text.index(part) + len(part) :]


class Refused(NamedTuple):
    """An input: how it is made, what the error must say (" ... " stands for anything), and options."""

    make: Callable[[anndata.AnnData, Path], object]
    message: str
    options: tuple[str, ...] = ()


def change(action: Callable[[anndata.AnnData], anndata.AnnData | None]) -> Callable[[anndata.AnnData, Path], None]:
    """Return a maker of a file from the cells as changed in memory."""

    def make(adata: anndata.AnnData, path: Path) -> None:
        changed = action(adata)
        (adata if changed is None else changed).write_h5ad(path)

    return make


def change_file(action: Callable[[h5py.File], None], **options) -> Callable[[anndata.AnnData, Path], None]:
    """Return a maker of a file that is written and then changed through h5py."""

    def make(adata: anndata.AnnData, path: Path) -> None:
        adata.write_h5ad(path, **options)
        with h5py.File(path, "r+") as file:
            action(file)

    return make


def set_values(action: Callable[[sparse.csr_matrix], object]) -> Callable[[anndata.AnnData, Path], None]:
    """Return a maker of a file with other values in X."""

    def act(adata: anndata.AnnData) -> None:
        adata.X = action(adata.X)

    return change(act)


def set_last(value: float, dtype: type = np.float32) -> Callable[[anndata.AnnData, Path], None]:
    """Return a maker of a file whose last value is another."""

    def act(counts: sparse.csr_matrix) -> sparse.csr_matrix:
        counts = counts.astype(dtype)
        counts.data[-1] = value
        return counts

    return set_values(act)


def rename_genes(rename: Callable[[int, str], str]) -> Callable[[anndata.AnnData, Path], None]:
    def act(adata: anndata.AnnData) -> None:
        adata.var_names = [rename(at, name) for at, name in enumerate(adata.var_names)]

    return change(act)


def scale_to_cp10k(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    return sparse.csr_matrix(sparse.diags(10_000 / counts.sum(axis=1).A1) @ counts).astype(np.float32)


def rounded_log(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    return scale_to_cp10k(counts).log1p().rint()


def scaled(counts: sparse.csr_matrix) -> np.ndarray:
    dense = counts.toarray()
    return (dense - dense.mean(axis=0)) / (dense.std(axis=0) + 1)


def replace(name: str, values: np.ndarray) -> Callable[[h5py.File], None]:
    def act(file: h5py.File) -> None:
        attributes = dict(file[name].attrs)
        del file[name]
        file[name] = values
        file[name].attrs.update(attributes)

    return act


def edit(name: str, place: int, value: int) -> Callable[[h5py.File], None]:
    def act(file: h5py.File) -> None:
        file[name][place] = value

    return act


def truncate(adata: anndata.AnnData, path: Path) -> None:
    adata.write_h5ad(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def damage_chunk(adata: anndata.AnnData, path: Path) -> None:
    """Overwrite the last compressed chunk of the values."""
    adata.write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file:
        values, attributes = file["X/data"][:], dict(file["X/data"].attrs)
        del file["X/data"]
        dataset = file["X"].create_dataset("data", data=values, chunks=(2000,), compression="gzip")
        dataset.attrs.update(attributes)
        chunk = dataset.id.get_chunk_info(dataset.id.get_num_chunks() - 1)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = b"\0" * chunk.size
    path.write_bytes(content)


def loop(adata: anndata.AnnData, path: Path) -> None:
    other = path.with_name("other.h5ad")
    path.symlink_to(other)
    other.symlink_to(path)


def foreign_hdf5(adata: anndata.AnnData, path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["results/energy"] = np.ones(3)


def without_values(file: h5py.File) -> None:
    del file["X/data"]


def as_text(adata: anndata.AnnData, path: Path) -> None:
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        values = [str(int(value)) for value in file["X/data"][:]]
        replace("X/data", np.array(values, dtype=h5py.string_dtype()))(file)


def transpose(adata: anndata.AnnData) -> anndata.AnnData:
    return anndata.AnnData(adata.X.T.tocsr(), obs=adata.var, var=adata.obs[[]])


REFUSED = {
    "absent": Refused(lambda adata, path: None, "there is no"),
    "symlink_loop": Refused(loop, "cells.h5ad"),
    "empty_file": Refused(lambda adata, path: path.touch(), "empty file"),
    "text": Refused(lambda adata, path: path.write_text("gene,count\nINS,3\n"), "not"),
    "random_bytes": Refused(lambda adata, path: path.write_bytes(np.random.default_rng(0).bytes(5000)), "not"),
    "empty_folder": Refused(lambda adata, path: path.mkdir(), "cells.h5ad"),
    "truncated": Refused(truncate, "cells.h5ad"),
    "foreign_hdf5": Refused(foreign_hdf5, "['results']"),
    "no_matrix": Refused(change(lambda adata: anndata.AnnData(obs=adata.obs, var=adata.var)), "no raw counts"),
    "no_values": Refused(change_file(without_values), "X"),
    "damaged_chunk": Refused(damage_chunk, "cells.h5ad"),
    "index_beyond_genes": Refused(change_file(edit("X/indices", -1, NUM_GENES + 7)), "damaged ... 807"),
    "negative_index": Refused(change_file(edit("X/indices", -1, -3)), "damaged"),
    "rows_end_elsewhere": Refused(change_file(edit("X/indptr", -1, 10**6)), "cells.h5ad"),
    "rows_go_back": Refused(change_file(edit("X/indptr", 5, 10**6)), "cells.h5ad"),
    "more_names_than_columns": Refused(
        change_file(lambda file: file["X"].attrs.update({"shape": np.array([NUM_CELLS, NUM_GENES - 1])})), "799"
    ),
    "nan": Refused(set_last(np.nan), "NaN"),
    "infinity": Refused(set_last(np.inf), "NaN or infinite"),
    "negative": Refused(set_last(-1), "negative"),
    "too_large_for_float32": Refused(set_last(1e39, np.float64), "1e+39"),
    "text_values": Refused(as_text, "cells.h5ad"),
    "complex_values": Refused(change_file(lambda file: replace("X/data", file["X/data"][:] + 1j)(file)), "complex"),
    "log1p": Refused(set_values(lambda counts: scale_to_cp10k(counts).log1p()), "not integers ... looks normalised"),
    "cp10k": Refused(set_values(scale_to_cp10k), "not integers ... looks normalised"),
    "scaled": Refused(set_values(scaled), "negative ... scaled"),
    "rounded_log1p": Refused(set_values(rounded_log), "normalised or multiplied and then rounded"),
    "only_0_and_1": Refused(set_values(lambda counts: counts.minimum(1)), "every value is 1"),
    "all_zero": Refused(set_values(lambda counts: counts * 0), "all 0"),
    "no_cells": Refused(change(lambda adata: adata[:0].copy()), "no cells"),
    "no_genes": Refused(change(lambda adata: adata[:, :0].copy()), "no genes"),
    "genes_as_numbers": Refused(rename_genes(lambda at, name: str(at)), "numbers ... '0', '1' ... --gene-column"),
    "unknown_genes": Refused(rename_genes(lambda at, name: f"row_{at}"), "none of the 800 ... --gene-column"),
    "mouse_symbols": Refused(rename_genes(lambda at, name: name.capitalize()), "not human genes"),
    "mouse_ids": Refused(rename_genes(lambda at, name: f"ENSMUSG{at:011d}"), "not human genes ... ENSMUSG (mouse)"),
    "rat_ids": Refused(rename_genes(lambda at, name: f"ENSRNOG{at:011d}.2"), "not human genes ... ENSRNOG (rat)"),
    "two_species": Refused(
        rename_genes(lambda at, name: f"GRCh38_{name}" if at % 2 else f"mm10___{name.capitalize()}"),
        "several species ... mm10___ (mouse)",
    ),
    "transposed": Refused(change(transpose), "transposed"),
    "no_such_layer": Refused(change(lambda adata: None), "layer='umi' is not in", ("--layer", "umi")),
    "no_such_column": Refused(change(lambda adata: None), "gene_column='id' is not", ("--gene-column", "id")),
}
# What `inspect` can still describe gets a report with the fix, the rest an error.
REPORTED = {
    "nan", "infinity", "negative", "too_large_for_float32", "log1p", "cp10k", "scaled", "rounded_log1p",
    "only_0_and_1", "all_zero", "genes_as_numbers", "unknown_genes", "mouse_symbols", "mouse_ids", "rat_ids",
    "two_species",
}  # fmt: skip


@pytest.mark.parametrize("door", ["inspect", "corpus", "annotate"])
@pytest.mark.parametrize("case", REFUSED)
def test_one_clear_error_and_nothing_left(cells, doors, case: str, door: str) -> None:
    refused = REFUSED[case]
    path = doors.input / "cells.h5ad"
    refused.make(cells.copy(), path)
    before = sorted(doors.input.iterdir())
    result = CliRunner().invoke(app, doors.commands(path, list(refused.options), [])[door])
    assert sorted(doors.input.iterdir()) == before
    if door == "inspect" and case in REPORTED:
        assert isinstance(result.exception, SystemExit), repr(result.exception)
        assert result.exit_code == 1
        text = " ".join(result.output.split())
        assert_mentions(text, "verdict REFUSED ... fix ")
        assert_mentions(text, f"verdict REFUSED ... {refused.message}")
        assert doors.left() == ["output/passport.json"]
        return
    assert_is_one_clear_error(result, "cells.h5ad", refused.message)
    assert doors.left() == []


# Odd inputs that are right


def run_all(
    doors: Doors, path: Path, *options: str, obs: tuple[str, ...] = ()
) -> tuple[dict, list[dict], anndata.AnnData]:
    """Send a file through the doors; return its passport, the corpus's rows, and the annotated cells."""
    chosen = [part for name in obs for part in ("--obs", name)]
    for door, arguments in doors.commands(path, list(options), chosen).items():
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, f"{door}: {result.output}\n{result.exception!r}"
    assert [name for name in doors.left() if not name.startswith("output/corpus/")] == [
        "output/annotated.h5ad", "output/corpus", "output/passport.json"
    ]  # fmt: skip
    passport = json.loads((doors.output / "passport.json").read_text())
    rows = list(open_corpus(doors.output / "corpus").dataset)
    return passport, rows, anndata.read_h5ad(doors.output / "annotated.h5ad")


def tokens(rows: list[dict]) -> list[tuple[list[int], list[int]]]:
    return [(row["gene_ids"], row["input_ids"]) for row in rows]


def expected_tokens(adata: anndata.AnnData) -> list[tuple[list[int], list[int]]]:
    """Return what the tokenizer makes of cells in memory."""
    input_ids = ScReformerTokenizer()(adata)["input_ids"]
    return [(np.flatnonzero(bins).tolist(), bins[bins > 0].tolist()) for bins in input_ids]


@pytest.fixture(scope="module")
def plain_tokens(cells) -> list[tuple[list[int], list[int]]]:
    return expected_tokens(cells)


def unsorted(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    counts = counts.copy()
    for row in range(NUM_CELLS):
        entries = slice(counts.indptr[row], counts.indptr[row + 1])
        counts.indices[entries] = counts.indices[entries][::-1]
        counts.data[entries] = counts.data[entries][::-1]
    counts.has_sorted_indices = False
    return counts


@pytest.mark.parametrize(
    "form",
    [sparse.csc_matrix, sparse.csr_matrix.toarray, lambda counts: counts.astype(np.int64), unsorted],
    ids=["csc", "dense", "int64", "unsorted"],
)
def test_the_form_of_the_matrix_does_not_matter(cells, doors, plain_tokens, form) -> None:
    adata = anndata.AnnData(form(cells.X), obs=cells.obs, var=cells.var)
    adata.write_h5ad(doors.input / "cells.h5ad")
    passport, rows, annotated = run_all(doors, doors.input / "cells.h5ad")
    assert tokens(rows) == plain_tokens
    assert annotated.n_obs == NUM_CELLS
    assert passport["problems"] == []


def test_half_precision_counts_are_counts(cells, doors) -> None:
    path = doors.input / "cells.h5ad"
    half = cells.X.minimum(2048).toarray().astype(np.float16)  # whole numbers are exact to there
    few = anndata.AnnData(half.astype(np.float32), obs=cells.obs, var=cells.var)
    anndata.AnnData(half, obs=cells.obs, var=cells.var).write_h5ad(path)
    _, rows, annotated = run_all(doors, path)
    assert tokens(rows) == expected_tokens(few)
    assert annotated.obs["screformer_cell_type"].notna().all()


def test_log_values_beside_a_layer_of_counts(cells, doors, plain_tokens) -> None:
    adata = cells.copy()
    adata.layers["counts"] = adata.X
    adata.X = scale_to_cp10k(cells.X).log1p()
    adata.write_h5ad(doors.input / "cells.h5ad")
    passport, rows, annotated = run_all(doors, doors.input / "cells.h5ad")
    assert passport["count_source"] == annotated.uns["screformer"]["input"]["count_source"] == "layers/counts"
    assert tokens(rows) == plain_tokens


@pytest.mark.parametrize("part", [np.s_[:1], np.s_[:, :1]], ids=["one_cell", "one_gene"])
def test_one_cell_or_one_gene(cells, doors, part) -> None:
    adata = cells[part].copy()
    adata.write_h5ad(doors.input / "cells.h5ad")
    passport, rows, annotated = run_all(doors, doors.input / "cells.h5ad")
    assert len(rows) == len(np.unique(adata.X.toarray(), axis=0)) - int(adata.X.getnnz(axis=1).min() == 0)
    assert tokens(rows)[0] == expected_tokens(adata)[0]
    assert (passport["num_cells"], passport["num_genes"]) == adata.shape
    assert annotated.shape == adata.shape


def test_cells_without_counts_are_left_out_of_a_corpus_and_have_no_label(cells, doors, plain_tokens) -> None:
    counts = cells.X.tolil()
    counts[[0, 7]] = 0
    anndata.AnnData(counts.tocsr(), obs=cells.obs, var=cells.var).write_h5ad(doors.input / "cells.h5ad")
    passport, rows, annotated = run_all(doors, doors.input / "cells.h5ad")
    assert passport["num_empty_cells"] == passport["num_without_counts"] == 2
    kept = [at for at in range(NUM_CELLS) if at not in (0, 7)]
    assert [row["cell_id"] for row in rows] == [cells.obs_names[at] for at in kept]
    assert tokens(rows) == [plain_tokens[at] for at in kept]
    assert np.flatnonzero(annotated.obs["screformer_cell_type"].isna()).tolist() == [0, 7]
    assert annotated.uns["screformer"]["input"]["num_empty_cells"] == 2


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_a_gene_named_twice_is_summed(cells, doors, plain_tokens) -> None:
    half = cells.X.copy()
    half.data = np.floor(half.data / 2)
    counts = sparse.hstack([half, cells.X - half]).tocsr()
    adata = anndata.AnnData(counts, obs=cells.obs, var=pd.DataFrame(index=[*cells.var_names] * 2))
    adata.write_h5ad(doors.input / "cells.h5ad")
    passport, rows, annotated = run_all(doors, doors.input / "cells.h5ad")
    assert tokens(rows) == plain_tokens
    assert passport["gene_mapping"]["num_summed_genes"] == NUM_GENES
    assert annotated.shape == (NUM_CELLS, 2 * NUM_GENES)


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_cells_of_one_name_are_kept_and_counted(cells, doors, plain_tokens) -> None:
    adata = cells.copy()
    adata.obs_names = ["same"] * NUM_CELLS
    adata.write_h5ad(doors.input / "cells.h5ad")
    passport, rows, annotated = run_all(doors, doors.input / "cells.h5ad")
    assert tokens(rows) == plain_tokens
    assert passport["num_repeated_cells"] == NUM_CELLS - 1
    assert annotated.n_obs == NUM_CELLS


def test_names_in_other_alphabets_are_kept_to_the_letter(cells, doors, plain_tokens) -> None:
    adata = cells.copy()
    adata.obs_names = [f"клетка-{at}-細胞" for at in range(NUM_CELLS)]
    adata.obs["cell_type"] = pd.Categorical(["β-клетка", "心筋 cell"] * (NUM_CELLS // 2))
    adata.var_names = [*adata.var_names[:-1], "génère/🧬"]
    path = doors.input / "clés 細胞.h5ad"
    adata.write_h5ad(path)
    passport, rows, annotated = run_all(doors, path, obs=("cell_type",))
    assert passport["file"] == path.name
    assert [gene["name"] for gene in passport["unmatched"]] == ["génère/🧬"]
    assert [row["cell_id"] for row in rows] == annotated.obs_names.tolist() == adata.obs_names.tolist()
    assert [row["cell_type"] for row in rows] == adata.obs["cell_type"].tolist()
    assert annotated.var_names.tolist() == adata.var_names.tolist()


def test_categorical_var_names_are_names(cells, doors, plain_tokens) -> None:
    path = doors.input / "cells.h5ad"
    cells.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        index = file["var"].attrs["_index"]
        del file["var"][index]
        anndata.io.write_elem(file["var"], index, pd.Categorical(cells.var_names))
    passport, rows, _ = run_all(doors, path)
    assert passport["gene_source"] == "var_names"
    assert tokens(rows) == plain_tokens


def test_names_in_a_column_beside_numbers(cells, doors, plain_tokens) -> None:
    adata = cells.copy()
    adata.var["gene"] = pd.Categorical(adata.var_names)
    adata.var_names = [str(at) for at in range(NUM_GENES)]
    adata.write_h5ad(doors.input / "cells.h5ad")
    passport, rows, _ = run_all(doors, doors.input / "cells.h5ad", "--gene-column", "gene")
    assert passport["gene_source"] == "var['gene']"
    assert tokens(rows) == plain_tokens


def test_versions_of_ensembl_ids_do_not_matter(cells, doors, plain_tokens) -> None:
    vocabulary = GeneVocabulary.human_v1()
    positions = vocabulary.map_names(cells.var_names).positions
    adata = cells.copy()
    adata.var_names = [f"{vocabulary.ensembl_ids[at]}.{at % 9}" for at in positions]
    adata.write_h5ad(doors.input / "cells.h5ad")
    passport, rows, _ = run_all(doors, doors.input / "cells.h5ad")
    assert passport["gene_ids"]["type"] == "ensembl"
    assert tokens(rows) == plain_tokens


def test_what_was_allowed_is_recorded_everywhere(cells, doors) -> None:
    set_values(rounded_log)(cells.copy(), doors.input / "cells.h5ad")
    passport, rows, annotated = run_all(doors, doors.input / "cells.h5ad", "--allow", "not-counts")
    assert len(rows) == NUM_CELLS
    sources = json.loads((doors.output / "corpus" / "manifest.json").read_text())["sources"]
    for record in (passport, sources[0]["passport"]):
        assert record["allowed"] == ["not-counts"]
        assert [problem["code"] for problem in record["problems"]] == ["not-counts"]
    assert annotated.uns["screformer"]["input"]["allowed"].tolist() == ["not-counts"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pd.array([1, None, 3] * 8, dtype="Int64"), ["1", None, "3"]),
        (pd.array([True, None, False] * 8, dtype="boolean"), ["True", None, "False"]),
        (pd.Categorical(["a", None, "b"] * 8), ["a", None, "b"]),
        (np.array([0.5, np.nan, 2.0] * 8), ["0.5", None, "2.0"]),
        (pd.Categorical([1, 2, None] * 8), ["1", "2", None]),
    ],
    ids=["whole numbers", "truth", "categories", "numbers", "categories of numbers"],
)
def test_obs_columns_become_text(cells, doors, values, expected: list[str | None]) -> None:
    adata = cells.copy()
    adata.obs["value"] = values
    path = doors.input / "cells.h5ad"
    adata.write_h5ad(path)
    result = CliRunner().invoke(app, doors.commands(path, [], ["--obs", "value"])["corpus"])
    assert result.exit_code == 0, result.output
    assert open_corpus(doors.output / "corpus").dataset["value"][:3] == expected


def test_an_obs_column_that_is_not_there(cells, doors) -> None:
    path = doors.input / "cells.h5ad"
    cells.write_h5ad(path)
    result = CliRunner().invoke(app, doors.commands(path, [], ["--obs", "donor"])["corpus"])
    assert_is_one_clear_error(result, "cells.h5ad", "'donor' ... ['cell_type']")
    assert doors.left() == []


# The system


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("door", ["inspect", "corpus", "annotate"])
def test_a_file_that_may_not_be_read(cells, doors, door: str) -> None:
    path = doors.input / "cells.h5ad"
    cells.write_h5ad(path)
    path.chmod(0)
    result = CliRunner().invoke(app, doors.commands(path, [], [])[door])
    assert_is_one_clear_error(result, "cells.h5ad", "ermission denied")
    assert doors.left() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("door", ["corpus", "annotate"])
def test_a_folder_that_may_not_be_written(cells, doors, door: str) -> None:
    path = doors.input / "cells.h5ad"
    cells.write_h5ad(path)
    doors.output.chmod(0o555)
    result = CliRunner().invoke(app, doors.commands(path, [], [])[door])
    doors.output.chmod(0o755)
    assert_is_one_clear_error(result, "output", "ermission denied")
    assert doors.left() == []


@pytest.mark.parametrize("door", ["inspect", "corpus", "annotate"])
def test_an_output_inside_a_file(cells, doors, door: str) -> None:
    path = doors.input / "cells.h5ad"
    cells.write_h5ad(path)
    doors.output.rmdir()
    doors.output.write_text("no folder")
    result = CliRunner().invoke(app, doors.commands(path, [], [])[door])
    assert_is_one_clear_error(result, "output", "")
    assert doors.output.read_text() == "no folder"
    assert doors.left() == []


@pytest.mark.parametrize("door", ["inspect", "corpus", "annotate"])
def test_a_file_that_changes_while_it_is_read(cells, doors, monkeypatch, door: str) -> None:
    path = doors.input / "cells.h5ad"
    cells.write_h5ad(path)
    read_blocks = CountMatrix.blocks

    def grow(matrix, num_rows, **options):
        for block in read_blocks(matrix, num_rows, **options):
            with path.open("ab") as file:
                file.write(b"more")
            yield block

    monkeypatch.setattr(CountMatrix, "blocks", grow)
    result = CliRunner().invoke(app, doors.commands(path, [], [])[door])
    assert_is_one_clear_error(result, "cells.h5ad", "changed while it was read")
    assert doors.left() == []


@contextmanager
def full_disk(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond a size, as on a disk without room: writing fails with an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))  # Python ignores the signal that goes with it
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("door", "limit"),
    [("inspect", 1000), ("corpus", 0), ("corpus", 20_000), ("corpus", 300_000), ("annotate", 0), ("annotate", 20_000)],
)
def test_a_full_disk(cells, doors, door: str, limit: int) -> None:
    path = doors.input / "cells.h5ad"
    # So many cells that their tokens are larger than the files of the tokenizer.
    many = sparse.vstack([cells.X[:, np.roll(np.arange(NUM_GENES), shift)] for shift in range(12)]).tocsr()
    anndata.AnnData(many, var=cells.var).write_h5ad(path)
    command = doors.commands(path, [], [])[door]
    with full_disk(limit):
        result = CliRunner().invoke(app, command)
    assert_is_one_clear_error(result, "output", "File too large")
    if (door, limit) == ("annotate", 20_000):
        # What was computed is kept for when there is room.
        assert [name for name in doors.left() if not name.startswith("output/annotated.h5ad.partial")] == []
        assert "output/annotated.h5ad.partial/00000000.npy" in doors.left()
        assert CliRunner().invoke(app, command).exit_code == 0
        assert doors.left() == ["output/annotated.h5ad"]
    else:
        assert doors.left() == []
