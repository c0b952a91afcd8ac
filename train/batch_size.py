"""``batch_size="auto"``: as many cells at once as the device's free memory holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import (
    ScReformerForCellClassification,
    ScReformerForMaskedLM,
    ScReformerPreTrainedModel,
)
from screformer.train.cell_dataset import CellBatch, CellDataset
from screformer.train.collator import GeneSpace
from screformer.train.memory import MOST_CELLS, BatchChoice, available_memory, largest_batch_size
from screformer.train.memory_account import Head

if TYPE_CHECKING:
    from screformer.train.arguments import ScReformerTrainingArguments

logger = logging.getLogger(__name__)

BatchSize = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"


def check_batch_size(batch_size: BatchSize) -> None:
    """Raise ValueError unless it is a number of cells, or ``"auto"``."""
    if batch_size == AUTO:
        return
    if isinstance(batch_size, str):
        raise ValueError(f"batch_size must be a number or 'auto', got {batch_size!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def read_batch_size(text: str) -> BatchSize:
    """Return what a command line gives as a batch size.

    Raises
    ------
    ValueError
        It is neither a number nor ``auto``.
    """
    batch_size: BatchSize = int(text) if text.isdecimal() else text  # type: ignore[assignment]
    check_batch_size(batch_size)
    return batch_size


def choose_inference_batch_size(
    model: ScReformerPreTrainedModel, *, num_tokens: int, most: int = MOST_CELLS
) -> BatchChoice:
    """Return the largest batch of cells of `num_tokens` that fits beside the model, and log it.

    Raises
    ------
    ValueError
        Not even one cell fits, or the free memory of the model's device is not known.
    """
    choice = largest_batch_size(
        model.config, num_tokens=num_tokens, training=False, head=_head_of(model), device=model.device, most=most
    )
    logger.info('batch size "auto": %s', choice)
    return choice


def fit_training_batch_size(
    training: ScReformerTrainingArguments, model: ScReformerPreTrainedModel, *, longest: int
) -> dict[str, Any]:
    """Split an optimizer step's cells into batches that fit, if `training` asks for it, and return what was chosen.

    The cells of a step, ``per_device_train_batch_size * gradient_accumulation_steps``, stay as many as they were, so
    that a run on another machine learns at the same pace: the batch size becomes the largest of their divisors that
    fits, and the steps of accumulation follow. Batches of evaluation, which change no result, only become smaller.

    Parameters
    ----------
    training
        Changed in place where its `batch_size` is ``"auto"``.
    model
        To be trained.
    longest
        The most expressed genes of a cell.

    Raises
    ------
    ValueError
        Not even one cell fits, or the free memory of the training's device is not known.
    """
    if training.batch_size != AUTO:
        return {}
    cells = training.per_device_train_batch_size * training.gradient_accumulation_steps
    device, num_processes = training.device, training.world_size
    available = available_memory(device)
    if device.type == "cpu":  # which the processes share; a GPU has one
        available //= num_processes
    shared: dict[str, Any] = {
        "num_tokens": tokens_of(model.config, model.config.gene_space, longest),
        "dtype": "bfloat16" if training.bf16 or training.fp16 else "float32",
        "head": _head_of(model),
        "device": device,
        "is_loaded": model.device.type == device.type,
    }
    choice = largest_batch_size(model.config, training=True, most=min(cells, MOST_CELLS), available=available, **shared)
    # The moments stay when held-out cells are looked at.
    available -= choice.estimate.optimizer
    most = training.per_device_eval_batch_size
    evaluation = largest_batch_size(model.config, training=False, most=most, available=available, **shared)
    largest, largest_evaluated = choice.batch_size, evaluation.batch_size
    if num_processes > 1:
        from accelerate.utils import gather_object

        # All of them take the same steps.
        largest, largest_evaluated = map(min, zip(*gather_object([(largest, largest_evaluated)]), strict=True))
    batch_size = max(size for size in range(1, largest + 1) if cells % size == 0)
    training.per_device_train_batch_size = batch_size
    training.gradient_accumulation_steps = cells // batch_size
    training.per_device_eval_batch_size = largest_evaluated
    logger.info(
        'batch size "auto": %d cells a step are %d batches of %d; %s', cells, cells // batch_size, batch_size, choice
    )
    return {
        "batch": {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": cells // batch_size,
            "per_device_eval_batch_size": largest_evaluated,
            "available_bytes": choice.available,
        }
    }


def longest_cell(rows: CellDataset | CellBatch | Sequence[Mapping[str, Any]]) -> int:
    """Return the most expressed genes of a cell, 1 if there are no cells.

    Of a selection of a `datasets.Dataset` it is that of the whole data set.
    """
    import datasets
    import pyarrow.compute

    longest: int | None
    if isinstance(rows, CellDataset):
        longest = rows.longest
    elif isinstance(rows, datasets.Dataset):
        longest = pyarrow.compute.max(pyarrow.compute.list_value_length(rows.data.column("gene_ids"))).as_py()
    else:
        longest = max((len(row["gene_ids"]) for row in iter(rows)), default=None)
    return max(1, longest or 0)


def tokens_of(config: ScReformerConfig, gene_space: GeneSpace, longest: int) -> int:
    """Return the tokens of the longest cell, which has `longest` expressed genes."""
    return config.num_genes if gene_space == "full" else min(longest, config.num_genes)


def _head_of(model: ScReformerPreTrainedModel) -> Head | None:
    if isinstance(model, ScReformerForMaskedLM):
        return "masked_lm"
    return "cell_classification" if isinstance(model, ScReformerForCellClassification) else None
