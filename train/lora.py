"""Low-rank adapters (LoRA, Hu et al. 2021) through `peft`: train small changes of the projections, and the head.

A run's folder holds an ordinary checkpoint with the changes merged into its weights, and beside it ``adapter/``, which
``peft.PeftModel.from_pretrained`` puts onto the checkpoint that the run started from.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import nn

from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM

if TYPE_CHECKING:
    from transformers import Trainer

    from screformer.train.arguments import ModelArguments

ADAPTER_FOLDER = "adapter"
COPY, PREFIX = ".modules_to_save.default", "base_model.model."  # in peft's names of parameters
# Name of an option -> ends of the names of the modules; "output" alone would also be the classifier's last layer.
LORA_TARGETS = {
    "query_key": ("attention.query_key",),
    "value": ("attention.value",),
    "output": ("attention.output",),
    "feed_forward": ("feed_forward.0", "feed_forward.2"),
}

Model = TypeVar("Model", ScReformerForMaskedLM, ScReformerForCellClassification)


def check_lora(arguments: ModelArguments) -> None:
    """Raise ValueError where the options of adapters are out of range or contradict others."""
    rank, alpha, targets = arguments.lora_rank, arguments.lora_alpha, arguments.lora_targets
    if rank is None:
        given = {"lora_alpha": alpha, "lora_dropout": arguments.lora_dropout or None, "lora_targets": targets or None}
        unused = [f"{name}={value}" for name, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"{', '.join(unused)} without lora_rank; set it too, for example --lora_rank 8")
        return
    if rank < 1:
        raise ValueError(f"lora_rank got {rank}; it must be at least 1 (8 is usual)")
    if alpha is not None and alpha <= 0:
        raise ValueError(f"lora_alpha got {alpha}; it must be above 0 (twice lora_rank is usual)")
    if not 0 <= arguments.lora_dropout < 1:
        raise ValueError(f"lora_dropout got {arguments.lora_dropout}; it must be at least 0 and below 1")
    unknown = sorted(set(targets) - set(LORA_TARGETS))
    if unknown:
        raise ValueError(f"lora_targets has {unknown}; allowed are {', '.join(LORA_TARGETS)}")
    if arguments.checkpoint is None:
        raise ValueError(
            f"lora_rank={rank} trains small changes of a trained model, but there is no checkpoint; give one with "
            "--checkpoint pretrained"
        )


def add_adapters(model: Model, arguments: ModelArguments) -> Model:
    """Return `model` wrapped by `peft`: its weights are frozen, the adapters and the head learn.

    What of the head is frozen already, as a linear path that starts as a regression is, stays so.

    The wrapper is called like the model, and gives its ``config``.

    Raises
    ------
    ImportError
        `peft` is not installed.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ImportError('lora_rank needs the package peft: pip install "screformer[lora]"') from error
    assert arguments.lora_rank is not None
    is_classifier = isinstance(model, ScReformerForCellClassification)
    settings = LoraConfig(
        task_type=TaskType.SEQ_CLS if is_classifier else None,
        r=arguments.lora_rank,
        lora_alpha=2 * arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=[end for name in arguments.lora_targets or LORA_TARGETS for end in LORA_TARGETS[name]],
        # Of a model for SEQ_CLS peft itself names the classifier.
        modules_to_save=None if is_classifier else ["head"],
    )
    is_frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    with warnings.catch_warnings():
        # peft asks for it by a name that transformers will drop.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        wrapped = cast(Model, get_peft_model(model, settings))
    for name, parameter in wrapped.named_parameters():
        # peft trains a copy of the head, all of it.
        if COPY in name and name.removeprefix(PREFIX).replace(COPY, "") in is_frozen:
            parameter.requires_grad_(False)
    return wrapped


def has_adapters(model: nn.Module) -> bool:
    """Whether `add_adapters` made it."""
    return hasattr(model, "merge_and_unload")


def check_not_sharded(trainer: Trainer) -> None:
    """Raise ValueError where adapters meet weights in shards, which could not be merged at the end."""
    if has_adapters(trainer.model) and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise ValueError(
            "lora_rank does not work with FSDP or DeepSpeed; launch without them (several GPUs still share the cells)"
        )


def merge_adapters(trainer: Trainer, folder: Path) -> None:
    """Save a trainer's adapters in `folder`, and let it go on with the ordinary model that they make."""
    model: Any = trainer.model  # Any: peft has no types
    if trainer.is_world_process_zero():
        # The embeddings are never changed; looking for that would ask the Hub.
        model.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # a form, not filled in
    trainer.model = trainer.model_wrapped = model.merge_and_unload()
