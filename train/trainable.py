"""The model with what should learn: everything, all above a frozen part, or adapters and the head."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, TypeVar

from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.train.lora import add_adapters
from screformer.train.parameter_groups import freeze_lowest

if TYPE_CHECKING:
    from screformer.train.arguments import ModelArguments, ScReformerTrainingArguments

logger = logging.getLogger(__name__)

Model = TypeVar("Model", ScReformerForMaskedLM, ScReformerForCellClassification)


def choose_trainable(model: Model, arguments: ModelArguments, training: ScReformerTrainingArguments) -> Model:
    """Return the model with adapters, or itself with its frozen part excluded from training; log what is left.

    Raises
    ------
    ValueError
        Both are asked for, or more layers than there are should be frozen.
    ImportError
        Adapters are asked for, and `peft` is not installed.
    """
    if arguments.lora_rank is not None:
        if training.freeze != "none":
            raise ValueError(
                f"freeze={training.freeze!r} and lora_rank={arguments.lora_rank}: adapters leave every weight of the "
                "encoder as it is; leave out freeze"
            )
        model = add_adapters(model, arguments)
    freeze_lowest(model, training.freeze)
    # Beside a head that learns peft keeps the one it began with.
    used = [parameter for name, parameter in model.named_parameters() if ".original_module." not in name]
    total = sum(parameter.numel() for parameter in used)
    learning = sum(parameter.numel() for parameter in used if parameter.requires_grad)
    if learning < total:
        logger.info("%d of %d parameters learn (%.1f%%)", learning, total, 100 * learning / total)
    return model
