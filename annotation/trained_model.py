"""A checkpoint's model and the tokenizer it was trained with, or a clear refusal."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from screformer.annotation.unknown_types import UnknownTypeDetector
from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerModel
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.result_files import hash_weights

logger = logging.getLogger(__name__)

Model = TypeVar("Model", ScReformerModel, ScReformerForCellClassification)


class TrainedModel(NamedTuple, Generic[Model]):
    """A model ready to predict, its tokenizer (which keeps empty cells), and the name it was asked for by.

    A classifier has its detector of unknown types too, if the checkpoint has one.
    """

    model: Model
    tokenizer: ScReformerTokenizer
    name: str
    detector: UnknownTypeDetector | None = None

    def describe(self) -> dict[str, Any]:  # Any: JSON
        """Return what identifies the model, for the record; None where it is not known."""
        config = self.model.config
        return {
            "name": self.name,
            "weights_sha256": hash_weights(self.name),
            "hub_commit": getattr(config, "_commit_hash", None),
            "tokenizer_fingerprint": self.tokenizer.fingerprint,
            "detector": None if self.detector is None else self.detector.fingerprint,
            "vocabulary": self.tokenizer.gene_vocabulary.name,
            "attention": config.attention,
        }


def load_classifier(
    model: str | Path | TrainedModel[ScReformerForCellClassification], *, device: str | None = None
) -> TrainedModel[ScReformerForCellClassification]:
    """Load a fine-tuned cell classifier.

    Parameters
    ----------
    model
        Checkpoint folder or Hub id; one that is loaded is returned as it is.
    device
        For example ``"cuda"``; default a GPU if there is one.

    Raises
    ------
    OSError
        There is no such checkpoint.
    ValueError
        It is of another kind of model, has no trained classifier, or its tokenizer is not the one it was trained with.
    """
    if isinstance(model, TrainedModel):
        return model
    loaded = _load(ScReformerForCellClassification, model, device)
    config = loaded.model.config
    if config.num_labels < 2 or config.problem_type not in (None, "single_label_classification"):
        raise ValueError(
            f"model: {loaded.name} does not choose one of several cell types (num_labels={config.num_labels}, "
            f"problem_type={config.problem_type!r}); fine-tune a classifier with `screformer finetune`"
        )
    return loaded._replace(detector=UnknownTypeDetector.from_pretrained(loaded.name))


def load_encoder(
    model: str | Path | TrainedModel[ScReformerModel], *, device: str | None = None
) -> TrainedModel[ScReformerModel]:
    """Load the encoder of any checkpoint; parameters and errors as for `load_classifier`."""
    if isinstance(model, TrainedModel):
        return model
    return _load(ScReformerModel, model, device)


def _load(model_class: type[Model], model: str | Path, device: str | None) -> TrainedModel[Model]:
    name = str(model)
    try:
        values, _ = ScReformerConfig.get_config_dict(name)
        if values.get("model_type") != ScReformerConfig.model_type:
            raise ValueError(
                f"model: {name} holds a model of type {values.get('model_type')!r}; a 'screformer' checkpoint is needed"
            )
        tokenizer = ScReformerTokenizer.from_pretrained(name, on_empty_cells="keep")
        loaded, report = model_class.from_pretrained(name, output_loading_info=True)
    except OSError as error:
        raise OSError(
            f"model: {name} is neither a folder with a whole checkpoint (config, weights, tokenizer) nor a Hub "
            f"repository within reach. {error}"
        ) from error
    _refuse_untrained(name, sorted(report["missing_keys"]))
    _check_tokenizer(name, loaded.config, tokenizer)
    loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return TrainedModel(loaded, tokenizer, name)


def _refuse_untrained(name: str, missing: list[str]) -> None:
    """Refuse weights that the checkpoint lacks, which transformers has filled with random numbers."""
    if not missing:
        return
    if all(key.startswith("classifier.") for key in missing):
        raise ValueError(
            f"model: {name} has no trained cell type classifier (its weights lack {', '.join(missing[:3])}, ...). "
            f"Fine-tune it on labelled cells first: `screformer finetune --checkpoint {name}`"
        )
    raise ValueError(
        f"model: the weights of {name} lack {len(missing)} parts of the model, such as {', '.join(missing[:3])}; they "
        "are not of this config. Give a whole checkpoint"
    )


def _check_tokenizer(name: str, config: ScReformerConfig, tokenizer: ScReformerTokenizer) -> None:
    trained_with, sizes = config.tokenizer_fingerprint, (tokenizer.num_genes, tokenizer.num_bins)
    if trained_with == tokenizer.fingerprint:
        return
    if trained_with is None and sizes == (config.num_genes, config.num_bins):
        logger.warning("checkpoint %s does not say which tokenizer it was trained with; the sizes of its own fit", name)
        return
    raise ValueError(
        f"model: {name} was trained with tokenizer {trained_with} ({config.num_genes} genes, {config.num_bins} bins), "
        f"but the tokenizer in it is {tokenizer.fingerprint} ({sizes[0]} genes, {sizes[1]} bins). Its files were mixed "
        "up or changed: restore genes.json and tokenizer_config.json of the training"
    )
