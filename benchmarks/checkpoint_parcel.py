"""What the making of a base checkpoint takes along to a GPU machine without a network: one zip file.

In it: the corpus that pretrains, without any cell of the sets that test; gene vectors of that corpus; and the test
sets, each as an h5ad and as a corpus with its labels, and its donors or folds.
"""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from screformer.benchmarks.fine_tuning_tasks import Task, deal_into_folds, make_task
from screformer.benchmarks.suites import CellsToCompareOn
from screformer.configuration_screformer import ScReformerConfig
from screformer.tokenization import ScReformerTokenizer, build_corpus, open_corpus
from screformer.tokenization.corpus_files import checksum
from screformer.tokenization.corpus_split import HoldOut
from screformer.tokenization.gene2vec import save_gene_vectors
from screformer.tokenization.overlap import find_seen_cells
from screformer.tokenization.own_gene2vec import gene2vec_of_corpus
from screformer.train.corpus_columns import read_column
from screformer.train.result_files import read_json, software_versions, write_json, written_aside

Json = dict[str, Any]
MAX_BYTES = 64 * 2**20
KNOWN_SOURCES = "checkpoint_sources.json"
FACTS, CORPUS, VECTORS = "parcel.json", "corpus", "gene2vec.safetensors"
HELD_OUT = HoldOut(0.1, "cell", 2022)


class Parcel(NamedTuple):
    """An unpacked parcel.

    Attributes
    ----------
    folder
        Where it lies.
    tasks
        Labelled cells that test.
    facts
        Content of its ``parcel.json``: ``preset``, ``sources``, ``tasks``, ``num_pretraining_cells``, ``versions``.
    """

    folder: Path
    tasks: list[Task]
    facts: Json

    @property
    def corpus(self) -> Path:
        """The cells that pretrain."""
        return self.folder / CORPUS

    @property
    def gene_vectors(self) -> Path:
        """Vectors of their genes."""
        return self.folder / VECTORS


def prepare_parcel(
    cells: Sequence[str | Path],
    tests: Sequence[str],
    output: str | Path,
    *,
    preset: str,
    work: str | Path,
    data_sources: str | Path | None = None,
    max_bytes: int = MAX_BYTES,
) -> Json:
    """Write the zip file `output` and return its facts; what is in `work` is not made twice.

    Parameters
    ----------
    cells
        Files of raw counts that pretrain.
    tests
        ``FILE[:LABELS[:DONORS]]`` of labelled cells that test; without donors they are dealt into five folds. None of
        their cells may be among `cells`.
    output
        Zip file.
    preset
        Whose width the gene vectors have.
    work
        Folder for what goes into it.
    data_sources
        JSON file: name of a file of cells, without its ending -> ``citation``, ``origin``, ``licence``, and ``sha256``,
        a list of those that files of this name may have, if it matters; for the card. Default: the public files of
        ``checkpoint_sources.json``.
    max_bytes
        The zip file's most.

    Raises
    ------
    ValueError
        A cell that tests is among those that pretrain, two tests have one name, `work` has a corpus of other cells, or
        the zip file is too large.
    OSError
        A file is not there.
    """
    folder = Path(work)
    folder.mkdir(parents=True, exist_ok=True)
    named = read_json(data_sources or Path(__file__).with_name(KNOWN_SOURCES))
    tasks = [_make_test(CellsToCompareOn.parse(text), folder) for text in tests]
    if not tasks or len({task.name for task in tasks}) < len(tasks):
        raise ValueError(f"tests got {list(tests)}; at least one file is needed, and no two of one name")
    corpus = build_corpus(cells, folder / CORPUS, tokenizer=ScReformerTokenizer(), hold_out=HELD_OUT)
    for task in tasks:
        seen = find_seen_cells(task.cells, folder / CORPUS)
        if seen.num_seen:
            raise ValueError(
                f"{seen.num_seen} of {seen.num_cells} cells of {task.name}, which test, are among the cells that "
                f"pretrain; leave their file out of cells, and delete {folder / CORPUS}"
            )
    size = ScReformerConfig.preset(preset).hidden_size
    vectors = folder / f"gene2vec-{size}.safetensors"  # of this corpus: the folder takes no other
    if not vectors.exists():
        save_gene_vectors(gene2vec_of_corpus(corpus, num_dimensions=size), vectors)
    sources = [
        {"num_cells": source["num_kept"], **_named(named, Path(source["name"]).stem, source["sha256"])}
        for source in corpus.manifest["sources"]
    ]
    facts: Json = {
        "date": date.today().isoformat(),
        "preset": preset,
        "num_pretraining_cells": len(corpus.training),
        "num_held_out_cells": len(corpus.held_out),
        "sources": sources,
        "test_sources": [
            _named(named, Path(one.path).stem, checksum(Path(one.path))) for one in map(CellsToCompareOn.parse, tests)
        ],
        "tasks": [_facts_of(task, folder) for task in tasks],
        "versions": software_versions(),
    }
    write_json(folder / FACTS, facts)
    return {**facts, "num_bytes": _pack(folder, vectors, Path(output), max_bytes)}


