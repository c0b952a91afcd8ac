"""Cells of types that a classifier was not taught, found by the cells' own genes.

A softmax shares out one among the types that it knows, whatever the cell. Here a cell is looked at twice:

1. *No type claims it.* A logistic regression for each type against all others, on principal components: a cell of an
   unknown type may be refused by all of them (Shu et al. 2017). This tells apart what has little of any type, such as
   alpha and beta cells.
2. *It has a gene of its own.* How far the gene that stands out most lies above its mean in every known type. This finds
   what resembles a known type and has a marker more, such as two kinds of stellate cells.

Each is turned into the share of known cells that look at least as strange, known cells being training cells of a donor
that the fit had not seen; both shares are combined by Fisher's sum of logarithms, and the sum becomes such a share
again: a conformal p-value (Bates et al. 2023).

`screformer benchmark unknown-types` measures it beside the softmax and everything else that was tried.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from scipy import sparse
from sklearn.linear_model import LogisticRegression

from screformer.benchmarks.simple_baselines import inner_folds
from screformer.tokenization.corpus import Corpus
from screformer.tokenization.tokenization_screformer import TokenizedCells
from screformer.train.cell_dataset import CellBatch, CellDataset
from screformer.train.component_regression import MAX_ITERATIONS, component_projections
from screformer.train.expression_levels import as_levels, read_levels
from screformer.train.inference import Rows
from screformer.train.labelled_cells import LabelledCells, draw_at_most
from screformer.train.result_files import written_aside

logger = logging.getLogger(__name__)

UNKNOWN_TYPES_FILE = "unknown_types.safetensors"
FORMAT, FACTS = "screformer unknown types 1", "unknown_types"
NUM_COMPONENTS, INVERSE_STRENGTH = 128, 0.1
MAX_CELLS, CELLS_OF_EACH_TYPE = 5_000, 50
# A known cell says how strange known cells look only if its type was there to be learned.
CELLS_TO_LEARN_FROM, MIN_KNOWN_CELLS = 5, 20
CELLS_AT_ONCE = 1024

FloatArray = npt.NDArray[np.float64]
Strings = npt.NDArray[np.str_]


class Strangeness(NamedTuple):
    """Two measures of cells, both (cells,): higher is stranger. NaN for a cell without genes.

    Attributes
    ----------
    refusal
        Minus the largest of the types' logits, each type against the rest.
    excess
        Level of the gene that stands out most, less its highest mean in a known type; a level is a bin as a share of
        the highest bin.
    """

    refusal: FloatArray
    excess: FloatArray


class TypeProfiles(NamedTuple):
    """What is remembered of known types.

    Attributes
    ----------
    weights, biases
        float32 (genes, types) and (types,): logits of each type against the rest, of levels.
    highest_means
        float32 (genes,): the highest of the types' mean levels.
    """

    weights: npt.NDArray[np.float32]
    biases: npt.NDArray[np.float32]
    highest_means: npt.NDArray[np.float32]

    def measure(self, levels: sparse.csr_array) -> Strangeness:
        """Return both measures of cells, levels (cells, genes); each cell's do not depend on the others."""
        # A sparse product adds up row by row, in the same order whatever the other rows.
        refusal = -(levels @ self.weights.astype(np.float64) + self.biases).max(axis=1)
        excess = np.full(levels.shape[0], np.nan)
        has_genes = np.diff(levels.indptr) > 0
        if has_genes.any():
            above = levels.data - self.highest_means[levels.indices]
            excess[has_genes] = np.maximum.reduceat(above, levels.indptr[:-1][has_genes])
        return Strangeness(np.where(has_genes, refusal, np.nan), excess)


