"""The steps of building a corpus in a folder; each can be stopped at any moment and gone on with later."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from screformer.tokenization.cell_filters import REASONS
from screformer.tokenization.cell_hashes import write_cell_hashes
from screformer.tokenization.corpus_duplicates import drop_duplicates
from screformer.tokenization.corpus_files import (
    BUILD_LOG,
    CELL_HASHES,
    MANIFEST,
    PLAN,
    TOKENIZER_FOLDER,
    WORK_FOLDER,
    Manifest,
    is_aside,
    read_json,
    remove_leftovers,
    write_json,
)
from screformer.tokenization.corpus_plan import TOKENIZER_OPTIONS, CorpusOptions, check_same, software_versions
from screformer.tokenization.corpus_shards import (
    ShardItem,
    close_sources,
    has_entries,
    load_tokenizer,
    read_hashes,
    read_whole_entry,
    write_shard,
)
from screformer.tokenization.corpus_split import CELL, FILE, record_split
from screformer.tokenization.corpus_workers import Workers
from screformer.tokenization.count_matrix import CountMatrix, open_count_matrix
from screformer.tokenization.passport import inspect_counts
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

logger = logging.getLogger(__name__)
# A manifest of hundreds of files would be mostly names of genes.
MAX_UNMATCHED = 20


class BuildCounts(NamedTuple):
    """Cells that this run tokenized, and shards that an earlier one had finished."""

    num_cells_read: int
    num_shards_kept: int


class _Inspection(NamedTuple):
    """A source to be inspected by any process."""

    number: int
    item: ShardItem


@dataclass
class _Source:
    """A source before and after its inspection."""

    matrix: Mapping[str, object]
    num_cells: int
    facts: Manifest = field(default_factory=dict)


def build(
    paths: Sequence[Path | str],
    folder: Path,
    plan: Manifest,
    tokenizer: ScReformerTokenizer,
    options: CorpusOptions,
    workers: Workers,
) -> BuildCounts:
    """Fill the folder with everything but the log.

    Raises
    ------
    ValueError
        The folder holds another corpus, a file is refused, no cell is left, or the split is not possible.
    OSError
        As of `Workers.run`.
    """
    is_new = not (folder / PLAN).is_file()
    try:
        is_finished = _begin(folder, plan, tokenizer)
    except OSError:  # such as a full disk
        if folder.is_dir() and not (folder / PLAN).is_file() and not (folder / MANIFEST).is_file():
            shutil.rmtree(folder)
        raise
    if is_finished:
        _tidy(folder)
        return BuildCounts(0, len(read_json(folder / MANIFEST)["shards"]))
    done: dict[str, Manifest] = {}
    rewritten = ExitStack()  # keeps the temporary rows, which all workers read
    try:
        sources = _survey(paths, folder, tokenizer, options, rewritten)
        template = _template(folder, tokenizer, options)
        _inspect_sources(folder, sources, template, workers)
        items = _plan_shards(sources, template, options.cells_per_shard)
        done |= {item.file: entry for item in items if (entry := read_whole_entry(folder, item.file)) is not None}
        num_kept, todo = len(done), [item for item in items if item.file not in done]
        if num_kept:
            logger.info("going on in %s: %d of %d shards are done", folder, num_kept, len(items))
        _write_shards(todo, done, sum(item.num_cells for item in items), workers)
    except BaseException as error:
        if is_new and not _is_of_use(folder, error):
            shutil.rmtree(folder)
        raise
    finally:
        rewritten.close()
        close_sources()
    _finish(folder, plan, sources, [done[item.file] for item in items], tokenizer, options)
    _tidy(folder)
    return BuildCounts(sum(item.num_cells for item in todo), num_kept)


def inspect_source(inspection: _Inspection) -> tuple[int, Manifest]:
    """Read a source once and return its number and what the manifest says of it, passport included.

    Raises
    ------
    ValueError
        It has a problem that is not allowed.
    """
    number, item = inspection
    path = _facts_path(Path(item.folder), number)
    if not path.is_file():
        tokenizer = load_tokenizer(item)
        options = {"vocabulary": tokenizer.gene_vocabulary, "allow": item.allow, **item.matrix}
        with open_count_matrix(**options) as matrix:
            write_json(path, _inspect_source(matrix, tokenizer, item))
    return number, read_json(path)


def _inspect_source(matrix: CountMatrix, tokenizer: ScReformerTokenizer, item: ShardItem) -> Manifest:
    passport = inspect_counts(
        matrix, tokenizer, min_genes=item.filters.min_genes, allow=item.allow, progress=False, refuse=True
    )
    notes = list(passport.notes)
    if item.filters.max_mitochondrial_share < 1 and passport.mitochondrial_share is None:
        notes.append("no gene is named as mitochondrial: max_mitochondrial_share dropped no cell")
        logger.warning("%s: %s", matrix.name, notes[-1])
    return {
        "num_genes": matrix.num_genes,
        "format": matrix.format,
        "count_source": matrix.count_source,
        "gene_source": matrix.gene_source,
        "gene_coverage": passport.gene_coverage,
        "notes": notes,
        "passport": passport.to_dict(max_unmatched=MAX_UNMATCHED),
    }


def _begin(folder: Path, plan: Manifest, tokenizer: ScReformerTokenizer) -> bool:
    """Make the folder ready; whether an earlier run had finished it but for tidying up."""
    is_finished = (folder / MANIFEST).is_file()
    if is_finished or (folder / PLAN).is_file():
        check_same(folder, read_json(folder / (MANIFEST if is_finished else PLAN)), plan, is_finished=is_finished)
    elif folder.exists():
        _refuse_foreign(folder)
        shutil.rmtree(folder)  # stopped before there was a plan
    if is_finished:
        return True
    (folder / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    _save_tokenizer(folder / TOKENIZER_FOLDER, tokenizer)
    write_json(folder / PLAN, plan)
    return False


def _refuse_foreign(folder: Path) -> None:
    """Raise ValueError if a folder has something that no build puts there before its plan."""
    tokenizer = folder / TOKENIZER_FOLDER
    strange = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path not in (tokenizer, folder / WORK_FOLDER)
        and not (path.parent == tokenizer and path.suffix in (".json", ".py"))
        and not is_aside(path)
    )
    if strange:
        msg = (
            f"{folder} is no corpus that was begun: it has {', '.join(strange[:5])}; move it, or choose another output"
        )
        raise ValueError(msg)


def _save_tokenizer(folder: Path, tokenizer: ScReformerTokenizer) -> None:
    """Save the tokenizer as a new one: one that was loaded remembers that, which would change the bytes."""
    options = {name: getattr(tokenizer, name) for name in TOKENIZER_OPTIONS}
    ScReformerTokenizer(tokenizer.gene_vocabulary, **options).save_pretrained(folder)


def _survey(
    paths: Sequence[Path | str],
    folder: Path,
    tokenizer: ScReformerTokenizer,
    options: CorpusOptions,
    rewritten: ExitStack,
) -> list[_Source]:
    """Open every source once, and refuse what can be refused before counts are read.

    One that is not stored by rows is rewritten now, once for all workers; `rewritten` keeps the rows.
    """
    sources = []
    for path in tqdm(paths, desc="open", unit="file", disable=None):
        with ExitStack() as opened:
            matrix = opened.enter_context(
                open_count_matrix(
                    path,
                    layer=options.layer,
                    gene_column=options.gene_column,
                    vocabulary=tokenizer.gene_vocabulary,
                    allow=options.allow,
                )
            )
            lacking = [name for name in options.obs_columns if name not in matrix.obs_columns]
            if lacking:
                msg = f"obs_columns: {matrix.name} has no {lacking[0]!r}, it has {matrix.obs_columns}"
                raise ValueError(msg)
            is_rewritten = matrix.prepare()
            sources.append(_Source(matrix.source, matrix.num_cells))
            if is_rewritten:
                matrix.close_all_but_rows()  # of hundreds of sources, all files would be more than may be open
                rewritten.enter_context(opened.pop_all())
    return sources


def _template(folder: Path, tokenizer: ScReformerTokenizer, options: CorpusOptions) -> ShardItem:
    """Return an item with everything that all items share."""
    return ShardItem(
        run=uuid.uuid4().hex,
        folder=str(folder.absolute()),
        file="",
        source=-1,
        matrix={},
        first_cell=0,
        num_cells=0,
        fingerprint=tokenizer.fingerprint,
        obs_columns=options.obs_columns,
        allow=options.allow,
        filters=options.filters,
        keep_empty=tokenizer.on_empty_cells == "keep",
    )


def _inspect_sources(folder: Path, sources: list[_Source], template: ShardItem, workers: Workers) -> None:
    inspections = [
        _Inspection(number, replace(template, source=number, matrix=source.matrix))
        for number, source in enumerate(sources)
    ]
    known = [one for one in inspections if _facts_path(folder, one.number).is_file()]
    unknown = [one for one in inspections if one not in known]
    for number, facts in map(inspect_source, known):
        sources[number].facts = facts
    total = sum(source.num_cells for source in sources)
    with (
        closing(workers.run(inspect_source, unknown)) as results,
        tqdm(total=total, desc="inspect", unit="cell", disable=None) as bar,
    ):
        bar.update(sum(sources[one.number].num_cells for one in known))
        for number, facts in results:
            sources[number].facts = facts
            bar.update(sources[number].num_cells)


def _plan_shards(sources: list[_Source], template: ShardItem, cells_per_shard: int) -> list[ShardItem]:
    items: list[ShardItem] = []
    for number, source in enumerate(sources):
        for first in range(0, source.num_cells, cells_per_shard):
            items.append(
                replace(
                    template,
                    file=f"cells-{len(items):05d}.arrow",
                    source=number,
                    matrix=source.matrix,
                    first_cell=first,
                    num_cells=min(cells_per_shard, source.num_cells - first),
                )
            )
    return items


def _write_shards(todo: list[ShardItem], done: dict[str, Manifest], num_cells: int, workers: Workers) -> None:
    """Write the shards of `todo` and add their entries to `done`."""
    with tqdm(total=num_cells, desc="tokenize", unit="cell", disable=None) as bar:
        bar.update(sum(entry["num_source_cells"] for entry in done.values()))
        function = partial(write_shard, advance=bar.update) if workers.is_this_process else write_shard
        with closing(workers.run(function, todo)) as entries:
            for entry in entries:
                done[entry["file"]] = entry
                if not workers.is_this_process:
                    bar.update(entry["num_source_cells"])


def _finish(
    folder: Path,
    plan: Manifest,
    sources: list[_Source],
    entries: list[Manifest],
    tokenizer: ScReformerTokenizer,
    options: CorpusOptions,
) -> None:
    """Drop duplicates, write the index of hashes and draw the split; the manifest, written last, says it is done."""
    hashes = [read_hashes(folder / entry["file"]) for entry in entries]
    if options.filters.drop_duplicates:
        entries = drop_duplicates(folder, entries, hashes)
    dropped = [_count_dropped(entries, number) for number in range(len(sources))]
    total = dict(sum(map(Counter, dropped), Counter()))
    shards = [entry for entry in entries if entry["num_cells"]]
    if not shards:
        msg = f"filters: no cell is left, all were dropped ({total}); ask for less, or look at the files"
        raise ValueError(msg)
    all_hashes = np.concatenate(hashes)
    split = None
    if options.hold_out is not None:
        sizes = _group_sizes(folder, plan, shards, options.hold_out.by)
        split = record_split(options.hold_out, all_hashes, sizes)
    kept = Counter(dict.fromkeys(range(len(sources)), 0))
    for entry in shards:
        kept[entry["source"]] += entry["num_cells"]
    manifest = plan | {
        "split": split,
        "sources": [
            entry | {"num_cells": source.num_cells, "num_kept": kept[number], "dropped": dropped[number]} | source.facts
            for number, (entry, source) in enumerate(zip(plan["sources"], sources, strict=True))
        ],
        "shards": shards,
        "totals": {
            "num_cells": len(all_hashes),
            "num_tokens": sum(entry["num_tokens"] for entry in shards),
            "dropped": total,
        },
        "cell_hashes": write_cell_hashes(folder / CELL_HASHES, all_hashes, tokenizer.gene_vocabulary),
        "software": software_versions(),
    }
    write_json(folder / MANIFEST, manifest)


def _count_dropped(entries: Sequence[Manifest], source: int) -> dict[str, int]:
    """Cells of a source dropped for each reason that occurred."""
    counts: Counter[str] = Counter()
    for entry in entries:
        if entry["source"] == source:
            counts.update(entry["dropped"])
    return {reason: counts[reason] for reason in REASONS if counts[reason]}


def _group_sizes(folder: Path, plan: Manifest, shards: Sequence[Manifest], by: str) -> Counter[str]:
    """Cells of each group of a split; those without a value are in none."""
    sizes: Counter[str] = Counter()
    if by == CELL:
        return sizes
    for entry in shards:
        if by == FILE:
            sizes[plan["sources"][entry["source"]]["name"]] += entry["num_cells"]
        else:
            for values in _column_batches(folder / entry["file"], by):
                counted = values.drop_null().value_counts().to_pylist()
                sizes.update({one["values"]: one["counts"] for one in counted})
    return sizes


def _column_batches(path: Path, column: str) -> Iterator[pa.Array]:
    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        for batch in reader:
            yield batch.column(column)


def _is_of_use(folder: Path, error: BaseException) -> bool:
    """Whether a later run could go on with what this one began: with its shards, or where it was only stopped."""
    if has_entries(folder):
        return True
    return isinstance(error, KeyboardInterrupt | ChildProcessError) and any((folder / WORK_FOLDER).iterdir())


def _tidy(folder: Path) -> None:
    """Delete what only an unfinished corpus needs."""
    files = {shard["file"] for shard in read_json(folder / MANIFEST)["shards"]}
    for path in folder.glob("cells-*.arrow"):
        if path.name not in files:
            path.unlink()
    shutil.rmtree(folder / WORK_FOLDER, ignore_errors=True)
    for name in (PLAN, BUILD_LOG):
        (folder / name).unlink(missing_ok=True)
    remove_leftovers(folder)


def _facts_path(folder: Path, number: int) -> Path:
    return folder / WORK_FOLDER / f"source-{number:05d}.json"
