"""What lives in memory in each phase of a forward pass or a training step, tensor by tensor as the code makes them.

A phase has two sorts: what every cell of the batch keeps (embeddings, the reversible streams, their gradients, token
orders, a head's activations), and what the block of tokens needs that is being worked on (see token_blocks.py), which
on a CPU does not grow with the batch. Where the model's code changes what it keeps, this changes with it; the tests
compare both.

In comments, a stream is one (B, L, hidden) of the reversible encoder, always in single precision. ``item`` is the bytes
of the numbers that matrices are multiplied in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import nn

from screformer.configuration_screformer import ScReformerConfig
from screformer.lsh_attention import EXACT_QUERY_BLOCK
from screformer.lsh_attention_blocked import CPU_TILE_CHUNKS, EXTRA_COLUMNS, TILE_CHUNKS, WIDTH_STEP
from screformer.lsh_hashing import num_hash_columns, split_heads
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM, ScReformerModel
from screformer.token_blocks import most_tokens

Head = Literal["masked_lm", "cell_classification"]
Precision = Literal["float32", "bfloat16"]

MODELS = {
    None: ScReformerModel,
    "masked_lm": ScReformerForMaskedLM,
    "cell_classification": ScReformerForCellClassification,
}
SINGLE, INT64, INT32, INT16 = 4, 8, 4, 2  # bytes


class Weights(NamedTuple):
    """Bytes of a model's tensors that stay."""

    parameters: int
    buffers: int
    head: int  # parameters of the head
    layer: int  # parameters of one encoder layer

    @property
    def total(self) -> int:
        """All of them but gradients."""
        return self.parameters + self.buffers


def count_weights(config: ScReformerConfig, head: Head | None) -> Weights:
    """Return the sizes of a model's tensors, from one built without memory."""
    with torch.device("meta"):
        model = MODELS[head](copy.deepcopy(config))
    encoder = model if head is None else model.screformer

    def of(module: nn.Module) -> int:
        return sum(parameter.nbytes for parameter in module.parameters())

    parameters = of(model)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return Weights(parameters, buffers, parameters - of(encoder), of(encoder.encoder.layers[0]))


class Phase(NamedTuple):
    """A moment of a step, with what lives then."""

    name: str
    per_cell: int
    working: int