def _named(known: Json, name: str, sha256: str) -> Json:
    """Return a file's name and what is known of where it comes from; nothing of another file of the same name."""
    found = known.get(name, {})
    return {"name": name, **(found if sha256 in found.get("sha256", [sha256]) else {}), "sha256": sha256}


def _make_test(cells: CellsToCompareOn, work: Path) -> Task:
    """Copy or deal a file's cells, and make their corpus, in a folder whose name no other file or columns share."""
    source, column = Path(cells.path), cells.group_column
    named = "-".join([checksum(source)[:12], cells.label_column, column or "fold"])
    folder = work / f"{source.stem}-{re.sub(r'[^A-Za-z0-9_-]', '_', named)}"
    copy = folder / source.name
    if not copy.exists():
        if column is None:
            deal_into_folds(source, copy, label_column=cells.label_column)
        else:
            with written_aside(copy) as aside:
                shutil.copyfile(source, aside)
    return make_task(source.stem, copy, folder, column or "fold", label_column=cells.label_column)


def _facts_of(task: Task, folder: Path) -> Json:
    inside = {name: Path(getattr(task, name)).relative_to(folder).as_posix() for name in ("cells", "corpus")}
    corpus = open_corpus(task.corpus)
    labels = read_column(corpus, task.label_column, argument="label_column")
    return {**task._asdict(), **inside, "num_cells": len(labels)}


def _pack(folder: Path, vectors: Path, output: Path, max_bytes: int) -> int:
    """Write the zip file, unless it is larger than it may be; return its size."""
    output.parent.mkdir(parents=True, exist_ok=True)
    facts = read_json(folder / FACTS)
    kept = [FACTS, CORPUS, *(task[name] for task in facts["tasks"] for name in ("cells", "corpus"))]
    with written_aside(output) as aside:
        with zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
            file.write(vectors, VECTORS)
            for name in kept:
                place = folder / name
                for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
                    if path.is_file():
                        file.write(path, path.relative_to(folder).as_posix())
        size = aside.stat().st_size
        if size > max_bytes:
            raise ValueError(
                f"output: the parcel has {size / 2**20:.1f} MiB, and at most {max_bytes / 2**20:.0f} may travel; leave "
                "out files of cells, or give another max_bytes (--max-mib)"
            )
    return size


def open_parcel(path: str | Path, work: str | Path) -> Parcel:
    """Unpack a parcel into ``work/parcel``, unless it is there, and return it.

    Raises
    ------
    OSError
        There is no such file.
    ValueError
        It is no parcel, or `work` has another one.
    """
    source, folder = Path(path), Path(work, "parcel")
    try:
        with zipfile.ZipFile(source) as file:
            facts = json.loads(file.read(FACTS))
            if not folder.exists():
                aside = folder.with_name("parcel.partial")
                shutil.rmtree(aside, ignore_errors=True)
                file.extractall(aside)
                aside.rename(folder)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ValueError(f"parcel: {source} is none ({error}); make one with `prepare`") from error
    if read_json(folder / FACTS) != facts:
        raise ValueError(f"work: {folder} holds another parcel than {source}; choose another folder")
    tasks = [_task_of(task, folder) for task in facts["tasks"]]
    return Parcel(folder, tasks, facts)


def _task_of(facts: Json, folder: Path) -> Task:
    known = {name: facts[name] for name in Task._fields}
    known |= {name: str(folder / facts[name]) for name in ("cells", "corpus")}
    known |= {name: tuple(facts[name]) for name in ("groups", "rare_labels")}
    return Task(**known)
