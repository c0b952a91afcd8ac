"""scReformer-BERT as one of the systems that are compared: pretrained or not, and fine-tuned, as a user would."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from screformer.annotation.annotate import annotate
from screformer.annotation.label_tree import label_names_of
from screformer.annotation.trained_model import TrainedModel, load_classifier
from screformer.benchmarks.cell_type_systems import NamedCells, check_genes
from screformer.benchmarks.standard_encoder import standard_encoders
from screformer.benchmarks.system_scpred import most_variable_genes
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import Corpus, build_corpus
from screformer.tokenization.gene2vec import save_gene_vectors
from screformer.tokenization.own_gene2vec import gene2vec_of_corpus
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)
from screformer.train.classifier_start import ClassifierArguments
from screformer.train.finetune import finetune
from screformer.train.pretrain import pretrain

if TYPE_CHECKING:
    from anndata import AnnData

LABEL, GROUP = "cell_type", "group"
TINY = "--preset tiny --config_overrides reversible=false"
QUIET = ["--disable_tqdm", "True", "--logging_strategy", "no"]


class ScReformerSystem:
    """A checkpoint, or a new model, fine-tuned by `screformer finetune` with a recipe and more flags.

    Everything that it learns from, gene vectors, unlabelled cells, variable genes, is the training cells.

    Parameters
    ----------
    finetuning
        Arguments of `screformer finetune`: a recipe, flags; without those of the model.
    model
        Arguments that say what a new model is.
    pretraining
        Arguments of `screformer pretrain`, by which the model first predicts masked genes of the training cells,
        without their labels; None: it is not pretrained.
    gene_vectors
        Length of vectors from Gene2vec (gensim) that gene embeddings start from, that of the model; None: none.
    num_variable_genes
        The model reads only so many genes, the most variable ones of the training cells; None: all.
    encoder
        ``"reformer"``, or ``"standard"``: the model's encoder is exchanged for a `StandardEncoder`.
    tokenizer
        Default: that of the packaged vocabulary.
    title
        What tables call it.
    """

    is_inductive = True

    def __init__(
        self,
        finetuning: str = "finetune-small",
        *,
        model: str = TINY,
        pretraining: str | None = None,
        gene_vectors: int | None = None,
        num_variable_genes: int | None = None,
        encoder: Literal["reformer", "standard"] = "reformer",
        tokenizer: ScReformerTokenizer | None = None,
        title: str = "scReformer-BERT (finetune-small)",
    ) -> None:
        self.title = title
        self.finetuning, self.model, self.pretraining = finetuning, model, pretraining
        self.gene_vectors, self.num_variable_genes = gene_vectors, num_variable_genes
        self.encoder: Literal["reformer", "standard"] = encoder
        self._encoders = standard_encoders if encoder == "standard" else nullcontext
        self._tokenizer = tokenizer
        self._genes: list[str] | None = None
        self._trained: TrainedModel[ScReformerForCellClassification] | None = None

    def fit(self, adata: AnnData, labels: Sequence[str], *, groups: Sequence[str] | None = None, seed: int = 0) -> None:
        """Make a corpus of the cells, pretrain if asked, and fine-tune; raises as `pretrain` and `finetune`."""
        with tempfile.TemporaryDirectory() as folder:
            cells = adata.copy()
            cells.obs[LABEL], cells.obs[GROUP] = list(labels), list(groups or [""] * adata.n_obs)
            cells.write_h5ad(Path(folder, "cells.h5ad"))
            corpus = build_corpus(
                Path(folder, "cells.h5ad"),
                Path(folder, "corpus"),
                tokenizer=self._choose_tokenizer(adata),
                obs_columns=[LABEL, GROUP],
            )
            # Where transformers' Trainer prints its log without progress bars.
            with redirect_stdout(StringIO()), self._encoders():
                model = self._start(corpus, Path(folder), seed)
                checkpoint = _finetune([*self.finetuning.split(), *model], corpus, Path(folder), seed)
                self._trained = load_classifier(checkpoint)
            self._genes = [str(name) for name in adata.var_names]

    def predict(self, adata: AnnData) -> NamedCells:
        """Name cells by `annotate`, every one of them; scores are calibrated probabilities."""
        check_genes(self._genes, adata)
        assert self._trained is not None
        named = annotate(adata, self._trained, copy=True, progress=False)
        assert named is not None
        config = self._trained.model.config
        classes = tuple(label_names_of(config))
        labels = named.obs["screformer_cell_type"].astype(object)
        scores = np.nan_to_num(named.obsm["screformer_probabilities"])
        return NamedCells(labels.where(labels.notna(), "").tolist(), scores, classes)

    @property
    def trained(self) -> TrainedModel[ScReformerForCellClassification]:
        """The fitted classifier."""
        assert self._trained is not None
        return self._trained

    def _choose_tokenizer(self, adata: AnnData) -> ScReformerTokenizer:
        tokenizer = self._tokenizer or ScReformerTokenizer()
        if self.num_variable_genes is None:
            return tokenizer
        vocabulary = tokenizer.gene_vocabulary
        positions = vocabulary.map_names([str(name) for name in adata.var_names]).positions
        known = np.flatnonzero(positions >= 0)
        columns = known[most_variable_genes(adata.X[:, known], self.num_variable_genes)]
        genes = [vocabulary.ensembl_ids[at] for at in positions[columns].tolist()]
        smaller = vocabulary.subset(genes, name=f"{self.num_variable_genes} variable genes")
        # Most counts fall on other genes, and that is meant.
        return ScReformerTokenizer(
            smaller, num_bins=tokenizer.num_bins, binning=tokenizer.binning, min_gene_coverage=0, on_empty_cells="keep"
        )

    def _start(self, corpus: Corpus, folder: Path, seed: int) -> list[str]:
        """Return the arguments that say what fine-tuning starts from."""
        model = self.model.split()
        if self.gene_vectors is not None:
            path = folder / "gene2vec.safetensors"
            vectors = gene2vec_of_corpus(corpus, group_column=GROUP, num_dimensions=self.gene_vectors, seed=seed)
            save_gene_vectors(vectors, path)
            model += ["--gene2vec", str(path)]
        if self.pretraining is None:
            return model
        given = [*self.pretraining.split(), *model, "--corpus", str(corpus.folder), "--seed", str(seed), *QUIET]
        data, start, training = parse_arguments(
            [PretrainingDataArguments, ModelArguments, PretrainingArguments],
            [*given, "--output_dir", str(folder / "pretrained")],
            program="pretrain",
            description="",
            example="",
            recipes="pretrain",
        )
        return ["--checkpoint", str(pretrain(start, data, training).output_dir)]


def _finetune(given: Sequence[str], corpus: Corpus, folder: Path, seed: int) -> Path:
    """Fine-tune on all cells of a corpus, the test cells being elsewhere, and return the checkpoint."""
    given = [*given, "--corpus", str(corpus.folder), "--output_dir", str(folder / "model"), "--seed", str(seed), *QUIET]
    data, start, classifier, training = parse_arguments(
        [FineTuningDataArguments, ModelArguments, ClassifierArguments, FineTuningArguments],
        [*given, "--test_fraction", "0", "--save_strategy", "no"],
        program="finetune",
        description="",
        example="",
        recipes="finetune",
    )
    return finetune(start, data, training, classifier).output_dir
