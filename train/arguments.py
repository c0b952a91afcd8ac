"""What a training run can be told, with the paper's defaults; argument_parser.py reads it from flags or a file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from screformer.train.class_weights import check_class_weights
from screformer.train.lora import check_lora
from screformer.train.parameter_groups import check_freeze, check_layer_lr_decay
from screformer.train.sampler import BLOCK_SIZE, BUFFER_SIZE, Shuffling

logger = logging.getLogger(__name__)

GeneSpace = Literal["full", "expressed"]
Preset = Literal["tiny", "base", "large"]
GeneStart = Literal["random", "principal_components"]


@dataclass
class ModelArguments:
    """The model to start from: a checkpoint, or a new one."""

    _argument_group_name = "model"

    checkpoint: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of a checkpoint to start from; without it a new model is made."},
    )
    preset: Preset | None = field(
        default=None,
        metadata={"help": "Size of a new model: tiny (a laptop), base (the paper's shape), large. Default: base."},
    )
    gene_space: GeneSpace | None = field(
        default=None,
        metadata={
            "help": "full: every gene, the paper's way; expressed: only genes with counts. Default: the config's."
        },
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata={"help": "Fields of a new model's config, for example: hidden_size=64 num_hidden_layers=2."},
    )
    gene2vec: str | None = field(
        default=None,
        metadata={"help": "Gene vectors that a new model's gene embeddings start from; see `screformer gene2vec`."},
    )
    lora_rank: int | None = field(
        default=None,
        metadata={"help": "Train low-rank adapters of this rank (8 is usual) and the head instead of every weight."},
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "The adapters are scaled by lora_alpha / lora_rank. Default: twice the rank."}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout before the adapters."})
    lora_targets: list[str] = field(
        default_factory=list,
        metadata={"help": "What gets adapters: query_key, value, output, feed_forward. Default: all of them."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError where settings contradict each other."""
        check_lora(self)
        if self.checkpoint is not None and self.gene2vec is not None:
            raise ValueError(
                f"gene2vec={self.gene2vec!r} is where a new model's gene embeddings start, but "
                f"checkpoint={self.checkpoint!r} brings its own; leave out one or the other"
            )
        if self.checkpoint is not None and (self.preset is not None or self.config_overrides):
            raise ValueError(
                f"checkpoint={self.checkpoint!r} fixes the shape of the model, but preset={self.preset!r} and "
                f"config_overrides={self.config_overrides} were given too; leave out one or the other"
            )

    def config_values(self) -> dict[str, Any]:
        """Return the overrides as field -> value.

        Raises
        ------
        ValueError
            An override is not ``name=value``.
        """
        values = {}
        for item in self.config_overrides:
            name, is_pair, text = item.partition("=")
            if not is_pair:
                raise ValueError(f"config_overrides must be name=value pairs, got {item!r}; for example num_hashes=2")
            values[name.strip()] = yaml.safe_load(text)
        if self.gene_space is not None:
            values["gene_space"] = self.gene_space
        return values


@dataclass
class PretrainingDataArguments:
    """The cells of pretraining and how they are masked (paper, sections 2.6 and 2.7)."""

    _argument_group_name = "cells"

    corpus: str = field(metadata={"help": "Corpus folder, as `screformer corpus` makes it."})
    held_out_fraction: float = field(
        default=0.1,
        metadata={
            "help": "Share of the cells whose loss decides when to stop, never trained on; a corpus's own split wins."
        },
    )
    masked_fraction: float = field(default=0.15, metadata={"help": "Share of a cell's expressed genes to predict."})
    replace_probability: float = field(
        default=0.9, metadata={"help": "Share of these that the model sees as [MASK]; the others keep their bin."}
    )
    gene_dropout: float = field(
        default=0.0,
        metadata={"help": "Expected share of a training cell's expressed genes to remove; saves as much time."},
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Column that exclude_groups names groups of, for example donor."}
    )
    exclude_groups: list[str] = field(
        default_factory=list,
        metadata={"help": "Groups to leave out, for example the donors that a fine-tuned model will be tested on."},
    )
    gene_start: GeneStart = field(
        default="random",
        metadata={
            "help": "Where a new model's gene embeddings start without --gene2vec: random, or the genes' "
            "principal_components in the cells that are trained on, which serve small corpora far better."
        },
    )

    def __post_init__(self) -> None:
        """Raise ValueError where settings contradict each other."""
        if self.gene_start not in get_args(GeneStart):
            raise ValueError(f"gene_start got {self.gene_start!r}; it must be one of {', '.join(get_args(GeneStart))}")
        if (self.group_column is None) != (not self.exclude_groups):
            raise ValueError(
                f"group_column={self.group_column!r} and exclude_groups={self.exclude_groups} go together: for example "
                "--group_column donor --exclude_groups human4"
            )