@dataclass(frozen=True, eq=False)
class UnknownTypeDetector:
    """Says how strange a cell is to a classifier's types, from its tokens alone; see `fit_unknown_types`.

    Attributes
    ----------
    labels
        The known types.
    num_bins
        Of the tokenizer.
    profiles
        Of these types.
    known
        Measures of the known cells, each ascending by itself.
    known_sums
        Their combined strangeness, ascending.
    """

    labels: tuple[str, ...]
    num_bins: int
    profiles: TypeProfiles
    known: Strangeness
    known_sums: FloatArray

    def score(self, cells: TokenizedCells | Rows) -> npt.NDArray[np.float32]:
        """Return the share of known cells that look at least as strange, (cells,), above 0 and at most 1.

        Cells of other types than the classifier's crowd near 0. Whoever calls cells below 0.01 unknown errs for at most
        one in a hundred cells of known types, as far as these differ from the training cells like one training donor
        from the others; for fewer, as known cells were scored by fits to fewer donors. The least value is 1 / (1 +
        known cells). A cell's score depends on its own tokens alone. NaN for a cell without genes.

        Parameters
        ----------
        cells
            As the tokenizer or a corpus gives them: `TokenizedCells`, a `CellDataset`, or rows with ``input_ids`` and
            ``gene_ids`` of the expressed genes.

        Raises
        ------
        ValueError
            A gene or a bin is not one of the tokenizer that the detector was fitted with.
        """
        scores = [self.score_levels(levels) for levels in _blocks_of_levels(cells, self.num_genes, self.num_bins)]
        return np.concatenate([np.empty(0, np.float32), *scores])

    @property
    def fingerprint(self) -> str:
        """Hash of what known cells look like to it; another fit has another."""
        return hashlib.sha256(np.ascontiguousarray(self.known_sums).tobytes()).hexdigest()[:16]

    @property
    def num_genes(self) -> int:
        """Of the tokenizer."""
        return len(self.profiles.highest_means)

    def score_levels(self, levels: sparse.csr_array) -> npt.NDArray[np.float32]:
        """Return the same of levels, float32 (cells, genes), as `as_levels` makes them."""
        measured = self.profiles.measure(levels)
        shares = [_share_at_least(known, each) for known, each in zip(self.known, measured, strict=True)]
        scores = _share_at_least(self.known_sums, -np.log(shares).sum(axis=0))
        return np.where(np.isnan(measured.excess), np.nan, scores).astype(np.float32)

    def save(self, folder: str | Path) -> Path:
        """Write ``unknown_types.safetensors`` beside a checkpoint, whole or not at all, and return its path."""
        tensors = {**self.profiles._asdict(), **self.known._asdict(), "known_sums": self.known_sums}
        # One entry: several would be written in any order, and the same detector as other bytes.
        facts = {FACTS: json.dumps({"format": FORMAT, "labels": self.labels, "num_bins": self.num_bins})}
        path = Path(folder) / UNKNOWN_TYPES_FILE
        with written_aside(path) as aside:
            save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, aside, metadata=facts)
        return path

    @classmethod
    def from_pretrained(cls, model: str | Path) -> UnknownTypeDetector | None:
        """Return the detector of a checkpoint, a folder or a Hub id; None if it has none.

        Raises
        ------
        OSError
            There is no such repository within reach.
        ValueError
            The file is damaged or of another kind.
        """
        path = Path(model) / UNKNOWN_TYPES_FILE
        if not path.exists():
            if Path(model).is_dir():
                return None
            try:
                path = Path(hf_hub_download(str(model), UNKNOWN_TYPES_FILE))
            except EntryNotFoundError:
                return None
        return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> UnknownTypeDetector:
        try:
            with safe_open(path, framework="numpy") as file:
                facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except SafetensorError as error:
            raise ValueError(f"model: {path} is damaged ({error}); {REMEDY}") from error
        names = {*TypeProfiles._fields, *Strangeness._fields, "known_sums"}
        if facts.get("format") != FORMAT or set(tensors) != names:
            raise ValueError(
                f"model: {path} has the format {facts.get('format')!r} and the tensors {sorted(tensors)}; {FORMAT!r} "
                f"and {sorted(names)} are needed. {REMEDY}"
            )
        return cls(
            tuple(facts["labels"]),
            facts["num_bins"],
            TypeProfiles(*(tensors[name] for name in TypeProfiles._fields)),
            Strangeness(*(tensors[name] for name in Strangeness._fields)),
            tensors["known_sums"],
        )


REMEDY = "Restore the file of the training, or remove it to do without"


