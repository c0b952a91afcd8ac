"""The cell classifier: paths from a cell's genes to its type, whose logits are added up."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .configuration_screformer import ScReformerConfig

NO_EXPRESSION = 0  # the bin of a gene without counts
BEFORE_RELU = 2**0.5  # He et al. 2015

Layer = TypeVar("Layer", nn.Linear, nn.Conv1d)


class EncodedCells(NamedTuple):
    """What the classifier reads of a batch.

    Attributes
    ----------
    hidden_states
        (B, L, hidden): the encoder's vector of each gene.
    bin_embeddings
        (B, L, hidden): the vector of each gene's bin, before anything was added to it.
    gene_ids
        (B, L) positions in the vocabulary; None if the tokens are all genes in order.
    is_gene
        (B, L): False at padding; None if there is none.
    is_expressed
        (B, L): whether the gene is no padding and has counts.
    """

    hidden_states: Tensor
    bin_embeddings: Tensor
    gene_ids: Tensor | None
    is_gene: Tensor | None
    is_expressed: Tensor


class ScReformerClassificationHead(nn.Module):
    """Cell type logits, the sum of one to three paths; all of them read full and expressed cells alike.

    ``"convolution"`` is the paper's classifier (section 2.8). ``"pooled"`` reads the mean and the maximum of the
    expressed genes' vectors. ``"linear"`` weighs each gene's level of expression, as a logistic regression does: beside
    a deep path it is the wide part of a wide-and-deep network (Cheng et al. 2016).
    """

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__()
        paths = config.classifier_paths or ["convolution"]
        self.convolution_path = ConvolutionPath(config) if "convolution" in paths else None
        self.pooled_path = PooledPath(config) if "pooled" in paths else None
        self.linear_path = LinearPath(config) if "linear" in paths else None

    def forward(self, cells: EncodedCells, expression_of_none: Tensor) -> Tensor:
        """Return (B, num_labels); `expression_of_none` (hidden,) is the embedding of the bin "not expressed"."""
        logits = []
        if self.convolution_path is not None:
            logits.append(self.convolution_path(cells))
        if self.pooled_path is not None:
            logits.append(self.pooled_path(cells))
        if self.linear_path is not None:
            logits.append(self.linear_path(cells, expression_of_none))
        return torch.stack(logits).sum(dim=0)

    @torch.no_grad()
    def silence_deep_paths(self) -> None:
        """Set the last layers of the convolution and pooled paths to zero: until trained, they change no logit."""
        for path in (self.convolution_path, self.pooled_path):
            if path is not None:
                path.output.weight.zero_()
                path.output.bias.zero_()


class ConvolutionPath(nn.Module):
    """A convolution over each gene's features, then three linear layers (section 2.8).

    The convolution's outputs are placed by vocabulary position; genes that a cell leaves out count as 0.
    """

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__()
        first, second = config.classifier_hidden_sizes or (512, 100)
        self.num_genes = config.num_genes
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.convolution = _start_with(BEFORE_RELU, nn.Conv1d(config.hidden_size, 1, kernel_size=1))
        # One for each use: DeepExplainer takes down what a module was given.
        self.activations = nn.ModuleList(nn.ReLU() for _ in range(3))
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.dense_1 = _start_with(BEFORE_RELU, nn.Linear(config.num_genes, first))
        self.dense_2 = _start_with(BEFORE_RELU, nn.Linear(first, second))
        self.output = nn.Linear(second, config.num_labels)

    def forward(self, cells: EncodedCells) -> Tensor:
        """Return logits (B, num_labels)."""
        of_gene, of_first, of_second = self.activations
        genes = of_gene(self.convolution(self.norm(cells.hidden_states).transpose(1, 2)).squeeze(1))
        genes = _by_position(genes, cells, self.num_genes)
        hidden = self.dropout(of_first(self.dense_1(self.dropout(genes))))
        return self.output(self.dropout(of_second(self.dense_2(hidden))))


class PooledPath(nn.Module):
    """Mean and maximum over the expressed genes, then two linear layers.

    Over hundreds of genes the means of any two cells are nearly the same: `start` centres and scales them by those of
    some cells, without which nothing is learned in thousands of steps. It happens once, not in every batch, so that no
    cell's result depends on its neighbours.
    """

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__()
        _, width = config.classifier_hidden_sizes or (512, 100)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.dense = _start_with(BEFORE_RELU, nn.Linear(2 * config.hidden_size, width))
        self.output = nn.Linear(width, config.num_labels)
        self.register_buffer("center", torch.zeros(2 * config.hidden_size, dtype=torch.float32))
        self.register_buffer("scale", torch.ones(2 * config.hidden_size, dtype=torch.float32))
        self.center: Tensor
        self.scale: Tensor

    def forward(self, cells: EncodedCells) -> Tensor:
        """Return logits (B, num_labels)."""
        pooled = (self.pool(cells) - self.center) * self.scale
        weight = self.dense.weight
        if isinstance(weight, Tensor) and weight.is_floating_point():  # not so where it was quantized
            pooled = pooled.to(weight.dtype)
        return self.output(self.dropout(self.activation(self.dense(self.dropout(pooled)))))

    def pool(self, cells: EncodedCells) -> Tensor:
        """Return means and maxima (B, 2 hidden), at least float32; zeros for a cell without expressed genes."""
        genes, is_expressed = self.norm(cells.hidden_states), cells.is_expressed.unsqueeze(-1)
        genes = genes.to(torch.promote_types(genes.dtype, torch.float32))
        number = is_expressed.sum(dim=1)
        mean = (genes * is_expressed).sum(dim=1) / number.clamp(min=1)
        highest = genes.masked_fill(~is_expressed, -torch.inf).amax(dim=1).masked_fill(number == 0, 0.0)
        return torch.cat([mean, highest], dim=-1)

    @torch.no_grad()
    def start(self, pooled: Tensor) -> None:
        """Centre and scale by what `pool` gives for some cells, (cells, 2 hidden); what does not vary is not scaled."""
        spread = pooled.std(dim=0)
        self.center.copy_(pooled.mean(dim=0))
        self.scale.copy_(torch.where(spread > 1e-6, 1 / spread.clamp(min=1e-6), torch.ones_like(spread)))


class LinearPath(nn.Module):
    """A weight for each gene and type, times the gene's level of expression.

    The level is a projection of the bin's embedding, 0 for "not expressed", so that gradients reach the embeddings and
    explanations see this path too.
    """

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__()
        self.num_genes = config.num_genes
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.level = nn.Linear(config.hidden_size, 1, bias=False)
        # Says nothing until it has learned something.
        self.output = _start_with(0.0, nn.Linear(config.num_genes, config.num_labels))

    def forward(self, cells: EncodedCells, expression_of_none: Tensor) -> Tensor:
        """Return logits (B, num_labels)."""
        levels = self.level(cells.bin_embeddings - expression_of_none).squeeze(-1)
        return self.output(self.dropout(_by_position(levels, cells, self.num_genes)))

    @torch.no_grad()
    def start(self, bin_embeddings: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Make the levels of the bins ascend evenly from 0 to 1, and set the weights.

        Parameters
        ----------
        bin_embeddings
            (num_bins, hidden), of the bins from "not expressed" up.
        weight, bias
            (num_labels, num_genes) and (num_labels,); zeros when left out.
        """
        wanted = torch.linspace(0, 1, len(bin_embeddings), dtype=torch.float64)[1:, None]
        steps = (bin_embeddings[1:] - bin_embeddings[0]).double().cpu()
        self.level.weight.copy_(torch.linalg.lstsq(steps, wanted, driver="gelsd").solution.T)
        for parameter, value in ((self.output.weight, weight), (self.output.bias, bias)):
            parameter.copy_(torch.zeros_like(parameter) if value is None else value)


def _start_with(gain: float, layer: Layer) -> Layer:
    """Let the model start `layer` with weights of `gain` over the square root of its inputs.

    The gain stands on the layer: transformers starts no module that has no parameters of its own.
    """
    layer.initial_gain = gain  # type: ignore[assignment]
    return layer


def _by_position(values: Tensor, cells: EncodedCells, num_genes: int) -> Tensor:
    """Lay out a value a gene (B, L) by vocabulary position (B, num_genes), 0 where the cell has no token."""
    if cells.is_gene is not None:
        values = values * cells.is_gene.to(values.dtype)
    if cells.gene_ids is None:
        return values
    return values.new_zeros(values.shape[0], num_genes).scatter_add(1, cells.gene_ids, values)
