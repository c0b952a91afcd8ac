"""A corpus of 48 small cells with two types that differ in a few genes: enough to train a tiny model in a second."""

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from screformer.tokenization.corpus import build_corpus
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer

NUM_GENES = 40
GENES = [f"ENSG{number:011d}" for number in range(1, NUM_GENES + 1)]
DONORS = ["human1", "human2", "human3", "human4"]
TYPES = ["alpha", "beta"]
TINY_MODEL = [
    "hidden_size=16",
    "num_hidden_layers=1",
    "num_attention_heads=2",
    "intermediate_size=32",
    "bucket_size=8",
    "num_hashes=1",
    "classifier_hidden_sizes=[16, 8]",
]

TINY_RECIPE = " ".join(
    ["finetune-small --config_overrides", *(value.replace(" ", "") for value in TINY_MODEL), "gene_space=expressed"]
)


def make_tokenizer(num_bins=6):
    return ScReformerTokenizer(
        GeneVocabulary(GENES, symbols=[f"GENE{number}" for number in range(NUM_GENES)]), num_bins=num_bins
    )


def make_cells(num_cells=48, seed=0, types=TYPES):
    """Return raw counts: every type has six genes of its own; the last gene is high in all, so that bins differ."""
    generator = np.random.default_rng(seed)
    kinds = np.arange(num_cells) % len(types)
    rates = np.full((num_cells, NUM_GENES), 1.0)
    for kind in range(len(types)):
        rates[kinds == kind, 6 * kind : 6 * kind + 6] = 20.0
    rates[:, -1] = 10_000
    counts = generator.poisson(rates).astype(np.int32)
    obs = pd.DataFrame(
        {
            "cell_type": [types[kind] for kind in kinds],
            "donor": [DONORS[number // len(types) % len(DONORS)] for number in range(num_cells)],
        },
        index=[f"cell{number}" for number in range(num_cells)],
    )
    return anndata.AnnData(sparse.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES))


def make_corpus(folder, *, cells=None, num_bins=6, obs_columns=("cell_type", "donor")):
    """Build the corpus in `folder`/corpus and return that path as text."""
    cells = make_cells() if cells is None else cells
    cells.write_h5ad(folder / "cells.h5ad")
    build_corpus(folder / "cells.h5ad", folder / "corpus", tokenizer=make_tokenizer(num_bins), obs_columns=obs_columns)
    return str(folder / "corpus")