def fit_unknown_types(
    levels: sparse.csr_array,
    labels: Sequence[str] | Strings,
    *,
    groups: Sequence[str] | Strings | None = None,
    num_bins: int,
    seed: int = 0,
) -> UnknownTypeDetector:
    """Return a detector of cells whose type is none of `labels`.

    How strange known cells look is learned by cross-validation: whole groups are held out if there are two, else cells.
    Held-out cells whose type has fewer than five others to learn from are not counted.

    Parameters
    ----------
    levels
        (cells, genes), as `read_levels` gives them: of the cells that train the classifier.
    labels
        Type of each cell.
    groups
        Donor or data set of each cell.
    num_bins
        Of the tokenizer.
    seed
        Fixes the decompositions, and the folds of cells.

    Raises
    ------
    ValueError
        There are fewer than two types, three cells or genes, or twenty cells that could be held out.
    """
    levels = levels.astype(np.float32)  # a third of the time
    names = np.asarray(labels, dtype=np.str_)
    present, class_ids = np.unique(names, return_inverse=True)
    if len(present) < 2 or min(levels.shape) < 3:
        raise ValueError(
            f"labels has {len(present)} types, levels have shape {levels.shape}; at least two types, and three cells "
            "and genes, are needed"
        )
    known = _measure_held_out(levels, class_ids, inner_folds(class_ids, groups, seed), seed)
    if len(known.excess) < MIN_KNOWN_CELLS and groups is not None:
        # Types that are each in one group only can be learned from cells of the same group alone.
        known = _measure_held_out(levels, class_ids, inner_folds(class_ids, None, seed), seed)
    if len(known.excess) < MIN_KNOWN_CELLS:
        raise ValueError(
            f"labels: {len(known.excess)} cells could be held out and have {CELLS_TO_LEARN_FROM} others of their type "
            f"to learn from; {MIN_KNOWN_CELLS} are needed. Label more cells of each type"
        )
    # Each among the others: without itself a known cell meets as many as a new cell does.
    shares = [_share_at_least(np.sort(each), each, is_among=True) for each in known]
    return UnknownTypeDetector(
        tuple(present.tolist()),
        num_bins,
        _learn_profiles(levels, class_ids, seed),
        Strangeness(*map(np.sort, known)),
        np.sort(-np.log(shares).sum(axis=0)),
    )


def write_unknown_types(
    folder: str | Path,
    corpus: Corpus,
    cells: LabelledCells,
    labels: Sequence[str],
    *,
    seed: int,
    is_resumed: bool = False,
) -> None:
    """Fit a detector to the training cells, at most some thousand of them, and write it.

    Too few cells are no error: a logged warning says so, and there is no detector.

    Parameters
    ----------
    folder
        Of the checkpoint.
    corpus, cells
        Their training part is fitted to.
    labels
        The classifier's classes; training cells with another label of a tree are left out.
    seed
        Fixes which cells are taken of many, and the fit.
    is_resumed
        Whether to keep what an earlier part of the same run has written.
    """
    if is_resumed and (Path(folder) / UNKNOWN_TYPES_FILE).exists():
        return
    (Path(folder) / UNKNOWN_TYPES_FILE).unlink(missing_ok=True)
    train = cells.split.train[np.isin(cells.labels[cells.split.train], list(labels))]
    train = draw_at_most(train, cells.labels, MAX_CELLS, of_each=CELLS_OF_EACH_TYPE, seed=seed)
    tokenizer = corpus.tokenizer()
    levels = read_levels(corpus, cells.rows[train], tokenizer.num_genes, tokenizer.num_bins)
    groups = None if cells.groups is None else cells.groups[train]
    try:
        detector = fit_unknown_types(levels, cells.labels[train], groups=groups, num_bins=tokenizer.num_bins, seed=seed)
    except ValueError as error:
        logger.warning("the checkpoint gets no detector of unknown types: %s", error)
        return
    detector.save(folder)
    logger.info("a detector of unknown types was fitted to %d cells", len(train))


