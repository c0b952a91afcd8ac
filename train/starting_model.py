"""The model that a run begins with: a new one in a preset's shape, or a checkpoint with the corpus's tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers.utils import logging as transformers_logging

from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.tokenization.gene2vec import read_gene_vectors
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

if TYPE_CHECKING:
    from screformer.train.arguments import ModelArguments

logger = logging.getLogger(__name__)

Model = TypeVar("Model", ScReformerForMaskedLM, ScReformerForCellClassification)


def starting_model(
    model_class: type[Model],
    tokenizer: ScReformerTokenizer,
    arguments: ModelArguments,
    *,
    label_names: list[str] | None = None,
    head: Mapping[str, Any] | None = None,  # Any: a field's value
) -> Model:
    """Return a new model, or a checkpoint's, that fits `tokenizer` and, for a classifier, `label_names`.

    `head` are fields of the config that only the head depends on; they may differ from the checkpoint's. A head that
    the checkpoint does not have, or has for other labels, gets new random weights; the log says which.

    Raises
    ------
    ValueError
        The checkpoint was trained with another tokenizer, an override is no field of the config, or the gene vectors
        have another length than the model's.
    """
    labels: dict[str, Any] = {}
    if label_names is not None:
        labels = {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}
    overrides = {**arguments.config_values(), **(head or {})}
    if arguments.checkpoint is None:
        new_model = model_class(_new_config(tokenizer, arguments.preset or "base", overrides, labels))
        if arguments.gene2vec is not None:
            _set_gene_vectors(new_model, tokenizer, arguments.gene2vec)
        return new_model
    config = ScReformerConfig.from_pretrained(arguments.checkpoint, **overrides, **labels)
    check_tokenizer(config, tokenizer, checkpoint=arguments.checkpoint)
    config.tokenizer_fingerprint = tokenizer.fingerprint
    # Only the last layer can have another shape: the tokenizer is the same, and the labels may not be.
    with _quiet_transformers():
        loaded = model_class.from_pretrained(
            arguments.checkpoint,
            config=config,
            ignore_mismatched_sizes=label_names is not None,
            output_loading_info=True,
        )
    model: Model = loaded[0]
    report: dict[str, Any] = loaded[1]
    new = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if new:
        parts = sorted({name.rpartition(".")[0] for name in new})
        logger.info("not in checkpoint %s, starting at random: %s", arguments.checkpoint, ", ".join(parts))
    return model


def _set_gene_vectors(model: Model, tokenizer: ScReformerTokenizer, path: str) -> None:
    """Start the gene embeddings from a file of vectors; genes without one keep their random start."""
    vectors = read_gene_vectors(path)
    if vectors.num_dimensions != model.config.hidden_size:
        raise ValueError(
            f"gene2vec={path!r} has vectors of length {vectors.num_dimensions}, but the model's hidden_size is "
            f"{model.config.hidden_size}; train vectors of that length (screformer gene2vec --dimensions), or set "
            f"config_overrides hidden_size={vectors.num_dimensions}"
        )
    aligned = vectors.align(tokenizer.gene_vocabulary)
    model.base_model.set_gene_embeddings(torch.from_numpy(aligned.vectors))
    logger.info("gene embeddings start from %s: %s", path, aligned.report)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Leave out transformers' table of new weights, which is longer than the one line that we log."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def check_tokenizer(config: ScReformerConfig, tokenizer: ScReformerTokenizer, *, checkpoint: str) -> None:
    """Raise ValueError unless the checkpoint's weights belong to `tokenizer`.

    A checkpoint without a fingerprint passes, with a logged warning, if it has as many genes and bins.
    """
    sizes = (config.num_genes, config.num_bins)
    if config.tokenizer_fingerprint is None and sizes == (tokenizer.num_genes, tokenizer.num_bins):
        logger.warning("checkpoint %s does not say which tokenizer it was trained with; its sizes fit", checkpoint)
        return
    if config.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"checkpoint {checkpoint!r} was trained with tokenizer {config.tokenizer_fingerprint} ({config.num_genes} "
            f"genes, {config.num_bins} bins), but the corpus was made with {tokenizer.fingerprint} "
            f"({tokenizer.num_genes} genes, {tokenizer.num_bins} bins). Build the corpus again with the checkpoint's "
            f"tokenizer: ScReformerTokenizer.from_pretrained({checkpoint!r})"
        )


def _new_config(
    tokenizer: ScReformerTokenizer, preset: str, overrides: dict[str, Any], labels: dict[str, Any]
) -> ScReformerConfig:
    from_tokenizer = {
        "num_genes": tokenizer.num_genes,
        "num_bins": tokenizer.num_bins,
        "tokenizer_fingerprint": tokenizer.fingerprint,
    }
    known = {item.name for item in fields(ScReformerConfig)} - set(from_tokenizer)
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(
            f"config_overrides has {unknown}; allowed are fields of ScReformerConfig that the tokenizer does not "
            f"decide, for example hidden_size, num_hidden_layers, num_hashes, attention"
        )
    return ScReformerConfig.preset(preset, **from_tokenizer, **overrides, **labels)