@dataclass(frozen=True, kw_only=True)
class MemoryAccount:
    """Adds up what lives in each phase of a step; all results are bytes. Fields as for `predict_memory`."""

    config: ScReformerConfig
    weights: Weights
    num_tokens: int
    batch_size: int
    training: bool
    dtype: Precision
    head: Head | None
    device_type: str

    def phases(self) -> Iterator[Phase]:
        """Yield every phase that may be the one that needs most."""
        if not self.training:
            return self._inference_phases()
        return self._reversible_phases() if self.config.reversible else self._stored_phases()

    @property
    def _on_cpu(self) -> bool:
        return self.device_type == "cpu"

    @property
    def _is_expressed(self) -> bool:
        """Whether a cell has only some genes; then cells differ in length."""
        return self.num_tokens < self.config.num_genes

    @property
    def _is_padded(self) -> bool:
        return self._is_expressed and self.batch_size > 1

    @property
    def _is_cast(self) -> bool:
        return self.dtype == "bfloat16"

    @property
    def _item(self) -> int:
        return 2 if self._is_cast else SINGLE

    @property
    def _block_tokens(self) -> int:
        """Tokens of the cells that attention handles at once, as `plan_blocks` cuts them."""
        cells = max(1, most_tokens(self.device_type)[0] // self.num_tokens)
        return min(self.batch_size, cells) * self.num_tokens

    @property
    def _heads_together(self) -> int:
        """Heads of a cell that are hashed, and attend, at once."""
        return next(split_heads(self.config.num_attention_heads, self.num_tokens, torch.device(self.device_type))).stop

    @property
    def _feed_tokens(self) -> int:
        return min(self.batch_size * self.num_tokens, most_tokens(self.device_type)[1])

    # --- what each cell keeps ---

    @property
    def _stream(self) -> int:
        """A stream of one cell."""
        return self.num_tokens * self.config.hidden_size * SINGLE

    @property
    def _order_entries(self) -> int:
        """Numbers of one cell's token order in one layer."""
        if self.config.attention == "exact":
            return 0
        return self.config.num_attention_heads * self.config.num_hashes * self.num_tokens

    def _inputs(self) -> int:
        """Token ids; gene ids and mask beside them where a cell has only some genes; labels of masked genes."""
        columns = 3 if self._is_expressed else 1
        return (columns + (self.training and self.head == "masked_lm")) * self.num_tokens * INT64

    def _noise(self, num_bytes: int) -> int:
        """Return what dropout keeps of a tensor: factors on a CPU, a byte each elsewhere."""
        if not self._drops:
            return 0
        return num_bytes if self._on_cpu else num_bytes // SINGLE

    @property
    def _drops(self) -> bool:
        return self.training and self.config.hidden_dropout_prob > 0

    def _inference_phases(self) -> Iterator[Phase]:
        # The bins' embeddings and the sum with the genes' live as long as the encoder runs. A layer reads two streams
        # and makes two; the first layer reads the embeddings themselves.
        read = 2 + (2 if self.config.num_hidden_layers > 1 else 0)
        kept = self._inputs() + self._order_entries * INT32
        yield Phase("attention", kept + (read + 1) * self._stream, self._attention_forward())
        yield Phase("feed-forward", kept + (read + 2) * self._stream, self._feed_forward_forward())

    def _reversible_phases(self) -> Iterator[Phase]:
        layers, newest_order = self.config.num_hidden_layers, self._order_entries * INT32
        orders = self._order_entries * (INT16 if self.num_tokens <= torch.iinfo(torch.int16).max else INT32)
        kept = self._inputs() + self._noise(self._stream)
        before = kept + (layers - 1) * orders + newest_order
        read = 2 + (2 if layers > 1 else 0)  # as in inference
        yield Phase("attention, forward", before + (read + 1) * self._stream, self._attention_forward())
        yield Phase("feed-forward, forward", before + (read + 2) * self._stream, self._feed_forward_forward())
        after = kept + layers * orders
        yield self._head_phase(after + 2 * self._stream)
        # The last layer: its outputs, which autograd keeps, and their copies to rebuild the inputs in; the gradient of
        # their mean, and a copy for each stream. Gradients of its parameters: sums over blocks, and those of a block.
        after += 7 * self._stream
        gradients = 2 * self.weights.layer
        yield Phase("attention, backward", after, self._attention_backward() + gradients)
        yield Phase("feed-forward, backward", after, self._feed_forward_backward() + gradients)

    def _stored_phases(self) -> Iterator[Phase]:
        """Without reversible layers, autograd keeps both streams and what the branches have made, of every layer."""
        hidden = self.num_tokens * self.config.hidden_size
        attention = self._attention_saved(self.num_tokens) + self._order_entries * INT32
        feed_forward = self._feed_forward_saved(self.num_tokens)
        layer = 2 * self._stream + attention + feed_forward + 2 * self._noise(hidden * self._item)
        embedded = self._inputs() + self._noise(self._stream) + self._stream
        yield self._head_phase(embedded + self.config.num_hidden_layers * layer)
        # The last layer's feed-forward branch is done with; both streams have gradients.
        kept = embedded + (self.config.num_hidden_layers - 1) * layer + attention + 2 * self._stream
        of_block = self._attention_backward() - self._attention_saved(self._block_tokens)
        yield Phase("attention, backward", kept, of_block + self.weights.layer)

    def _head_phase(self, kept: int) -> Phase:
        """The head's backward pass: what the encoder keeps, its output, and the head's own activations."""
        config, tokens = self.config, self.num_tokens
        per_cell = kept + self._stream
        if self.head == "masked_lm":
            # Normalised, dense, GELU, and the gradient of the last; logits, their log-softmax and its gradient.
            per_cell += 4 * tokens * config.hidden_size * self._item + 3 * tokens * config.num_bins * SINGLE
        else:
            # Normalised vectors, laid out anew for the convolution, and the gradients of both.
            per_cell += 4 * self._stream
        return Phase("head, backward", per_cell, self.weights.head)

    # --- what a block of tokens needs while it is worked on ---

    def _attention_forward(self) -> int:
        tokens = self._block_tokens
        norm, compute = (tokens * self.config.hidden_size * item for item in (SINGLE, self._item))
        projected = norm + 2 * compute  # normalised, query-key, value
        if self.config.attention == "exact":
            # Unit keys, and attended values before and after their blocks are joined.
            bias = self._exact_bias(EXACT_QUERY_BLOCK, tokens) + self._exact_bias_making()
            cleared = 2 * compute if self._is_padded else 0  # query-key and value, zero at padding
            return projected + cleared + 3 * compute + bias
        order = tokens // self.num_tokens * self._order_entries * INT32
        normalisers = 2 * tokens * self.config.num_attention_heads * SINGLE  # each token's bound and sum of weights
        attended = projected + order + compute
        return max(
            projected + order + self._hashing(),
            attended + normalisers + self._group(backward=False),
            attended + compute + (compute + self._noise(compute) if self._drops else 0),
        )

    def _attention_backward(self) -> int:
        """The most that the branch needs while its activations are made again and then differentiated."""
        tokens = self._block_tokens
        compute = tokens * self.config.hidden_size * self._item
        saved = self._attention_saved(tokens)
        # The branch's output, the gradients of what was attended, of query-key and of value.
        gradients = 4 * compute
        if self.config.attention == "exact":
            # Each block of queries has gradients of all keys and values, beside their sums.
            cleared = 2 * compute if self._is_padded else 0  # query-key and value before padding is cleared
            return saved + max(cleared + self._exact_bias_making(), gradients + 2 * compute)
        return saved + gradients + self._group(backward=True)

    def _attention_saved(self, tokens: int) -> int:
        """What autograd keeps of the branch, without dropout's factors: those are used up first."""
        norm, compute = (tokens * self.config.hidden_size * item for item in (SINGLE, self._item))
        normalised = 2 * compute if self._is_cast else norm  # cast once for each projection
        saved = normalised + 3 * compute  # query-key, value, attended
        if self.config.attention == "exact":
            return saved + compute + self._exact_bias(self.num_tokens, tokens)  # unit keys
        return saved + 2 * tokens * self.config.num_attention_heads * SINGLE  # bounds and sums of weights

    def _feed_forward_forward(self) -> int:
        norm, compute, inner = self._feed_sizes(self._feed_tokens)
        # The normalised block, and a matrix product's input and output.
        return norm + (compute if self._is_cast else 0) + max(2 * inner, inner + compute, 3 * compute)

    def _feed_forward_saved(self, tokens: int) -> int:
        norm, compute, inner = self._feed_sizes(tokens)
        return (compute if self._is_cast else norm) + 2 * inner

    def _feed_forward_backward(self) -> int:
        _, compute, inner = self._feed_sizes(self._feed_tokens)
        # The branch's output and its gradient, dropout undone; the gradients before and after the activation.
        return self._feed_forward_saved(self._feed_tokens) + 3 * compute + 2 * inner

    def _feed_sizes(self, tokens: int) -> tuple[int, int, int]:
        hidden, inner = self.config.hidden_size, self.config.intermediate_size
        return tokens * hidden * SINGLE, tokens * hidden * self._item, tokens * inner * self._item

    def _exact_bias(self, queries: int, tokens: int) -> int:
        """What keeps tokens from attending to themselves and to padding, (B, 1, queries, L); B is 1 without padding."""
        cells = tokens // self.num_tokens if self._is_padded else 1
        return cells * min(queries, self.num_tokens) * self.num_tokens * self._item

    def _exact_bias_making(self) -> int:
        """What a block of queries' bias is made from: zeros, and where there is no padding also truth values."""
        values = min(EXACT_QUERY_BLOCK, self.num_tokens) * self.num_tokens
        return values * (self._item if self._is_padded else self._item + 1)

    def _hashing(self) -> int:
        """Projections of some heads on the hash directions; in sign hashing their signs too, as truth and as 0 or 1."""
        config = self.config
        columns = num_hash_columns(self.num_tokens, config.bucket_size, config.hashing)
        vectors = self._heads_together * self.num_tokens
        # Half precision is hashed in single precision.
        copied = vectors * config.head_dim * SINGLE if self._is_cast else 0
        if config.hashing == "sign":
            projections = vectors * config.num_hashes * columns
            return copied + projections * (SINGLE + 1 + SINGLE)
        # One round's and its absolute values; nearest directions of all rounds, twice to put them together.
        return copied + vectors * (columns * 2 * SINGLE + 2 * config.num_hashes * INT64)

    def _group(self, *, backward: bool) -> int:
        """What some heads of a cell need at once; see lsh_attention_blocked.py."""
        config, size = self.config, self.config.bucket_size
        tile_chunks, heads = CPU_TILE_CHUNKS if self._on_cpu else TILE_CHUNKS, self._heads_together
        chunks = heads * (math.ceil(self.num_tokens / size) + 1)
        width = math.ceil((config.head_dim + EXTRA_COLUMNS) / WIDTH_STEP) * WIDTH_STEP
        rows, sorted_rows = heads * self.num_tokens, chunks * size
        tile = min(tile_chunks, chunks) * size * 2 * size * SINGLE
        parts, sums, tiles, copied = (4, 3, 2, 4) if backward else (3, 1, 1, 2)
        # Heads together are copied out of (B, L, H, D), one alone is not.
        copies = copied * rows * config.head_dim * SINGLE if heads > 1 or self._is_cast else 0
        copies += rows * config.head_dim * SINGLE if backward else 0  # the gradient over the sum of weights
        packed, totals = parts * rows * width * SINGLE, sums * rows * width * SINGLE
        sorted_operands = parts * sorted_rows * width * SINGLE
        sorted_totals = sums * sorted_rows * width * SINGLE
        # In a round: its order, and its sums put in the order of tokens. After the rounds: the results, in the backward
        # pass with unit keys, their gradients, and three steps from those to the gradient of what was scaled.
        in_a_round = (rows + sorted_rows) * INT64 + rows * width * SINGLE
        after_rounds = (5 if backward else 1) * rows * config.head_dim * SINGLE
        transient = max(in_a_round, after_rounds)
        return copies + packed + totals + sorted_operands + sorted_totals + tiles * tile + transient