def _measure_held_out(
    levels: sparse.csr_array, class_ids: npt.NDArray[np.int64], folds: npt.NDArray[np.int64], seed: int
) -> Strangeness:
    """Return the measures of the cells that can be held out, fold after fold."""
    measured = [Strangeness(np.empty(0), np.empty(0))]
    for fold in np.unique(folds):
        kept = folds != fold
        numbers = np.bincount(class_ids[kept], minlength=class_ids.max() + 1)
        held_out = ~kept & (numbers[class_ids] >= CELLS_TO_LEARN_FROM) & (np.diff(levels.indptr) > 0)
        if held_out.any() and (numbers > 0).sum() > 1:
            measured.append(_learn_profiles(levels[kept], class_ids[kept], seed).measure(levels[held_out]))
    return Strangeness(*map(np.concatenate, zip(*measured, strict=True)))


def _learn_profiles(levels: sparse.csr_array, class_ids: npt.NDArray[np.int64], seed: int) -> TypeProfiles:
    num_components = min(NUM_COMPONENTS, min(levels.shape) - 1)
    projection = next(component_projections(levels, [num_components], seed))
    weights, biases, means = [], [], []
    for class_id in np.unique(class_ids):
        is_of_type = class_ids == class_id
        model = LogisticRegression(C=INVERSE_STRENGTH, class_weight="balanced", max_iter=MAX_ITERATIONS)
        model.fit(projection.cells, is_of_type)
        weights.append(projection.gene_weights @ model.coef_[0])
        biases.append(model.intercept_[0] - model.coef_[0] @ projection.center)
        means.append(np.asarray(levels[is_of_type].mean(axis=0)).ravel())
    return TypeProfiles(
        np.stack(weights, axis=1).astype(np.float32),
        np.array(biases, dtype=np.float32),
        np.max(means, axis=0).astype(np.float32),
    )


def _share_at_least(known: FloatArray, values: FloatArray, *, is_among: bool = False) -> FloatArray:
    """Return (1 + known cells that are as high) / (1 + known cells), without itself for a value that `is_among` them.

    NaN counts as the highest.
    """
    as_high = len(known) - np.searchsorted(known, values, side="left")
    return as_high / len(known) if is_among else (1 + as_high) / (1 + len(known))


def _blocks_of_levels(cells: TokenizedCells | Rows, num_genes: int, num_bins: int) -> Iterator[sparse.csr_array]:
    num_cells = len(cells.indptr) - 1 if isinstance(cells, TokenizedCells) else len(cells)
    for first in range(0, num_cells, CELLS_AT_ONCE):
        indptr, gene_ids, input_ids = _tokens(cells, first, min(first + CELLS_AT_ONCE, num_cells))
        if len(gene_ids) and (gene_ids.max() >= num_genes or not 1 <= input_ids.min() <= input_ids.max() < num_bins):
            raise ValueError(
                f"cells have genes up to {gene_ids.max()} and bins from {input_ids.min()} to {input_ids.max()}; the "
                f"detector knows {num_genes} genes from 0 and bins from 1 to {num_bins - 1}. Tokenize the cells with "
                "the checkpoint's own tokenizer, and give expressed genes only"
            )
        yield as_levels(indptr, gene_ids, input_ids, num_genes, num_bins).astype(np.float32)


def _tokens(
    cells: TokenizedCells | Rows, first: int, last: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16], npt.NDArray[np.uint8]]:
    """Return where each cell begins, and the genes and bins of cells end to end."""
    if isinstance(cells, TokenizedCells):
        indptr = cells.indptr[first : last + 1]
        tokens = slice(indptr[0], indptr[-1])
        return indptr - indptr[0], cells.gene_ids[tokens], cells.input_ids[tokens]
    if isinstance(cells, CellDataset):
        batch: CellBatch = cells.__getitems__(range(first, last))
        return np.concatenate([[0], np.cumsum(batch.counts)]), batch.gene_ids, batch.input_ids
    rows = [cells[place] for place in range(first, last)]
    gene_ids, input_ids = ([np.asarray(row[name]) for row in rows] for name in ("gene_ids", "input_ids"))
    indptr = np.concatenate([[0], np.cumsum([len(genes) for genes in gene_ids])])
    return indptr, np.concatenate(gene_ids), np.concatenate(input_ids)