@dataclass
class FineTuningDataArguments:
    """The labelled cells of fine-tuning and how they are split (paper, section 2.5)."""

    _argument_group_name = "cells"

    corpus: str = field(metadata={"help": "Corpus folder, as `screformer corpus` makes it."})
    label_column: str = field(default="cell_type", metadata={"help": "Column of the corpus that holds the labels."})
    label_tree: str | None = field(
        default=None,
        metadata={
            "help": "A tree of the labels, which cells may be named by at any level: a CSV of labels and parents, "
            "uHAF's of an organ, such as uhaf:Heart, or cell_ontology, with broad types above the labels "
            "(cell_ontology:FILE: a file's terms, one a line)."
        },
    )
    exclude_labels: list[str] = field(
        default_factory=list,
        metadata={"help": "Labels to leave out, for example: unknown doublet. Empty ones always are."},
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Split by this column, for example donor. Without it: at random, stratified."}
    )
    test_groups: list[str] = field(default_factory=list, metadata={"help": "Groups that make up the test set."})
    validation_groups: list[str] = field(
        default_factory=list, metadata={"help": "Groups that make up the validation set. Default: a stratified slice."}
    )
    validation_fraction: float = field(
        default=0.2,
        metadata={"help": "Share for validation: of all cells, or of those outside the test groups."},
    )
    test_fraction: float = field(
        default=0.2, metadata={"help": "Share of all cells for testing, without group_column."}
    )
    gene_dropout: float = field(
        default=0.0, metadata={"help": "Augmentation: expected share of a training cell's expressed genes to remove."}
    )
    cells_per_label: int | None = field(
        default=None,
        metadata={"help": "Train on at most so many cells of each label, drawn by the seed: few-shot. Default: all."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError where settings contradict each other."""
        if self.cells_per_label is not None and self.cells_per_label < 1:
            raise ValueError(f"cells_per_label must be at least 1, got {self.cells_per_label}")
        if self.group_column is None and (self.test_groups or self.validation_groups):
            raise ValueError(
                f"test_groups={self.test_groups} and validation_groups={self.validation_groups} need group_column, "
                "the column that names each cell's group, for example donor"
            )
        if self.group_column is not None and not self.test_groups:
            raise ValueError(
                f"group_column={self.group_column!r} needs test_groups, the groups to test on, for example "
                "--test_groups human4"
            )


_OUTPUT_HELP = {"help": "Folder for the checkpoint and the results; an interrupted run in it is resumed."}


def _help_of(name: str) -> Mapping[str, Any]:  # Any: as dataclasses has it
    """Return the help text of a field of TrainingArguments whose default changes."""
    return TrainingArguments.__dataclass_fields__[name].metadata


@dataclass
class ScReformerTrainingArguments(TrainingArguments):
    """What pretraining and fine-tuning share: AdamW, linear schedule, 10% warm-up, seed 2022 (paper, section 2.9)."""

    _argument_group_name = "training"

    learning_rate: float = field(default=1e-4, metadata=_help_of("learning_rate"))
    warmup_steps: float = field(default=0.1, metadata=_help_of("warmup_steps"))
    eval_strategy: IntervalStrategy | str = field(default="epoch", metadata=_help_of("eval_strategy"))
    save_strategy: SaveStrategy | str = field(default="epoch", metadata=_help_of("save_strategy"))
    save_total_limit: int | None = field(default=1, metadata=_help_of("save_total_limit"))
    load_best_model_at_end: bool = field(default=True, metadata=_help_of("load_best_model_at_end"))
    logging_steps: float = field(default=0.01, metadata=_help_of("logging_steps"))
    # HfArgumentParser reads this union only in this order.
    report_to: None | str | list[str] = field(default="none", metadata=_help_of("report_to"))  # noqa: RUF036
    # The collator needs every column; the default would drop gene_ids and labels.
    remove_unused_columns: bool | None = field(default=False, metadata=_help_of("remove_unused_columns"))
    # Every parameter is used in every step; looking for unused ones only costs time.
    ddp_find_unused_parameters: bool | None = field(default=False, metadata=_help_of("ddp_find_unused_parameters"))
    # Else the patience would start anew with every interruption.
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata=_help_of("restore_callback_states_from_checkpoint")
    )
    seed: int = field(default=2022, metadata=_help_of("seed"))
    shuffle_block_size: int = field(
        default=BLOCK_SIZE,
        metadata={"help": "Consecutive cells that are read together, from a random place; 1 is a full shuffle."},
    )
    shuffle_buffer_size: int = field(
        default=BUFFER_SIZE, metadata={"help": "Cells, in such blocks, that are shuffled among each other."}
    )
    early_stopping_patience: int = field(
        default=5, metadata={"help": "Evaluations without improvement after which training stops; 0: never stop early."}
    )
    batch_size: Literal["auto"] | None = field(
        default=None,
        metadata={
            "help": "auto: the largest batches that fit into free memory and divide the cells of an optimizer step "
            "(per_device_train_batch_size x gradient_accumulation_steps), whose number stays. Default: as given there."
        },
    )
    pack_batches: bool | None = field(
        default=None,
        metadata={
            "help": "Send the expressed genes alone, and lay them out over every gene on the device. Default: on a GPU."
        },
    )
    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "Compile the layers' norms, projections and feed-forward branches, for GPUs; the Trainer's own "
            "flag compiles only what is around the encoder."
        },
    )
    overwrite: bool = field(
        default=False,
        metadata={"help": "Start over: delete the checkpoints and results of an earlier run in output_dir."},
    )
    keep_checkpoints: bool = field(
        default=False,
        metadata={"help": "Keep the checkpoint-* folders (with optimizer state) after the run has finished."},
    )

    layer_lr_decay: float = field(
        default=1.0,
        metadata={"help": "Below the head each layer learns slower by this factor, embeddings slowest; 0.9 is usual."},
    )
    freeze: str = field(
        default="none",
        metadata={
            "help": "What stays as it is: none, embeddings, encoder (all but the head), or a number: the embeddings "
            "and so many of the lowest layers."
        },
    )

    def __post_init__(self) -> None:
        """Use bfloat16 and pinned memory where they can be; raise ValueError for a value that cannot be."""
        if (self.bf16 or self.bf16_full_eval) and not torch.accelerator.is_available():
            self.use_cpu = True  # which has bfloat16 too; TrainingArguments wants to be told
            logger.info("bf16 on the CPU, as there is no accelerator: bfloat16 products, weights in float32")
        super().__post_init__()
        self.shuffling  # noqa: B018 - checks its sizes
        check_freeze(self.freeze)
        check_layer_lr_decay(self.layer_lr_decay)
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor got {self.label_smoothing_factor}; it must be at least 0 and below 1 (0.1 is "
                "usual)"
            )
        if self.batch_size not in (None, "auto"):
            raise ValueError(
                f"batch_size got {self.batch_size!r}; 'auto' is allowed. A number of cells is "
                "per_device_train_batch_size"
            )
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False

    @property
    def shuffling(self) -> Shuffling:
        """How training cells are shuffled."""
        seed = self.seed if self.data_seed is None else self.data_seed
        return Shuffling(self.shuffle_block_size, self.shuffle_buffer_size, seed)


@dataclass
class PretrainingArguments(ScReformerTrainingArguments):
    """Defaults of pretraining: up to 50 epochs, stop after 5 without a better held-out loss (paper, section 2.7).

    The paper names no learning rate for pretraining; that of fine-tuning is taken.
    """

    output_dir: str | None = field(default="pretrained", metadata=_OUTPUT_HELP)
    num_train_epochs: float = field(default=50.0, metadata=_help_of("num_train_epochs"))
    per_device_train_batch_size: int = field(default=64, metadata=_help_of("per_device_train_batch_size"))
    per_device_eval_batch_size: int = field(default=64, metadata=_help_of("per_device_eval_batch_size"))
    metric_for_best_model: str | None = field(default="eval_loss", metadata=_help_of("metric_for_best_model"))
    # Predictions of all held-out genes do not fit into memory; they are counted batch by batch.
    batch_eval_metrics: bool = field(default=True, metadata=_help_of("batch_eval_metrics"))


@dataclass
class FineTuningArguments(ScReformerTrainingArguments):
    """Defaults of fine-tuning: batch 6 x 60 steps, 3 epochs, stop after 1 without better validation accuracy (2.9)."""

    output_dir: str | None = field(default="finetuned", metadata=_OUTPUT_HELP)
    num_train_epochs: float = field(default=3.0, metadata=_help_of("num_train_epochs"))
    per_device_train_batch_size: int = field(default=6, metadata=_help_of("per_device_train_batch_size"))
    per_device_eval_batch_size: int = field(default=32, metadata=_help_of("per_device_eval_batch_size"))
    gradient_accumulation_steps: int = field(default=60, metadata=_help_of("gradient_accumulation_steps"))
    metric_for_best_model: str | None = field(default="eval_accuracy", metadata=_help_of("metric_for_best_model"))
    early_stopping_patience: int = field(
        default=1, metadata={"help": "Evaluations without improvement after which training stops; 0: never stop early."}
    )
    class_weights: Literal["none", "balanced"] = field(
        default="none",
        metadata={"help": "balanced: every cell type counts the same in the loss, however many cells it has."},
    )
    unknown_types: bool = field(
        default=True,
        metadata={"help": "Fit a detector of cells of types that training lacks, and keep it beside the checkpoint."},
    )

    def __post_init__(self) -> None:
        """Raise ValueError for a value that cannot be."""
        super().__post_init__()
        check_class_weights(self.class_weights)
