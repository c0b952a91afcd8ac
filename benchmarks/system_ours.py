"""scReformer-BERT as one of the systems that are compared: fine-tuned by a recipe, as a user would."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from screformer.annotation.annotate import annotate
from screformer.annotation.trained_model import TrainedModel, load_classifier
from screformer.benchmarks.cell_type_systems import NamedCells, check_genes
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import build_corpus
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.classifier_start import ClassifierArguments
from screformer.train.finetune import finetune

if TYPE_CHECKING:
    from anndata import AnnData

LABEL, GROUP = "cell_type", "group"


class ScReformerSystem:
    """A checkpoint, or a new model, fine-tuned by `screformer finetune` with a recipe and more flags.

    Parameters
    ----------
    arguments
        Of `screformer finetune`: a recipe, flags.
    tokenizer
        Default: that of the packaged vocabulary.
    title
        What tables call it.
    """

    is_inductive = True

    def __init__(
        self,
        arguments: str = "finetune-small --preset tiny --config_overrides reversible=false",
        *,
        tokenizer: ScReformerTokenizer | None = None,
        title: str = "scReformer-BERT (finetune-small)",
    ) -> None:
        self.title = title
        self._arguments, self._tokenizer = arguments, tokenizer
        self._genes: list[str] | None = None
        self._trained: TrainedModel[ScReformerForCellClassification] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Make a corpus of the cells and fine-tune on all of them; raises as `finetune`."""
        with tempfile.TemporaryDirectory() as folder:
            corpus, model = Path(folder, "corpus"), Path(folder, "model")
            cells = adata.copy()
            cells.obs[LABEL], cells.obs[GROUP] = list(labels), list(groups or [""] * adata.n_obs)
            cells.write_h5ad(Path(folder, "cells.h5ad"))
            build_corpus(
                Path(folder, "cells.h5ad"),
                corpus,
                tokenizer=self._tokenizer or ScReformerTokenizer(),
                obs_columns=[LABEL, GROUP],
            )
            given = [*self._arguments.split(), "--corpus", str(corpus), "--output_dir", str(model), "--seed", str(seed)]
            # All cells train: the test cells are elsewhere.
            given += ["--test_fraction", "0", "--disable_tqdm", "True", "--save_strategy", "no"]
            data, start, classifier, training = parse_arguments(
                [FineTuningDataArguments, ModelArguments, ClassifierArguments, FineTuningArguments],
                given,
                program="finetune",
                description="",
                example="",
                recipes="finetune",
            )
            finetune(start, data, training, classifier)
            self._trained = load_classifier(model)
            self._genes = [str(name) for name in adata.var_names]

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells by `annotate`, every one of them; scores are calibrated probabilities."""
        check_genes(self._genes, adata)
        assert self._trained is not None
        named = annotate(adata, self._trained, copy=True, progress=False)
        assert named is not None
        config = self._trained.model.config
        classes = tuple(config.id2label[number] for number in range(config.num_labels))
        labels = named.obs["screformer_cell_type"].astype(object)
        scores = np.nan_to_num(named.obsm["screformer_probabilities"])
        return NamedCells(labels.where(labels.notna(), "").tolist(), scores, classes)
