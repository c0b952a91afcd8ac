"""What a corpus is to be: its options, its sources, and whether a folder holds the same."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from tqdm.auto import tqdm

from screformer.tokenization.cell_filters import CellFilters
from screformer.tokenization.corpus_files import Manifest, checksum, checksum_of_files, files_under
from screformer.tokenization.corpus_shards import OWN_COLUMNS
from screformer.tokenization.corpus_split import CELL, FILE, HoldOut
from screformer.tokenization.passport_problems import check_allowed
from screformer.tokenization.tenx_file import find_tenx_files
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

FORMAT = "screformer-corpus"
VERSION = 2
# Version 1 has no cell hashes, no split and no report of dropped cells.
READABLE_VERSIONS = (1, 2)
TOKENIZER_OPTIONS = ("num_bins", "binning", "target_sum", "min_gene_coverage", "on_empty_cells")
PACKAGES = ("screformer", "anndata", "datasets", "h5py", "numpy", "pyarrow", "scipy")


@dataclass(frozen=True)
class CorpusOptions:
    """Everything that decides what is in a corpus, besides the files and the tokenizer; see `build_corpus`."""

    obs_columns: tuple[str, ...] = ()
    layer: str | None = None
    gene_column: str | None = None
    cells_per_shard: int = 50_000
    allow: tuple[str, ...] = ()
    filters: CellFilters = field(default_factory=CellFilters)
    hold_out: HoldOut | None = None

    def __post_init__(self) -> None:
        if self.cells_per_shard < 1:
            msg = f"cells_per_shard: at least 1, got {self.cells_per_shard}"
            raise ValueError(msg)
        check_allowed(self.allow)
        taken = [name for name in self.obs_columns if name in OWN_COLUMNS]
        if taken or len(set(self.obs_columns)) != len(self.obs_columns):
            msg = f"obs_columns: each name once, and none of {list(OWN_COLUMNS)}, got {list(self.obs_columns)}"
            raise ValueError(msg)
        if self.hold_out is not None and self.hold_out.by not in (CELL, FILE, *self.obs_columns):
            msg = (
                f"hold_out: by={self.hold_out.by!r} is neither {CELL!r} nor {FILE!r} nor a kept obs column "
                f"({list(self.obs_columns)}); add that column to obs_columns (--obs {self.hold_out.by})"
            )
            raise ValueError(msg)

    def to_dict(self) -> Manifest:
        """What decides the shards, as plain JSON values."""
        content = asdict(self)
        content.pop("hold_out")
        return json.loads(json.dumps(content))


def find_sources(paths: str | Path | Sequence[str | Path]) -> list[Path | str]:
    """Return files and folders as paths, addresses such as "s3://bucket/soma" as texts.

    Raises
    ------
    FileNotFoundError
        There is no such file or folder.
    ValueError
        There is none at all.
    """
    listed = [paths] if isinstance(paths, str | Path) else list(paths)
    if not listed:
        msg = "paths: at least one file of cells is needed, got none"
        raise ValueError(msg)
    sources: list[Path | str] = [str(path) if is_address(path) else Path(path) for path in listed]
    for source in sources:
        if isinstance(source, Path) and not source.exists():
            msg = f"paths: there is no file {source}"
            raise FileNotFoundError(msg)
    return sources


def is_address(path: str | Path) -> bool:
    """Whether a source is not on a file system."""
    return isinstance(path, str) and "://" in path


def describe_sources(sources: Sequence[Path | str]) -> list[Manifest]:
    """Return name and sha256 of each source: of the content of files, of the text of an address.

    The name is that of the file or folder, after as many folders above as make it unique among the sources.

    Raises
    ------
    ValueError
        Two have the same content, whatever they are called.
    """
    sizes = [file.stat().st_size for one in sources if isinstance(one, Path) for file in _files_of(one)]
    first_with: dict[str, Path | str] = {}
    described = []
    with tqdm(total=sum(sizes), desc="checksums", unit="B", unit_scale=True, disable=None) as bar:
        for source, name in zip(sources, _unique_names(sources), strict=True):
            entry: Manifest = {"name": name, "sha256": _checksum(source, bar.update)}
            if entry["sha256"] in first_with:
                msg = f"paths: {source} has the same content as {first_with[entry['sha256']]}; give each file once"
                raise ValueError(msg)
            first_with[entry["sha256"]] = source
            described.append(entry)
    return described


def _checksum(source: Path | str, advance: Callable[[int], object]) -> str:
    if isinstance(source, str):
        return hashlib.sha256(source.encode()).hexdigest()
    if source.is_dir() or _files_of(source) == [source]:
        return checksum(source, advance)
    return checksum_of_files(_files_of(source), source.parent, advance)


def _files_of(source: Path) -> list[Path]:
    """Return the files that a source is made of: a matrix.mtx is one with the tables beside it."""
    tenx = None if source.is_dir() else find_tenx_files(source)
    return files_under(source) if tenx is None else sorted(tenx)


def _unique_names(sources: Sequence[Path | str]) -> list[str]:
    parts = [source.absolute().parts if isinstance(source, Path) else (source,) for source in sources]
    depths = [1] * len(parts)
    while True:
        names = ["/".join(one[-depth:]) for one, depth in zip(parts, depths, strict=True)]
        counts = Counter(names)
        longer = [
            depth + (counts[name] > 1 and depth < len(one))
            for one, depth, name in zip(parts, depths, names, strict=True)
        ]
        if longer == depths:
            return names
        depths = longer


def make_plan(sources: Sequence[Path | str], tokenizer: ScReformerTokenizer, options: CorpusOptions) -> Manifest:
    """Return the manifest as far as it is known before anything is read: what two runs must share to be one."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": _describe_tokenizer(tokenizer),
        "options": options.to_dict(),
        "split": None if options.hold_out is None else asdict(options.hold_out),
        "sources": describe_sources(sources),
    }


