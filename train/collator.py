"""Batches of cells: lays cells out, pads them, masks genes for pretraining and drops genes as augmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import get_worker_info

from screformer.train.cell_dataset import CellBatch
from screformer.train.packed_batches import can_pack, pack_cells

if TYPE_CHECKING:
    from screformer.configuration_screformer import ScReformerConfig

GeneSpace = Literal["full", "expressed"]
UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]
Integers = npt.NDArray[np.integer[Any]]
Booleans = npt.NDArray[np.bool_]
Row = Mapping[str, Any]

IGNORED_LABEL = -100

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_DROP_STREAM, _MASK_STREAM, _REPLACE_STREAM = np.uint64(1), np.uint64(2), np.uint64(3)
_BINS_PER_GENE = np.uint64(256)


class FlatCells(NamedTuple):
    """The expressed genes of a batch, cells end to end: two arrays of one length, and the genes of each cell."""

    gene_ids: Integers
    bins: Integers
    counts: Int64Array

    @property
    def starts(self) -> Int64Array:
        """Where each cell begins (num_cells,)."""
        return np.cumsum(self.counts) - self.counts


class CellCollator:
    """Turns corpus rows into the tensors that the models take.

    A row is a mapping with ``input_ids`` (bin ids) and ``gene_ids`` (vocabulary positions) of the expressed genes only;
    a `CellBatch` is many of them in a few arrays, and faster. The batch is a dict of int64 tensors, in memory of their
    own: a batch that is still in use never changes.

    - ``gene_space="full"``: ``input_ids`` (B, num_genes), bin 0 where a gene is not expressed; nothing else.
    - ``gene_space="expressed"``: ``input_ids``, ``gene_ids``, ``attention_mask`` (B, L), padded to the longest cell
      with ``pad_token_id``, gene 0 and 0.
    - ``labels``: (B, L) original bins of the masked genes and -100 elsewhere if `masked_fraction` is not 0; (B,) class
      ids if `label_column` is given; absent otherwise.

    Masking follows the paper (section 2.6): of each cell's expressed genes, `masked_fraction` (at least one) are
    predicted; each is replaced by the mask token with `replace_probability` and keeps its own bin otherwise.

    A gene's lot is a hash of (salt, the cell's content, the gene), so no global generator is touched, and the draw does
    not depend on the order of cells or genes. The salt follows from `seed` and

    - the epoch, for batches that a `CellBatchSampler` chose: a cell is masked anew in every epoch, and the same way
      whatever batch, process or loader's worker it falls to, and whether the run was interrupted before;
    - nothing else with ``deterministic=True``: the same masks in every epoch, so that held-out losses can be compared;
    - a private random stream for all other rows.

    Cells of a batch that do not count (see `BatchOfCells`) have labels of -100 only.

    Parameters
    ----------
    pad_token_id, mask_token_id, num_genes
        As in the tokenizer and the model's config.
    gene_space
        How a cell is laid out.
    masked_fraction
        Share of the expressed genes to predict; 0 masks nothing, the paper has 0.15.
    replace_probability
        Share of the masked genes that the model sees as the mask token.
    gene_dropout
        Augmentation: expected share of a cell's expressed genes to remove (they become bin 0, or leave the cell).
    label_column
        Row key that holds the class, for classification.
    label2id
        Class name -> id; without it the column holds ids.
    seed
        Fixes every draw. For rows of no known epoch data-loader workers derive their own streams from it and from their
        worker seed.
    deterministic
        The same masks for the same cell every time.
    packed
        For ``gene_space="full"``: batches hold the expressed genes alone, for the device to lay out; see
        `packed_batches.expand_batch`.

    Raises
    ------
    ValueError
        An option is out of its range, `packed` without the full gene space or for too many genes, a cell has no
        expressed gene, a gene or bin id does not fit the model, or a label is not in `label2id`.
    """

    def __init__(
        self,
        pad_token_id: int,
        mask_token_id: int,
        num_genes: int,
        *,
        gene_space: GeneSpace = "full",
        masked_fraction: float = 0.0,
        replace_probability: float = 0.9,
        gene_dropout: float = 0.0,
        label_column: str | None = None,
        label2id: Mapping[str, int] | None = None,
        seed: int = 0,
        deterministic: bool = False,
        packed: bool = False,
    ) -> None:
        if gene_space not in ("full", "expressed"):
            raise ValueError(f"gene_space must be 'full' or 'expressed', got {gene_space!r}")
        _check_range("masked_fraction", masked_fraction, below=False)
        _check_range("replace_probability", replace_probability, below=False)
        _check_range("gene_dropout", gene_dropout, below=True)
        if masked_fraction and label_column is not None:
            raise ValueError(
                f"masked_fraction={masked_fraction} and label_column={label_column!r} both ask for labels; "
                "set masked_fraction=0 for classification, or leave label_column out for pretraining"
            )
        self.pad_token_id = pad_token_id
        self.mask_token_id = mask_token_id
        self.num_genes = num_genes
        self.gene_space = gene_space
        self.masked_fraction = masked_fraction
        self.replace_probability = replace_probability
        self.gene_dropout = gene_dropout
        self.label_column = label_column
        self.label2id = None if label2id is None else dict(label2id)
        self.seed = seed
        self.deterministic = deterministic
        self.packed = packed
        if packed and not self.can_pack:
            raise ValueError(
                f"packed=True needs gene_space='full' (got {gene_space!r}), at most 32,768 genes and 128 tokens (got "
                f"{num_genes} and {mask_token_id + 1}); leave it out"
            )
        self._generator: np.random.Generator | None = None
        self._scratch: npt.NDArray[np.int16] | None = None

    @classmethod
    def from_config(cls, config: ScReformerConfig, **options: Any) -> CellCollator:
        """Return the collator for a model: token ids, genes and gene space from its config, the rest from `options`."""
        assert config.pad_token_id is not None
        assert config.mask_token_id is not None
        return cls(
            config.pad_token_id,
            config.mask_token_id,
            config.num_genes,
            **{"gene_space": config.gene_space, **options},
        )

    @property
    def can_pack(self) -> bool:
        """Whether batches can be packed."""
        return self.gene_space == "full" and can_pack(self.num_genes, max(self.pad_token_id, self.mask_token_id) + 1)

    def __call__(self, rows: Sequence[Row] | CellBatch) -> dict[str, torch.Tensor]:
        """Return the batch of `rows`, in their order."""
        cells = _flatten(rows)
        self._check_ids(cells)
        counted = rows.num_counted if isinstance(rows, CellBatch) else None
        epoch = rows.epoch if isinstance(rows, CellBatch) else None
        lots = self._draw_lots(cells, epoch) if self.masked_fraction or self.gene_dropout else None
        if lots is not None and self.gene_dropout:
            kept = _keep_genes(cells, lots, self.gene_dropout)
            counts = np.add.reduceat(kept, cells.starts, dtype=np.int64)
            cells, lots = FlatCells(cells.gene_ids[kept], cells.bins[kept], counts), lots[kept]
        tokens, targets = cells.bins, None
        if lots is not None and self.masked_fraction:
            tokens, targets = self._mask(cells, lots)
        if self.packed:
            batch = pack_cells(cells.counts, cells.gene_ids, tokens, targets)
        elif self.gene_space == "full":
            batch = self._lay_out_full(cells, tokens, targets)
        else:
            batch = self._lay_out_expressed(cells, tokens, targets)
        if self.label_column is not None:
            batch["labels"] = torch.from_numpy(self._class_ids(rows))
        if counted is not None and "labels" in batch:
            is_flat = self.packed and targets is not None
            batch["labels"][int(cells.counts[:counted].sum()) if is_flat else counted :] = IGNORED_LABEL
        return batch

    def __getstate__(self) -> dict[str, Any]:  # Any: attributes
        return {**self.__dict__, "_scratch": None}

    def _check_ids(self, cells: FlatCells) -> None:
        for name, values, low, high, origin in (
            ("gene_ids", cells.gene_ids, 0, self.num_genes - 1, "num_genes - 1"),
            ("input_ids", cells.bins, 1, self.pad_token_id - 1, "pad_token_id - 1"),
        ):
            if values.min() < low or values.max() > high:
                raise ValueError(
                    f"{name} of expressed genes must lie between {low} and {origin} = {high}, got {values.min()} to "
                    f"{values.max()}; these cells were tokenized by another tokenizer than the model's"
                )

    def _draw_lots(self, cells: FlatCells, epoch: int | None) -> UInt64Array:
        """Return one random 64-bit number a gene, from the salt, the content of its cell and the gene."""
        genes = cells.gene_ids.astype(np.uint64)
        lots = genes * _BINS_PER_GENE
        lots += cells.bins.astype(np.uint64)
        content = np.add.reduceat(_mix_in_place(lots), cells.starts)
        content ^= self._salt(epoch)
        genes += np.repeat(_mix_in_place(content), cells.counts)
        return _mix_in_place(genes)

    def _salt(self, epoch: int | None) -> np.uint64:
        of_seed = _mix(np.array([self.seed], dtype=np.uint64))
        if self.deterministic:
            return of_seed[0]
        if epoch is not None:
            # Of no epoch it is that of the deterministic masks.
            return _mix_in_place(of_seed ^ np.uint64(epoch + 1))[0]
        if self._generator is None:
            worker = get_worker_info()
            entropy = [self.seed] if worker is None else [self.seed, worker.seed]
            self._generator = np.random.default_rng(entropy)
        return self._generator.integers(2**64, dtype=np.uint64)

    def _mask(self, cells: FlatCells, lots: UInt64Array) -> tuple[Integers, Integers]:
        """Return what the model sees and what it must predict, gene by gene."""
        wanted = np.maximum(1, np.rint(cells.counts * self.masked_fraction)).astype(np.int64)
        masked = np.flatnonzero(_lowest_of_each_cell(cells, _mix(lots ^ _MASK_STREAM), wanted))
        is_replaced = _chance(_mix_in_place(lots[masked] ^ _REPLACE_STREAM), self.replace_probability)
        tokens, targets = cells.bins.astype(np.int16), np.full(len(cells.bins), IGNORED_LABEL, dtype=np.int16)
        targets[masked] = tokens[masked]
        tokens[masked[is_replaced]] = self.mask_token_id
        return tokens, targets

    def _lay_out_full(self, cells: FlatCells, tokens: Integers, targets: Integers | None) -> dict[str, torch.Tensor]:
        num_cells = len(cells.counts)
        places = np.repeat(np.arange(num_cells) * self.num_genes, cells.counts)
        places += cells.gene_ids

        def spread(values: Integers, fill: int) -> torch.Tensor:
            # Scattered in a small buffer that stays in the cache and never leaves this object; the tensor is a copy.
            size = num_cells * self.num_genes
            if self._scratch is None or len(self._scratch) < size:
                self._scratch = np.empty(size, dtype=np.int16)
            flat = self._scratch[:size]
            flat.fill(fill)
            flat[places] = values
            return torch.from_numpy(flat.astype(np.int64).reshape(num_cells, self.num_genes))

        batch = {"input_ids": spread(tokens, 0)}
        if targets is not None:
            batch["labels"] = spread(targets, IGNORED_LABEL)
        return batch

    def _lay_out_expressed(
        self, cells: FlatCells, tokens: Integers, targets: Integers | None
    ) -> dict[str, torch.Tensor]:
        shape = len(cells.counts), int(cells.counts.max())
        bounds = list(zip(cells.starts.tolist(), cells.counts.tolist(), strict=True))

        def pad(values: Integers, fill: int) -> torch.Tensor:
            padded = np.empty(shape, dtype=np.int64)
            for row, (start, count) in zip(padded, bounds, strict=True):
                row[:count] = values[start : start + count]
                row[count:] = fill
            return torch.from_numpy(padded)

        is_gene = np.arange(shape[1]) < cells.counts[:, None]
        batch = {
            "input_ids": pad(tokens, self.pad_token_id),
            "gene_ids": pad(cells.gene_ids, 0),
            "attention_mask": torch.from_numpy(is_gene.astype(np.int64)),
        }
        if targets is not None:
            batch["labels"] = pad(targets, IGNORED_LABEL)
        return batch

    def _class_ids(self, rows: Sequence[Row] | CellBatch) -> Int64Array:
        assert self.label_column is not None
        lacking = [rows.columns] if isinstance(rows, CellBatch) else rows
        missing = next((row for row in lacking if self.label_column not in row), None)
        if missing is not None:
            raise ValueError(
                f"label_column={self.label_column!r} is not in the row; it has {sorted(missing)}. "
                "Build the corpus with that obs column, or name another one"
            )
        labels: list[Any] = []  # Any: names or ids
        if isinstance(rows, CellBatch):
            labels.extend(rows.columns[self.label_column])
        else:
            labels.extend(row[self.label_column] for row in rows)
        if self.label2id is None:
            return np.asarray(labels, dtype=np.int64)
        unknown = sorted({str(label) for label in labels if label not in self.label2id})
        if unknown:
            raise ValueError(f"label2id has no {unknown}; it knows {sorted(self.label2id)}. Drop these cells first")
        return np.array([self.label2id[label] for label in labels], dtype=np.int64)


def _check_range(name: str, value: float, *, below: bool) -> None:
    if not (0 <= value < 1 or (value == 1 and not below)):
        raise ValueError(f"{name} must be at least 0 and {'below' if below else 'at most'} 1, got {value}")


def _flatten(rows: Sequence[Row] | CellBatch) -> FlatCells:
    cells = FlatCells(rows.gene_ids, rows.input_ids, rows.counts) if isinstance(rows, CellBatch) else _concatenate(rows)
    if not cells.counts.all():
        raise ValueError(
            f"row {int(np.flatnonzero(cells.counts == 0)[0])} of the batch has no expressed gene; "
            "remove empty cells before training or annotation"
        )
    return cells


def _concatenate(rows: Sequence[Row]) -> FlatCells:
    gene_lists = [np.asarray(row["gene_ids"]) for row in rows]
    bin_lists = [np.asarray(row["input_ids"]) for row in rows]
    counts = np.array([len(genes) for genes in gene_lists], dtype=np.int64)
    unequal = np.flatnonzero(counts != [len(bins) for bins in bin_lists])
    if len(unequal):
        at = int(unequal[0])
        raise ValueError(
            f"row {at} of the batch has {len(bin_lists[at])} input_ids and {counts[at]} gene_ids; "
            "they must be parallel lists of the expressed genes"
        )
    gene_ids, bins = (
        np.concatenate([values for values in lists if len(values)] or [np.empty(0, dtype=np.int64)])
        for lists in (gene_lists, bin_lists)
    )
    return FlatCells(gene_ids, bins, counts)


def _mix(values: UInt64Array) -> UInt64Array:
    """Return splitmix64 (Steele et al. 2014) of each value: a bijection whose output looks uniform."""
    return _mix_in_place(values.copy())


def _mix_in_place(values: UInt64Array) -> UInt64Array:
    """Do what `_mix` does to `values` themselves, and return them."""
    shifted = np.empty_like(values)
    values += _GOLDEN_RATIO
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        values ^= np.right_shift(values, np.uint64(shift), out=shifted)
        values *= factor
    values ^= np.right_shift(values, np.uint64(31), out=shifted)
    return values


def _chance(lots: UInt64Array, probability: float) -> npt.NDArray[np.bool_]:
    """Return True with `probability`, decided by the lots; 53 bits, as a float64 has."""
    return (lots >> np.uint64(11)) < np.uint64(round(probability * 2**53))


def _keep_genes(cells: FlatCells, lots: UInt64Array, gene_dropout: float) -> Booleans:
    own_lots = _mix(lots ^ _DROP_STREAM)
    # No cell may become empty: the gene that leads its cell's draw always stays.
    leading = np.repeat(np.minimum.reduceat(own_lots, cells.starts), cells.counts)
    return ~_chance(own_lots, gene_dropout) | (own_lots <= leading)


def _lowest_of_each_cell(cells: FlatCells, lots: UInt64Array, wanted: Int64Array) -> Booleans:
    """Return True for the `wanted[cell]` genes of each cell with the lowest lots (ties: a chance of 2**-64)."""
    thresholds = np.empty(len(wanted), dtype=np.uint64)
    bounds = zip(cells.starts.tolist(), cells.counts.tolist(), wanted.tolist(), strict=True)
    for place, (start, count, number) in enumerate(bounds):
        thresholds[place] = np.partition(lots[start : start + count], number - 1)[number - 1]
    return lots <= np.repeat(thresholds, cells.counts)
