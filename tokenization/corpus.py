"""Tokenized cells on disk: Arrow shards, the tokenizer that made them, and a manifest of where they came from."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from screformer.tokenization.cell_filters import CellFilters
from screformer.tokenization.cell_hashes import UInt64Array
from screformer.tokenization.corpus_build import BuildCounts, build
from screformer.tokenization.corpus_files import (
    BUILD_LOG,
    MANIFEST,
    TOKENIZER_FOLDER,
    Manifest,
    only_run,
    partial_folder,
    read_json,
    write_json,
)
from screformer.tokenization.corpus_plan import (
    FORMAT,
    READABLE_VERSIONS,
    CorpusOptions,
    check_same,
    find_sources,
    make_plan,
)
from screformer.tokenization.corpus_shards import is_whole, read_hashes
from screformer.tokenization.corpus_split import CELL, FILE, HoldOut, held_out_by_cell
from screformer.tokenization.corpus_workers import Workers
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """A finished corpus.

    Attributes
    ----------
    folder
        Where it is.
    manifest
        `tokenizer` (fingerprint, options), `options` (of `build_corpus`), `split` (rule, groups held out, cells),
        `sources` (name, sha256, cells, where counts and genes were found, gene mapping, share of counts on known genes,
        cells kept, and dropped by reason), `shards` (file, sha256, source, its rows, cells kept, tokens, dropped),
        `totals` (cells, tokens, dropped), `cell_hashes` (file, sha256, cells, rule) and `software` (versions).
    """

    folder: Path
    manifest: Manifest

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """Cells in the order of the sources, read from disk as needed.

        Columns: `input_ids` list of uint8, `gene_ids` list of uint16 (expressed genes only), `cell_hash` uint64 (see
        `cell_hashes`), `cell_id`, and the obs columns asked for, as text (None where a value was missing).
        """
        parts = [datasets.Dataset.from_file(str(self.folder / shard["file"])) for shard in self.manifest["shards"]]
        return datasets.concatenate_datasets(parts)

    @cached_property
    def cell_hashes(self) -> UInt64Array:
        """Hash of each cell's raw counts, uint64 (num_cells,), in the order of `dataset`.

        Raises
        ------
        ValueError
            The corpus is of version 1, which has none.
        """
        if self.manifest["version"] == 1:
            msg = f"folder: {self.folder} was made by an older release and has no cell hashes; build it again"
            raise ValueError(msg)
        return np.concatenate([read_hashes(self.folder / shard["file"]) for shard in self.manifest["shards"]])

    @property
    def has_split(self) -> bool:
        """Whether the manifest says which cells are held out."""
        return self.manifest.get("split") is not None

    @property
    def held_out(self) -> Int64Array:
        """Rows of the cells that are held out from training, ascending.

        Raises
        ------
        ValueError
            The corpus was built without `hold_out`.
        """
        return np.flatnonzero(self._is_held_out)

    @property
    def training(self) -> Int64Array:
        """Rows of the cells to train on, ascending: all others. Raises as `held_out` does."""
        return np.flatnonzero(~self._is_held_out)

    def tokenizer(self) -> ScReformerTokenizer:
        """Load the tokenizer that made the corpus."""
        return ScReformerTokenizer.from_pretrained(self.folder / TOKENIZER_FOLDER)

    def summary(self) -> str:
        """Return a few lines: cells, tokens, size, speed, and the cells that were dropped."""
        num_cells, num_tokens = len(self), sum(shard["num_tokens"] for shard in self.manifest["shards"])
        size = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        lines = [f"{num_cells:,} cells, {num_tokens:,} tokens, {size / 1e9:.3g} GB in {self.folder}"]
        if (self.folder / BUILD_LOG).is_file():
            log = read_json(self.folder / BUILD_LOG)
            lines[0] += f"; {log['num_cells_read']:,} cells read at {log['cells_per_second']:,.0f} cells/s"
        dropped = self.manifest.get("totals", {}).get("dropped", {})
        if dropped:
            reasons = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in dropped.items())
            lines.append(f"dropped: {reasons}")
        if self.has_split:
            split = self.manifest["split"]
            groups = "" if split["groups"] is None else f": {', '.join(split['groups'])}"
            lines.append(f"held out by {split['by']}: {split['num_held_out']:,} cells{groups}")
        return "\n".join(lines)

    def __len__(self) -> int:
        """Count the cells."""
        return sum(shard["num_cells"] for shard in self.manifest["shards"])

    @cached_property
    def _is_held_out(self) -> npt.NDArray[np.bool_]:
        if not self.has_split:
            msg = f"folder: {self.folder} has no split; build it with hold_out (--hold-out 0.1), or draw one yourself"
            raise ValueError(msg)
        split = self.manifest["split"]
        if split["by"] == CELL:
            return held_out_by_cell(HoldOut(split["fraction"], CELL, split["seed"]), self.cell_hashes)
        shards = self.manifest["shards"]
        if split["by"] == FILE:
            names = [self.manifest["sources"][shard["source"]]["name"] for shard in shards]
            return np.repeat(np.isin(names, split["groups"]), [shard["num_cells"] for shard in shards])
        column = self.dataset.data.column(split["by"])
        return pc.is_in(column, pa.array(split["groups"], pa.string())).to_numpy(zero_copy_only=False).astype(bool)


def build_corpus(
    paths: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: ScReformerTokenizer,
    obs_columns: Sequence[str] = (),
    layer: str | None = None,
    gene_column: str | None = None,
    cells_per_shard: int = 50_000,
    filters: CellFilters | None = None,
    hold_out: HoldOut | None = None,
    allow: Sequence[str] = (),
    num_workers: int = 1,
    scheduler: str | None = None,
) -> Corpus:
    """Tokenize files of cells into a corpus.

    The work is done in a folder beside `output`, called `output` + ".partial", and renamed at the end. A run that was
    stopped, even by force, goes on where it was when it is called again with the same arguments: shards that are whole
    are kept, and the result is the same to the byte (but for `build_log.json`, which has times), whoever does the work.
    If `output` is already that corpus, it is opened.

    Cells without counts on known genes are dropped and counted, unless the tokenizer has ``on_empty_cells="keep"``.

    Parameters
    ----------
    paths
        Files, folders or addresses of cells, of every format that `open_count_matrix` reads.
    output
        The folder to make.
    tokenizer
        Makes the tokens; saved in `output`.
    obs_columns
        Columns of `obs` to keep, as text; every file must have them.
    layer, gene_column, allow
        Where counts and gene names are, and which problems to accept, for all files (see `open_count_matrix`).
    cells_per_shard
        The most cells in one Arrow file; a shard never mixes files.
    filters
        What a cell must have to be kept; ``CellFilters()`` when left out, which also drops duplicates.
    hold_out
        Which cells to keep from training, recorded in the manifest (`Corpus.held_out`, `Corpus.training`).
    num_workers
        Processes that write shards. With more than one, a script needs ``if __name__ == "__main__":``.
    scheduler
        Address of a running Dask scheduler whose workers write the shards instead. They must see the files and the
        output folder under the same paths (a shared file system) and have the same release of this package.

    Raises
    ------
    FileNotFoundError
        A path is no file.
    ValueError
        A file is there twice, lacks an obs column, raw counts, known genes or enough coverage; no cell is left; the
        split leaves one side empty; or the folder holds something else, or a corpus made otherwise.
    OSError
        Another run is building the same output (`BlockingIOError`), a worker died (`ChildProcessError`), or no
        scheduler answers (`ConnectionError`).
    """
    if isinstance(obs_columns, str):
        msg = f"obs_columns: a list of names, got the text {obs_columns!r}; write [{obs_columns!r}]"
        raise TypeError(msg)
    workers = Workers(num_workers, scheduler)
    options = CorpusOptions(
        tuple(obs_columns),
        layer,
        gene_column,
        cells_per_shard,
        tuple(allow),
        CellFilters() if filters is None else filters,
        hold_out,
    )
    folder = Path(output)
    sources = find_sources(paths)
    began = time.monotonic()
    if folder.exists():
        return _open_same(folder, make_plan(sources, tokenizer, options))
    with only_run(folder), workers:
        plan = make_plan(sources, tokenizer, options)
        if folder.exists():  # another run has just finished it
            return _open_same(folder, plan)
        counts = build(sources, partial_folder(folder), plan, tokenizer, options, workers)
        _write_log(partial_folder(folder), counts, workers, seconds=time.monotonic() - began)
        os.replace(partial_folder(folder), folder)
    return open_corpus(folder)


def open_corpus(folder: str | Path) -> Corpus:
    """Open a finished corpus.

    Raises
    ------
    FileNotFoundError
        There is no corpus, it was not finished, or one of its shards is gone.
    ValueError
        The manifest is of another kind or version.
    """
    folder = Path(folder)
    manifest_path = folder / MANIFEST
    if not manifest_path.is_file():
        partial = partial_folder(folder)
        remedy = (
            f"It was begun and not finished ({partial.name}): call build_corpus again with the same arguments."
            if partial.exists()
            else "Make one with build_corpus, or `screformer corpus`."
        )
        msg = f"folder: {folder} is not a corpus, it has no {MANIFEST}. {remedy}"
        raise FileNotFoundError(msg)
    manifest = read_json(manifest_path)
    if manifest.get("format") != FORMAT or manifest.get("version") not in READABLE_VERSIONS:
        msg = (
            f"folder: {manifest_path} says format {manifest.get('format')!r} version {manifest.get('version')!r}; this "
            f"release reads {FORMAT!r} versions {list(READABLE_VERSIONS)}. Build the corpus again, or use the release "
            "that made it."
        )
        raise ValueError(msg)
    missing = [shard["file"] for shard in manifest["shards"] if not (folder / shard["file"]).is_file()]
    if missing:
        msg = f"folder: {folder} lacks the shards {missing}; delete it and build the corpus again"
        raise FileNotFoundError(msg)
    return Corpus(folder=folder, manifest=manifest)


def _write_log(folder: Path, counts: BuildCounts, workers: Workers, *, seconds: float) -> None:
    """Write what differs between two runs that make the same corpus."""
    log = {
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "cells_per_second": round(counts.num_cells_read / seconds, 1),
        **counts._asdict(),
        "num_workers": workers.num_workers,
        "scheduler": workers.scheduler,
    }
    write_json(folder / BUILD_LOG, log)


def _open_same(folder: Path, plan: Manifest) -> Corpus:
    """Open a folder that exists, if it is the planned corpus and whole."""
    if not (folder / MANIFEST).is_file() and folder.is_dir() and not any(folder.iterdir()):
        msg = f"output: {folder} is an empty folder that exists already; delete it or choose another output"
        raise ValueError(msg)
    if not (folder / MANIFEST).is_file():
        msg = f"output: {folder} exists and is not a corpus; choose another output"
        raise ValueError(msg)
    corpus = open_corpus(folder)
    check_same(folder, corpus.manifest, plan, is_finished=True)
    changed = [shard["file"] for shard in corpus.manifest["shards"] if not is_whole(folder, shard)]
    if changed:
        msg = f"output: the shards {changed} of {folder} are damaged; delete the folder and build the corpus again"
        raise ValueError(msg)
    return corpus
