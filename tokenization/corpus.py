"""Tokenized cells on disk: Arrow shards, the tokenizer that made them, and a manifest of where they came from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from datasets.arrow_writer import ArrowWriter
from tqdm.auto import tqdm

from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.expression_bins import as_counts_csr
from screformer.tokenization.gene_vocabulary import GeneMapping
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer, TokenizedCells

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
OWN_COLUMNS = ("input_ids", "gene_ids", "cell_id")
CELLS_PER_BLOCK = 1024

# What the manifest is: JSON, with the keys that `build_corpus` lists.
Manifest = dict[str, Any]


@dataclass(frozen=True)
class Corpus:
    """A finished corpus.

    Attributes
    ----------
    folder
        Where it is.
    manifest
        `tokenizer` (fingerprint, options), `options` (of `build_corpus`), `sources` (name, sha256, cells, where counts
        and genes were found, gene mapping, share of counts on known genes), `shards` (file, sha256, cells, tokens).
    """

    folder: Path
    manifest: Manifest

    @cached_property
    def dataset(self) -> datasets.Dataset:
        """Cells in the order of the sources, read from disk as needed.

        Columns: `input_ids` list of uint8, `gene_ids` list of uint16 (expressed genes only), `cell_id`, and the obs
        columns asked for, as text (None where a value was missing).
        """
        parts = [datasets.Dataset.from_file(str(self.folder / shard["file"])) for shard in self.manifest["shards"]]
        return datasets.concatenate_datasets(parts)

    def tokenizer(self) -> ScReformerTokenizer:
        """Load the tokenizer that made the corpus."""
        return ScReformerTokenizer.from_pretrained(self.folder / TOKENIZER_FOLDER)

    def __len__(self) -> int:
        """Count the cells."""
        return sum(shard["num_cells"] for shard in self.manifest["shards"])


class _Shard(NamedTuple):
    """A run of cells of one source, to become one file."""

    file: str
    source: int
    first_cell: int
    num_cells: int


def build_corpus(
    paths: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: ScReformerTokenizer,
    obs_columns: Sequence[str] = (),
    layer: str | None = None,
    gene_column: str | None = None,
    cells_per_shard: int = 50_000,
) -> Corpus:
    """Tokenize files of cells into a corpus.

    The work is done in a folder beside `output`, called `output` + ".partial", and renamed at the end. A run that was
    stopped goes on where it was when it is called again with the same arguments: shards that are whole are kept, and
    the result is the same to the byte. If `output` is already that corpus, it is opened.

    Parameters
    ----------
    paths
        One or more h5ad files.
    output
        The folder to make.
    tokenizer
        Makes the tokens; saved in `output`.
    obs_columns
        Columns of `obs` to keep, as text; every file must have them.
    layer, gene_column
        Where counts and gene names are, for all files (see `open_count_matrix`).
    cells_per_shard
        The most cells in one Arrow file; a shard never mixes files.

    Raises
    ------
    FileNotFoundError
        A path is no file.
    ValueError
        A file is there twice, lacks an obs column, raw counts, known genes or enough coverage, or has empty cells; or
        the folder holds something else, or a corpus made otherwise.
    """
    folder = Path(output)
    partial = folder.with_name(folder.name + ".partial")
    sources = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    _check_arguments(sources, obs_columns, cells_per_shard)
    digests = _digest_sources(sources)
    plan: Manifest = {
        "format": "screformer-corpus",
        "version": 1,
        "tokenizer": _describe_tokenizer(tokenizer),
        "options": {
            "obs_columns": list(obs_columns),
            "layer": layer,
            "gene_column": gene_column,
            "cells_per_shard": cells_per_shard,
        },
        "sources": [{"name": path.name, "sha256": digest} for path, digest in zip(sources, digests, strict=True)],
        "shards": [],
    }
    if folder.exists():
        return _open_same(folder, plan)
    manifest = _resume(partial, plan) if partial.exists() else plan
    matrices: list[CountMatrix] = []
    try:
        for path in sources:
            matrices.append(
                open_count_matrix(path, layer=layer, gene_column=gene_column, vocabulary=tokenizer.gene_vocabulary)
            )
        mappings = [_check_source(matrix, tokenizer, obs_columns) for matrix in matrices]
        for entry, matrix, mapping in zip(manifest["sources"], matrices, mappings, strict=True):
            entry.update(_describe_source(matrix, mapping))
        partial.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(partial / TOKENIZER_FOLDER)
        _write_shards(partial, manifest, matrices, mappings, tokenizer)
    finally:
        for matrix in matrices:
            matrix.close()
        if partial.exists() and not manifest["shards"]:
            shutil.rmtree(partial)
    os.replace(partial, folder)
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
        partial = folder.with_name(folder.name + ".partial")
        remedy = (
            f"It was begun and not finished ({partial.name}): call build_corpus again with the same arguments."
            if partial.exists()
            else "Make one with build_corpus, or `screformer corpus`."
        )
        msg = f"folder: {folder} is not a corpus, it has no {MANIFEST}. {remedy}"
        raise FileNotFoundError(msg)
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
    if (manifest.get("format"), manifest.get("version")) != ("screformer-corpus", 1):
        msg = (
            f"folder: {manifest_path} says format {manifest.get('format')!r} version {manifest.get('version')!r}; this "
            "release reads 'screformer-corpus' version 1. Build the corpus again, or use the release that made it."
        )
        raise ValueError(msg)
    missing = [shard["file"] for shard in manifest["shards"] if not (folder / shard["file"]).is_file()]
    if missing:
        msg = f"folder: {folder} lacks the shards {missing}; delete it and build the corpus again"
        raise FileNotFoundError(msg)
    return Corpus(folder=folder, manifest=manifest)


def _check_arguments(sources: list[Path], obs_columns: Sequence[str], cells_per_shard: int) -> None:
    if not sources:
        msg = "paths: at least one h5ad file is needed, got none"
        raise ValueError(msg)
    if cells_per_shard < 1:
        msg = f"cells_per_shard: at least 1, got {cells_per_shard}"
        raise ValueError(msg)
    if isinstance(obs_columns, str):
        msg = f"obs_columns: a list of names, got the text {obs_columns!r}; write [{obs_columns!r}]"
        raise TypeError(msg)
    taken = [name for name in obs_columns if name in OWN_COLUMNS]
    if taken or len(set(obs_columns)) != len(obs_columns):
        msg = f"obs_columns: each name once, and none of {list(OWN_COLUMNS)}, got {list(obs_columns)}"
        raise ValueError(msg)


def _digest_sources(sources: list[Path]) -> list[str]:
    first_with: dict[str, Path] = {}
    for path in tqdm(sources, desc="checksums", unit="file", disable=None):
        if not path.is_file():
            msg = f"paths: there is no file {path}"
            raise FileNotFoundError(msg)
        digest = _sha256(path)
        if digest in first_with:
            msg = f"paths: {path} has the same content as {first_with[digest]}; give each file once"
            raise ValueError(msg)
        first_with[digest] = path
    return list(first_with)


def _check_source(matrix: CountMatrix, tokenizer: ScReformerTokenizer, obs_columns: Sequence[str]) -> GeneMapping:
    """Everything that can be said against a file before its counts are read."""
    for name in obs_columns:
        if name not in matrix.obs_columns:
            msg = f"obs_columns: {matrix.path.name} has no {name!r}, it has {matrix.obs_columns}"
            raise ValueError(msg)
    mapping = matrix.map_genes(tokenizer.gene_vocabulary)
    with _naming(matrix):
        tokenizer.check_gene_names(matrix.gene_names, mapping)
    return mapping


def _write_shards(
    partial: Path,
    manifest: Manifest,
    matrices: list[CountMatrix],
    mappings: list[GeneMapping],
    tokenizer: ScReformerTokenizer,
) -> None:
    shards = _plan_shards(matrices, manifest["options"]["cells_per_shard"])
    done = {entry["file"]: entry for entry in manifest["shards"]}
    sums = np.zeros((len(matrices), 2))  # of each source: counts on known genes, all counts
    progress = tqdm(total=sum(shard.num_cells for shard in shards), desc="tokenize", unit="cell", disable=None)
    manifest["shards"] = []
    with progress:
        for shard in shards:
            matrix, mapping = matrices[shard.source], mappings[shard.source]
            if shard.file in done:
                entry = done[shard.file]
                progress.update(shard.num_cells)
            else:
                with _naming(matrix):
                    columns = manifest["options"]["obs_columns"]
                    entry = _write_shard(partial, shard, matrix, mapping, tokenizer, columns, progress)
            sums[shard.source] += entry["known_counts"], entry["counts"]
            known, total = sums[shard.source].tolist()
            with _naming(matrix):
                tokenizer.check_gene_coverage(known, total, mapping)
            manifest["shards"].append(entry)
            _write_json(partial / MANIFEST, manifest)
    for source, matrix, (known, total) in zip(manifest["sources"], matrices, sums.tolist(), strict=True):
        source["gene_coverage"] = known / total if total else 0.0
        source["notes"] = list(matrix.notes)
    _write_json(partial / MANIFEST, manifest)


def _plan_shards(matrices: list[CountMatrix], cells_per_shard: int) -> list[_Shard]:
    shards: list[_Shard] = []
    for source, matrix in enumerate(matrices):
        for first in range(0, matrix.num_cells, cells_per_shard):
            num_cells = min(cells_per_shard, matrix.num_cells - first)
            shards.append(_Shard(f"cells-{len(shards):05d}.arrow", source, first, num_cells))
    return shards


def _write_shard(
    partial: Path,
    shard: _Shard,
    matrix: CountMatrix,
    mapping: GeneMapping,
    tokenizer: ScReformerTokenizer,
    obs_columns: Sequence[str],
    progress: tqdm,
) -> Manifest:
    texts: dict[str, Sequence[str | None]] = {name: matrix.obs_column(name) for name in obs_columns}
    texts["cell_id"] = matrix.cell_ids
    path = partial / shard.file
    aside = path.with_name(path.name + ".part")
    known = total = num_tokens = 0
    features = _features(obs_columns)
    first, stop = shard.first_cell, shard.first_cell + shard.num_cells
    with ArrowWriter(features=features, path=str(aside)) as writer:
        for block in matrix.blocks(CELLS_PER_BLOCK, start=first, stop=stop):
            counts = as_counts_csr(block)
            tokens = tokenizer.tokenize_counts(counts, mapping, first_row=first)
            block_known, block_total = tokenizer.count_sums(counts, mapping)
            known, total = known + int(block_known), total + int(block_total)
            num_tokens += len(tokens.input_ids)
            rows = slice(first, first + counts.num_cells)
            writer.write_table(_arrow_table(tokens, {key: text[rows] for key, text in texts.items()}, features))
            progress.update(counts.num_cells)
            first += counts.num_cells
        writer.finalize()
    os.replace(aside, path)
    return {
        "file": shard.file,
        "source": shard.source,
        "first_cell": shard.first_cell,
        "num_cells": shard.num_cells,
        "num_tokens": num_tokens,
        "counts": total,
        "known_counts": known,
        "sha256": _sha256(path),
    }


def _features(obs_columns: Sequence[str]) -> datasets.Features:
    lists = {
        name: datasets.List(datasets.Value(kind)) for name, kind in (("input_ids", "uint8"), ("gene_ids", "uint16"))
    }
    return datasets.Features(lists | {name: datasets.Value("string") for name in ("cell_id", *obs_columns)})


def _arrow_table(
    tokens: TokenizedCells, texts: Mapping[str, Sequence[str | None]], features: datasets.Features
) -> pa.Table:
    offsets = pa.array(tokens.indptr.astype(np.int32))
    columns = {
        "input_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens.input_ids)),
        "gene_ids": pa.ListArray.from_arrays(offsets, pa.array(tokens.gene_ids)),
    }
    columns |= {name: pa.array(values, pa.string()) for name, values in texts.items()}
    return pa.table({name: columns[name] for name in features}).cast(features.arrow_schema)


def _describe_tokenizer(tokenizer: ScReformerTokenizer) -> Manifest:
    genes = json.dumps(tokenizer.gene_vocabulary.to_dict(), sort_keys=True).encode()
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.gene_vocabulary.name,
        "vocabulary_sha256": hashlib.sha256(genes).hexdigest(),
        "num_genes": tokenizer.num_genes,
        "num_bins": tokenizer.num_bins,
        "binning": tokenizer.binning,
        "target_sum": tokenizer.target_sum,
    }


def _describe_source(matrix: CountMatrix, mapping: GeneMapping) -> Manifest:
    return {
        "num_cells": matrix.num_cells,
        "num_genes": matrix.num_genes,
        "count_source": matrix.count_source,
        "gene_source": matrix.gene_source,
        "gene_mapping": mapping.report.to_dict(),
    }


def _open_same(folder: Path, plan: Manifest) -> Corpus:
    if not (folder / MANIFEST).is_file() and not any(folder.iterdir()):
        msg = f"output: {folder} is an empty folder that exists already; delete it or choose another output"
        raise ValueError(msg)
    if not (folder / MANIFEST).is_file():
        msg = f"output: {folder} exists and is not a corpus; choose another output"
        raise ValueError(msg)
    corpus = open_corpus(folder)
    _check_same(folder, corpus.manifest, plan)
    changed = [shard["file"] for shard in corpus.manifest["shards"] if not _is_whole(folder, shard)]
    if changed:
        msg = f"output: the shards {changed} of {folder} are damaged; delete the folder and build the corpus again"
        raise ValueError(msg)
    return corpus


def _resume(partial: Path, plan: Manifest) -> Manifest:
    """Manifest to go on from: the plan, with the shards that a stopped run finished."""
    if not (partial / MANIFEST).is_file():
        return plan
    manifest = json.loads((partial / MANIFEST).read_text(encoding="utf-8"))
    _check_same(partial, manifest, plan)
    whole = [shard for shard in manifest["shards"] if _is_whole(partial, shard)]
    for shard in manifest["shards"]:
        if shard not in whole:
            logger.warning("%s is damaged and will be made again", shard["file"])
    logger.info("going on in %s: %d shards are done", partial, len(whole))
    return plan | {"shards": whole}


def _check_same(folder: Path, found: Manifest, plan: Manifest) -> None:
    found_sources = [source["sha256"] for source in found["sources"]]
    differences = [
        f"{part} {key} {found[part].get(key)!r} there, {value!r} now"
        for part in ("tokenizer", "options")
        for key, value in plan[part].items()
        if found[part].get(key) != value
    ]
    if found_sources != [source["sha256"] for source in plan["sources"]]:
        names = [[source["name"] for source in one["sources"]] for one in (found, plan)]
        differences.append(f"files {names[0]} there, {names[1]} now (or their content)")
    if differences:
        msg = (
            f"output: {folder} holds a corpus made otherwise: {'; '.join(differences)}. To start over, delete that "
            "folder or choose another output; to use it as it is, call open_corpus."
        )
        raise ValueError(msg)


def _is_whole(folder: Path, shard: Manifest) -> bool:
    path = folder / shard["file"]
    return path.is_file() and _sha256(path) == shard["sha256"]


class _naming:  # noqa: N801 - reads as a word of the `with` statement
    """Put the file's name before the message of a ValueError."""

    def __init__(self, matrix: CountMatrix) -> None:
        self._name = matrix.path.name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            msg = f"{self._name}: {error}"
            raise ValueError(msg) from error


def _write_json(path: Path, content: Manifest) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    os.replace(aside, path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
