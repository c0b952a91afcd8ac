"""Where gene embeddings start: principal components of the training cells; genes of one cell type are close there."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from screformer.modeling_screformer import ScReformerPreTrainedModel
from screformer.tokenization.corpus import Corpus
from screformer.train.expression_levels import read_levels

logger = logging.getLogger(__name__)

MAX_CELLS = 20_000  # hundreds of components are known well from as many


def start_gene_embeddings(
    model: ScReformerPreTrainedModel, corpus: Corpus, rows: npt.NDArray[np.int64], *, seed: int
) -> dict[str, Any]:  # Any: JSON
    """Start the gene embeddings from the principal components of `rows`, and describe it.

    Parameters
    ----------
    model
        New; all of its gene embeddings are replaced.
    corpus, rows
        The cells, of which at most 20,000 are looked at, drawn by `seed`.
    seed
        Fixes the cells and the decomposition.

    Raises
    ------
    ValueError
        There are no more cells than the model's hidden size.
    """
    width = model.config.hidden_size
    if len(rows) > MAX_CELLS:
        rows = np.sort(np.random.default_rng(seed).permutation(rows)[:MAX_CELLS])
    if len(rows) <= width:
        raise ValueError(
            f"gene_start='principal_components' needs more training cells than the model's hidden_size of {width}, got "
            f"{len(rows)}; use more cells, or gene_start='random'"
        )
    levels = read_levels(corpus, rows, model.config.num_genes, model.config.num_bins)
    vectors = component_gene_vectors(levels, width, seed=seed)
    model.base_model.set_gene_embeddings(torch.from_numpy(vectors).float())
    logger.info("gene embeddings start from %d principal components of %d cells", width, len(rows))
    return {"method": "principal_components", "num_cells": len(rows), "num_dimensions": width}


def component_gene_vectors(levels: sparse.csr_array, num_dimensions: int, *, seed: int) -> npt.NDArray[np.float64]:
    """Return a vector a gene, (genes, num_dimensions): its loadings times the square roots of the singular values.

    A gene that no cell expresses has zeros. The cells are not centred: the first dimension is how much is expressed.

    Parameters
    ----------
    levels
        (cells, genes).
    num_dimensions
        Fewer than cells and genes.
    seed
        Fixes the randomized decomposition (Halko et al. 2011).
    """
    decomposition = TruncatedSVD(num_dimensions, random_state=seed).fit(levels)
    return decomposition.components_.T * np.sqrt(decomposition.singular_values_)
