"""scReformer-BERT (Li et al. 2025): embeddings, reversible LSH encoder, heads for masked bins and for cell types."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import MaskedLMOutput, ModelOutput, SequenceClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .cell_classifier import NO_EXPRESSION, EncodedCells, PooledPath, ScReformerClassificationHead
from .configuration_screformer import ScReformerConfig
from .lsh_attention import draw_rotations, exact_attention, lsh_attention, lsh_order
from .reversible import ReversibleSequence, Streams, TokenOrders


@dataclass
class ScReformerModelOutput(ModelOutput):
    """Output of :class:`ScReformerModel`.

    Attributes
    ----------
    last_hidden_state
        (B, L, hidden): a vector a gene, the mean of the two reversible streams; zero at padding.
    cell_embedding
        (B, hidden): mean of ``last_hidden_state`` over the cell's expressed genes; zero for a cell without any.
    hidden_states
        The embeddings and each layer's (B, L, hidden), if asked for.
    """

    last_hidden_state: Tensor | None = None
    cell_embedding: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class ScReformerClassifierOutput(SequenceClassifierOutput):
    """Output of :class:`ScReformerForCellClassification`: transformers' own, and the encoder's vector of each cell.

    Attributes
    ----------
    cell_embedding
        (B, hidden), see :class:`ScReformerModelOutput`.
    """

    cell_embedding: Tensor | None = None


class ScReformerEmbeddings(nn.Module):
    """Sum of gene identity, expression bin and sinusoidal position (section 2.3.3)."""

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__()
        self.num_genes = config.num_genes
        self.bin_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.gene_embeddings = nn.Embedding(config.num_genes, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.register_buffer("positions", sinusoidal_positions(config.num_genes, config.hidden_size), persistent=False)
        self.positions: Tensor

    def forward(self, bin_embeddings: Tensor, gene_ids: Tensor | None) -> Tensor:
        """Return the input of the encoder, (B, L, hidden); without ``gene_ids`` the tokens are all genes in order."""
        if gene_ids is None:
            genes, positions = self.gene_embeddings.weight, self.positions
        else:
            genes, positions = self.gene_embeddings(gene_ids), nn.functional.embedding(gene_ids, self.positions)
        genes = (genes + positions).to(genes.dtype)  # positions stay float32 where weights are loaded in half precision
        return self.dropout(bin_embeddings + genes)


def sinusoidal_positions(num_positions: int, width: int) -> Tensor:
    """Return the sinusoids of Vaswani et al. 2017, (positions, width): sines in even columns, cosines in odd."""
    frequencies = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10_000.0) / width))
    angles = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(num_positions, width).float()


class ScReformerAttention(nn.Module):
    """Multi-head attention with shared query-key, by LSH or exact as the configuration says."""

    def __init__(self, config: ScReformerConfig, layer_index: int) -> None:
        super().__init__()
        self.num_heads, self.bucket_size = config.num_attention_heads, config.bucket_size
        self.is_exact, self.hashing = config.attention == "exact", config.hashing
        self.rotation_shape = (config.num_hashes, config.head_dim, config.max_hash_columns)
        self.rotation_seed = config.hash_seed + layer_index
        self.query_key = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.value = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        # In the checkpoint even where attention is exact: the same weights serve both kinds.
        self.register_buffer("rotations", self.draw_rotations())
        self.rotations: Tensor

    def draw_rotations(self) -> Tensor:
        """Return this layer's hash directions, (rounds, head width, columns), as the configuration's seed has them."""
        return draw_rotations(*self.rotation_shape, seed=self.rotation_seed)

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return query-key and value, each (B, H, L, head width), of states (B, L, hidden)."""
        return self._split(self.query_key(hidden_states)), self._split(self.value(hidden_states))

    def forward(
        self, query_key: Tensor, value: Tensor, attention_mask: Tensor | None, order: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attended states (B, L, hidden) and the token order used (None if exact)."""
        if self.is_exact:
            attended = exact_attention(query_key, value, attention_mask=attention_mask)
        else:
            if order is None:
                order = lsh_order(
                    query_key,
                    self.rotations,
                    bucket_size=self.bucket_size,
                    attention_mask=attention_mask,
                    hashing=self.hashing,
                )
            attended = lsh_attention(
                query_key,
                value,
                self.rotations,
                bucket_size=self.bucket_size,
                attention_mask=attention_mask,
                order=order,
            )
        return self.output(attended.transpose(1, 2).flatten(2)), order

    def _split(self, projected: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, H, L, head width)."""
        return projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class ScReformerLayer(nn.Module):
    """One reversible layer: attention and feed-forward branches, each on a normalised stream."""

    def __init__(self, config: ScReformerConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = ScReformerAttention(config, layer_index)
        self.attention_dropout = nn.Dropout(config.hidden_dropout_prob)
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = nn.Sequential(
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.GELU(),
            nn.Linear(config.intermediate_size, config.hidden_size),
            nn.Dropout(config.hidden_dropout_prob),
        )

    def attend(
        self, hidden_states: Tensor, attention_mask: Tensor | None, order: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention branch's output and the token order it used."""
        query_key, value = self.project(hidden_states)
        attended, order = self.attention(query_key, value, attention_mask, order)
        return self.attention_dropout(attended), order

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return query-key and value of the normalised states."""
        return self.attention.project(self.attention_norm(hidden_states))

    def feed(self, hidden_states: Tensor) -> Tensor:
        """Return the feed-forward branch's output."""
        return self.feed_forward(self.feed_forward_norm(hidden_states))


class ScReformerPreTrainedModel(PreTrainedModel):
    """Loading, saving and initial weights, shared by the encoder and its heads."""

    config: ScReformerConfig
    config_class = ScReformerConfig
    base_model_prefix = "screformer"
    main_input_name = "input_ids"
    # Reversible layers run inside one function of autograd, which knows one device.
    _no_split_modules = ["ReversibleSequence"]  # noqa: RUF012 - transformers' own form
    # Rounded hash directions would sort genes into other buckets.
    _keep_in_fp32_modules_strict = ["rotations"]  # noqa: RUF012
    # The encoder of a checkpoint opens without its heads, and no head is a surprise there.
    _keys_to_ignore_on_load_unexpected = [r"^classifier\.", r"^head\."]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear | nn.Conv1d):
            gain = getattr(module, "initial_gain", 1.0)
            init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
        elif isinstance(module, ScReformerEmbeddings):
            for table in (module.bin_embeddings, module.gene_embeddings):
                init.normal_(table.weight, std=self.config.embedding_initializer_range)
            init.copy_(module.positions, sinusoidal_positions(*module.positions.shape))
        elif isinstance(module, ScReformerAttention):
            init.copy_(module.rotations, module.draw_rotations())
        elif isinstance(module, PooledPath):
            init.zeros_(module.center)
            init.ones_(module.scale)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Raise ValueError: the layers are reversible, so that there is nothing left to save."""
        msg = (
            f"{type(self).__name__} got activation checkpointing, which it does not need: with reversible=True, its "
            "default, a layer's activations are computed again in the backward pass and not stored. Leave it out."
        )
        raise ValueError(msg)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> nn.Module:
        """Return the bin embeddings; their number is part of the configuration, so that another one is a ValueError."""
        if new_num_tokens not in (None, self.config.vocab_size):
            msg = (
                f"new_num_tokens got {new_num_tokens}; tokens are the {self.config.num_bins} expression bins, [PAD] "
                "and [MASK]. Make a new model with another num_bins instead."
            )
            raise ValueError(msg)
        return self.get_input_embeddings()


class ScReformerModel(ScReformerPreTrainedModel):
    """The encoder: cells as bins and genes to a vector a gene and a vector a cell.

    The same cell gives the same output whatever its batch, padding or the order of its genes: hashing has fixed
    rotations, and genes are put in vocabulary order before they are sorted into buckets.

    Parameters
    ----------
    config
        The shape; see :class:`ScReformerConfig`.

    Examples
    --------
    >>> import torch
    >>> model = ScReformerModel(ScReformerConfig.preset("tiny", num_genes=100)).eval()
    >>> output = model(torch.randint(0, 6, (2, 100)))
    >>> output.last_hidden_state.shape, output.cell_embedding.shape
    (torch.Size([2, 100, 32]), torch.Size([2, 32]))
    """

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__(config)
        self.embeddings = ScReformerEmbeddings(config)
        self.encoder = ReversibleSequence(ScReformerLayer(config, index) for index in range(config.num_hidden_layers))
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the bin embeddings."""
        return self.embeddings.bin_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the bin embeddings."""
        self.embeddings.bin_embeddings = value

    @torch.no_grad()
    def set_gene_embeddings(self, vectors: Tensor) -> None:
        """Start the gene identity embeddings from given vectors, for example Gene2vec's (section 2.3.3).

        Parameters
        ----------
        vectors
            (num_genes, hidden), in vocabulary order. A row of NaN leaves that gene's random vector. Known rows are
            scaled together to the configured initial standard deviation, so that no part of the sum drowns another.

        Raises
        ------
        ValueError
            For another shape.
        """
        weight = self.embeddings.gene_embeddings.weight
        if vectors.shape != weight.shape:
            msg = f"vectors got shape {tuple(vectors.shape)}; this model's gene embeddings are {tuple(weight.shape)}."
            raise ValueError(msg)
        is_known = ~vectors.isnan().any(dim=-1)
        known = vectors[is_known].to(weight)
        weight[is_known] = known * (self.config.embedding_initializer_range / known.std())

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        gene_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | None = None,
        token_orders: TokenOrders | None = None,
        **kwargs: Any,  # what transformers passes to every model, for example num_items_in_batch
    ) -> ScReformerModelOutput:
        """Encode cells.

        Parameters
        ----------
        input_ids
            (B, L) bin ids, or [MASK] and [PAD].
        gene_ids
            (B, L) positions in the gene vocabulary, in any order. Without them the tokens are all ``num_genes`` genes.
        attention_mask
            (B, L), 1 for genes, 0 for padding; default all genes.
        inputs_embeds
            (B, L, hidden) instead of the bins' embeddings (gene and position are still added), for explanations. With
            ``input_ids`` beside them, those say which genes are expressed; otherwise every gene counts as expressed.
        output_hidden_states
            Also return each layer's output; this stores all activations.
        token_orders
            Takes down which tokens attended to which, or says it; see :class:`TokenOrders`.

        Raises
        ------
        ValueError
            When shapes or ids do not fit the model; attentions asked for (LSH attention has no dense matrix).
        """
        asked = kwargs.get("output_attentions")
        if self.config.output_attentions if asked is None else asked:
            msg = "output_attentions=True: LSH attention never builds the (L, L) matrix. Leave it out."
            raise ValueError(msg)
        shape = self._check_inputs(input_ids, gene_ids, attention_mask, inputs_embeds)
        order = self._vocabulary_order(gene_ids, attention_mask)
        bins = self.embeddings.bin_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        # In the order they came, so that gradients reach the first hidden state.
        embedded = self.embeddings(bins, gene_ids).expand(*shape, -1)
        tokens, mask = embedded, None if attention_mask is None else attention_mask.bool()
        if order is not None:
            tokens, mask = _reorder(embedded, order), None if mask is None else mask.gather(1, order)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_hidden_states:
            every = [_mean(streams) for streams in self.encoder.iterate(tokens, mask, token_orders)]
        else:
            streams = self.encoder(tokens, mask, reversible=self.config.reversible, token_orders=token_orders)
            every = [_mean(streams)]
        if order is not None:
            place = order.argsort(dim=1)
            every = [_reorder(states, place) for states in every]
        last = every[-1] if attention_mask is None else every[-1] * attention_mask.unsqueeze(-1).to(every[-1].dtype)
        return ScReformerModelOutput(
            last_hidden_state=last,
            cell_embedding=_mean_of_expressed(last, input_ids, attention_mask),
            hidden_states=(embedded, *every[:-1], last) if output_hidden_states else None,
        )

    def _check_inputs(
        self,
        input_ids: Tensor | None,
        gene_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> torch.Size:
        """Return (B, L) or raise ValueError."""
        num_genes = self.config.num_genes
        if input_ids is None and inputs_embeds is None:
            raise ValueError(
                "input_ids and inputs_embeds are both None; give input_ids, as the tokenizer returns them."
            )
        shape = input_ids.shape if input_ids is not None else inputs_embeds.shape[:2]  # type: ignore[union-attr]
        if len(shape) != 2:
            raise ValueError(f"input_ids got shape {tuple(shape)}; it must be (cells, genes).")
        for name, tensor in (("gene_ids", gene_ids), ("attention_mask", attention_mask)):
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} got shape {tuple(tensor.shape)}; it must be that of input_ids, {tuple(shape)}."
                )
        if inputs_embeds is not None and inputs_embeds.shape != (*shape, self.config.hidden_size):
            expected = (*shape, self.config.hidden_size)
            raise ValueError(f"inputs_embeds got shape {tuple(inputs_embeds.shape)}; it must be {expected}.")
        if gene_ids is None and shape[1] != num_genes:
            msg = (
                f"input_ids got {shape[1]} genes a cell and no gene_ids; without gene_ids a cell has all {num_genes} "
                "genes in vocabulary order. Pass the gene_ids that the tokenizer returned."
            )
            raise ValueError(msg)
        remedy = "Use the tokenizer that was saved with the model"
        _check_range("gene_ids", gene_ids, num_genes, f"{remedy}.")
        _check_range("input_ids", input_ids, self.config.vocab_size, f"{remedy} (not raw counts).")
        return torch.Size(shape)

    def _vocabulary_order(self, gene_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor | None:
        """Return the order that sorts each cell's genes by position, padding last; None if they are sorted."""
        if gene_ids is None:
            return None
        key = gene_ids if attention_mask is None else gene_ids.masked_fill(attention_mask == 0, self.config.num_genes)
        if _may_look_at_numbers() and bool((key[:, 1:] >= key[:, :-1]).all()):
            return None
        return key.argsort(dim=1, stable=True)


def _check_range(name: str, ids: Tensor | None, size: int, remedy: str) -> None:
    """Raise ValueError for ids outside 0 to ``size`` - 1, where numbers may be looked at."""
    if ids is None or ids.numel() == 0 or not _may_look_at_numbers():
        return
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or highest >= size:
        raise ValueError(f"{name} got {lowest} to {highest}; this model knows 0 to {size - 1}. {remedy}")


def _may_look_at_numbers() -> bool:
    """Whether Python may read tensors: neither ``torch.compile`` nor the recording of a CUDA graph allows it."""
    is_recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return not (torch.compiler.is_compiling() or is_recording)


def _mean(streams: Streams) -> Tensor:
    return (streams.first + streams.second) / 2


def _reorder(states: Tensor, order: Tensor) -> Tensor:
    """Take tokens (B, L, hidden) in the given order (B, L)."""
    return states.gather(1, order.unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def _mean_of_expressed(states: Tensor, input_ids: Tensor | None, attention_mask: Tensor | None) -> Tensor:
    weight = states.new_ones(states.shape[:2])
    if input_ids is not None:
        weight = weight * (input_ids != NO_EXPRESSION)
    if attention_mask is not None:
        weight = weight * attention_mask
    return (states * weight.unsqueeze(-1)).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)


class ScReformerMaskedLMHead(nn.Module):
    """Predicts a gene's bin from its vector."""

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = nn.GELU()
        self.decoder = nn.Linear(config.hidden_size, config.num_bins)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(B, L, hidden) -> (B, L, num_bins)."""
        return self.decoder(self.activation(self.dense(self.norm(hidden_states))))


class ScReformerForMaskedLM(ScReformerPreTrainedModel):
    """Encoder with a head that predicts masked expression bins (sections 2.6, 2.7)."""

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__(config)
        self.screformer = ScReformerModel(config)
        self.head = ScReformerMaskedLMHead(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        gene_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Predict bins: logits (B, L, num_bins).

        Parameters
        ----------
        input_ids, gene_ids, attention_mask, inputs_embeds, output_hidden_states
            As for :class:`ScReformerModel`.
        labels
            (B, L) original bins, -100 where there is nothing to predict; the loss is the mean cross-entropy elsewhere.
        """
        encoded = self.screformer(
            input_ids, gene_ids, attention_mask, inputs_embeds, output_hidden_states, return_dict=True, **kwargs
        )
        logits = self.head(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.num_bins, **kwargs)
        return MaskedLMOutput(loss=loss, logits=logits, hidden_states=encoded.hidden_states)


class ScReformerForCellClassification(ScReformerPreTrainedModel):
    """Encoder with the paper's cell type classifier; ``AutoModelForSequenceClassification`` opens it.

    Label names are the configuration's ``id2label``.
    """

    _no_split_modules = ["ScReformerModel", "ScReformerClassificationHead"]  # noqa: RUF012
    # Averages of many genes differ little between cells.
    _keep_in_fp32_modules_strict = ["rotations", "pooled_path.center", "pooled_path.scale"]  # noqa: RUF012

    def __init__(self, config: ScReformerConfig) -> None:
        super().__init__(config)
        # By the class name alone transformers would choose the loss of causal language models, which shifts labels.
        self.loss_type = "ForSequenceClassification"
        self.screformer = ScReformerModel(config)
        self.classifier = ScReformerClassificationHead(config)
        if config.problem_type is None:
            config.problem_type = "single_label_classification" if config.num_labels > 1 else "regression"
        elif config.problem_type == "single_label_classification" and config.num_labels == 1:
            warnings.warn(
                "num_labels is 1 with problem_type='single_label_classification': there is nothing to choose, and the "
                "loss is always 0. Give two labels or more, or problem_type='regression'.",
                stacklevel=2,
            )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        gene_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> ScReformerClassifierOutput:
        """Predict cell types: logits (B, num_labels).

        Parameters
        ----------
        input_ids, gene_ids, attention_mask, inputs_embeds, output_hidden_states
            As for :class:`ScReformerModel`.
        labels
            (B,) label ids; the loss is the mean cross-entropy. With the configuration's
            ``problem_type="multi_label_classification"`` (B, num_labels) of 0.0 and 1.0, with ``"regression"`` numbers.

        Raises
        ------
        ValueError
            When shapes or ids do not fit the model.
        """
        encoded = self.screformer(
            input_ids, gene_ids, attention_mask, inputs_embeds, output_hidden_states, return_dict=True, **kwargs
        )
        logits = self.classifier(
            self._encoded_cells(encoded.last_hidden_state, input_ids, gene_ids, attention_mask, inputs_embeds),
            self.get_input_embeddings().weight[NO_EXPRESSION],
        )
        loss = None
        if labels is not None:
            self._check_labels(labels, len(logits))
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config, **kwargs)
            num_items = kwargs.get("num_items_in_batch")
            if num_items is not None and self.config.problem_type != "single_label_classification":
                # transformers' loss is a mean of this batch here; the Trainer adds batches up, as shares of a step.
                loss = loss * (labels.numel() / num_items)
        return ScReformerClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, cell_embedding=encoded.cell_embedding
        )

    def _check_labels(self, labels: Tensor, num_cells: int) -> None:
        """Raise ValueError where labels are not as many as the kind of problem has."""
        problem_type, num_labels = self.config.problem_type, self.config.num_labels
        is_one_a_cell = problem_type == "single_label_classification" or num_labels == 1
        expected = (num_cells,) if is_one_a_cell else (num_cells, num_labels)
        if labels.numel() != math.prod(expected):
            msg = (
                f"labels got shape {tuple(labels.shape)}; with problem_type={problem_type!r} and {num_labels} labels "
                f"it must be {expected}. Cells with several labels need problem_type='multi_label_classification'."
            )
            raise ValueError(msg)

    def start_linear_path(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Start the classifier's linear path: given weights, or zeros, and levels that ascend evenly with the bins.

        Parameters
        ----------
        weight, bias
            (num_labels, num_genes) and (num_labels,), as of a logistic regression whose features are bin / highest bin.

        Raises
        ------
        ValueError
            The configuration's `classifier_paths` have no "linear".
        """
        if self.classifier.linear_path is None:
            paths = self.config.classifier_paths
            raise ValueError(f"classifier_paths got {paths}; add 'linear' to have a linear path to start.")
        bins = self.get_input_embeddings().weight[: self.config.num_bins]
        self.classifier.linear_path.start(bins, weight, bias)

    @torch.no_grad()
    def pool_cells(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return what the classifier's pooled path reads of a batch, (B, 2 hidden), before it is centred and scaled.

        Parameters
        ----------
        batch
            ``input_ids``, and ``gene_ids`` and ``attention_mask`` if there are any.

        Raises
        ------
        ValueError
            The configuration's `classifier_paths` have no "pooled".
        """
        if self.classifier.pooled_path is None:
            paths = self.config.classifier_paths
            raise ValueError(f"classifier_paths got {paths}; add 'pooled' to have a pooled path.")
        tokens = batch["input_ids"], batch.get("gene_ids"), batch.get("attention_mask")
        states = self.screformer(*tokens, return_dict=True).last_hidden_state
        return self.classifier.pooled_path.pool(self._encoded_cells(states, *tokens, None))

    def _encoded_cells(
        self,
        hidden_states: Tensor,
        input_ids: Tensor | None,
        gene_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
    ) -> EncodedCells:
        bins = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds
        is_gene = None if attention_mask is None else attention_mask.bool()
        is_expressed = torch.ones(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        if input_ids is not None:
            is_expressed = input_ids != NO_EXPRESSION
        if is_gene is not None:
            is_expressed = is_expressed & is_gene
        return EncodedCells(hidden_states, bins, gene_ids, is_gene, is_expressed)


ScReformerModel.register_for_auto_class("AutoModel")
ScReformerForMaskedLM.register_for_auto_class("AutoModelForMaskedLM")
ScReformerForCellClassification.register_for_auto_class("AutoModelForSequenceClassification")