def check_same(folder: Path, found: Manifest, plan: Manifest, *, is_finished: bool) -> None:
    """Refuse a folder whose corpus is not the planned one; one that is not finished may yet be split otherwise.

    Raises
    ------
    ValueError
        As said; the message names the differences.
    """
    differences = [
        f"{part} {key} {found[part].get(key)!r} there, {value!r} now"
        for part in ("tokenizer", "options")
        for key, value in plan[part].items()
        if found[part].get(key) != value
    ]
    if [source["sha256"] for source in found["sources"]] != [source["sha256"] for source in plan["sources"]]:
        names = [[source["name"] for source in one["sources"]] for one in (found, plan)]
        differences.append(f"files {names[0]} there, {names[1]} now (or their content)")
    rules = [_rule(one.get("split")) for one in (found, plan)]
    if is_finished and rules[0] != rules[1]:
        differences.append(f"hold_out {rules[0]} there, {rules[1]} now")
    if found["version"] != plan["version"]:
        differences.append(f"version {found['version']} there, {plan['version']} now")
    if differences:
        msg = (
            f"output: {folder} holds a corpus made otherwise: {'; '.join(differences)}. To start over, delete that "
            "folder or choose another output; to use it as it is, call open_corpus."
        )
        raise ValueError(msg)


def software_versions() -> Manifest:
    """Version of each package that has a part in a corpus."""
    return {package: version(package) for package in PACKAGES}


def _rule(split: Manifest | None) -> Manifest | None:
    return None if split is None else {key: split[key] for key in ("fraction", "by", "seed")}


def _describe_tokenizer(tokenizer: ScReformerTokenizer) -> Manifest:
    genes = json.dumps(tokenizer.gene_vocabulary.to_dict(), sort_keys=True).encode()
    return {
        "fingerprint": tokenizer.fingerprint,
        "vocabulary": tokenizer.gene_vocabulary.name,
        "vocabulary_sha256": hashlib.sha256(genes).hexdigest(),
        "num_genes": tokenizer.num_genes,
        **{name: getattr(tokenizer, name) for name in TOKENIZER_OPTIONS},
    }
