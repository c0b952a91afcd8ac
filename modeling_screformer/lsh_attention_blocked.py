"""LSH attention that holds a few tiles at a time: plain PyTorch, with a backward pass written by hand.

Shape letters: B cells, H heads, G heads handled together, R hash rounds, L tokens, D head width, W padded width,
N chunks of a group, K bucket size (tokens a chunk), T chunks a tile, S rows of a sorted group.

How it works. Each token's weights over all rounds are one softmax, so that rounds only add up: with a bound M on a
token's scores, output = sum_r sum_j 2^(s_ij - M_i) v_j / sum_r sum_j 2^(s_ij - M_i). Keys have unit length, so M_i is
the length of the query: no maximum is searched, and no round is kept. Everything else rides on the matrix products,
as columns beside the D of the head (see ``_pack``):

* query and key: "-M_i" against "1" subtracts the bound; "1" against "-PENALTY" hides the rows that fill a chunk up.
* value: a column of ones sums the weights; rows that fill up are zero.
* backward, Dao et al. 2022: with bound and sum kept from the forward pass the same product gives the weights again;
  "-sum(gradient * output)" against the ones gives the softmax's gradient.

Tokens are gathered by their order, a chunk sees itself and the one before through a strided view of the sorted rows,
and the results are gathered back. Bytes held: six rows of width W a token and head of a group, and two tiles.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .lsh_hashing import lengths_of_cells, split_heads

LOG2_E = math.log2(math.e)
# Hides a row that fills a chunk up: below any score, and two to this power is zero.
PENALTY = 1e30
# Columns beside the head's own: bound, penalty. The padded width is a multiple of eight, half a cache line.
EXTRA_COLUMNS = 2
WIDTH_STEP = 8
# Chunks of a tile: what two megabytes of cache hold. Other devices want few launches.
CPU_TILE_CHUNKS, TILE_CHUNKS = 64, 2**12
# A smaller sum of weights means that the bound was far above a token's scores; then its largest score is looked up.
SMALLEST_SUM = 2.0**-60
SMALLEST_NORM = 1e-12


def blocked_attention(
    query_key: Tensor, value: Tensor, order: Tensor, *, bucket_size: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Return LSH attention (B, H, L, D) for the token order of :func:`lsh_order` (B, H, R, L); zero at padding.

    The numbers and gradients of ``lsh_attention(implementation="reference")``, whose rules it follows. Half precision
    is computed in single precision and rounded at the end.
    """
    mask = None if attention_mask is None else attention_mask.to(torch.bool)
    return _BlockedAttention.apply(query_key, value, order, mask, bucket_size)


class _BlockedAttention(torch.autograd.Function):
    """Keeps inputs, output, order, and each token's bound and sum of weights, (B, H, L, 2).

    Not the logarithm of the sum: added to a large bound it would lose digits.
    """

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context has no public type
        query_key: Tensor,
        value: Tensor,
        order: Tensor,
        mask: Tensor | None,
        bucket_size: int,
    ) -> Tensor:
        output = _like_heads(query_key)
        normaliser = query_key.new_zeros(*query_key.shape[:3], 2, dtype=_precision(query_key))
        for group in _groups(query_key, mask, bucket_size):
            attended, bound_and_sum = _attend(group, group.rows(query_key), group.rows(value), order)
            group.write(attended, output)
            group.write(bound_and_sum, normaliser)
        ctx.save_for_backward(query_key, value, order, output, normaliser)
        ctx.mask, ctx.bucket_size = mask, bucket_size
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query_key, value, order, *results = ctx.saved_tensors
        grad_query_key, grad_value = _like_heads(query_key), _like_heads(value)
        for group in _groups(query_key, ctx.mask, ctx.bucket_size):
            rows = (group.rows(tensor) for tensor in (query_key, value, *results, grad_output))
            of_query_key, of_value = _differentiate(group, order, *rows)
            group.write(of_query_key, grad_query_key)
            group.write(of_value, grad_value)
        return grad_query_key, grad_value, None, None, None


class _Workspace:
    """Memory that groups hand on: what is freed between two of them goes back to the system, to be cleared again."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Return memory of this shape, with whatever was left in it."""
        size = math.prod(shape)
        if name not in self.memory or len(self.memory[name]) < size:
            self.memory[name] = like.new_empty(size)
        return self.memory[name][:size].view(shape)


class _Group(NamedTuple):
    """Some heads of one cell, handled together."""

    cell: int
    heads: slice
    num_heads: int
    width: int  # tokens a row of the batch, padding included
    length: int  # tokens that are not padding
    is_padding: Tensor | None  # (L,), None where there is none
    bucket_size: int
    tile_chunks: int
    workspace: _Workspace

    @property
    def num_chunks(self) -> int:
        """Chunks of all heads, an empty one between two heads, so that none looks back into another; at least one."""
        return max(self.num_heads * (math.ceil(self.length / self.bucket_size) + 1) - 1, 1)

    def rows(self, tensor: Tensor) -> Tensor:
        """(B, H, L, D) -> this group's tokens, (G L, D), in single precision at least."""
        rows = tensor[self.cell, self.heads].reshape(self.num_heads * self.width, -1)
        return rows.to(_precision(rows))

    def write(self, rows: Tensor, output: Tensor) -> None:
        """Write rows (G L, ...) to their place in (B, H, L, ...); padding becomes zero."""
        rows = rows.unflatten(0, (self.num_heads, self.width))
        if self.is_padding is not None:
            rows = rows.masked_fill(self.is_padding[:, None], 0.0)
        output[self.cell, self.heads] = rows

    def tiles(self) -> Iterator[slice]:
        """Yield the chunks of each tile."""
        for start in range(0, self.num_chunks, self.tile_chunks):
            yield slice(start, min(start + self.tile_chunks, self.num_chunks))

    def take_tile(self, name: str, like: Tensor) -> Tensor:
        """Return memory for a tile's weights, (T, K, 2 K)."""
        size = self.bucket_size
        return self.workspace.take(name, like, min(self.tile_chunks, self.num_chunks), size, 2 * size)

    def take_sorted(self, name: str, operands: "_Operands") -> Tensor:
        """Return memory for one part of the sorted rows, and of the empty chunk before them, (N + 1, K, W)."""
        return self.workspace.take(name, operands.rows, self.num_chunks + 1, self.bucket_size, operands.width)

    def take_sums(self, name: str, operands: "_Operands") -> Tensor:
        """Return zeros for what each token gets, (G L, W)."""
        return self.workspace.take(name, operands.rows, len(operands.rows) - 1, operands.width).zero_()


def _groups(query_key: Tensor, mask: Tensor | None, bucket_size: int) -> Iterator[_Group]:
    batch, heads, width, _ = query_key.shape
    workspace = _Workspace()
    tile_chunks = CPU_TILE_CHUNKS if query_key.device.type == "cpu" else TILE_CHUNKS
    for cell, length in enumerate(lengths_of_cells(mask, batch, width)):
        is_padding = None if mask is None or length == width else ~mask[cell]
        for some in split_heads(heads, length, query_key.device):
            yield _Group(
                cell, some, some.stop - some.start, width, length, is_padding, bucket_size, tile_chunks, workspace
            )


class _Places(NamedTuple):
    """Where tokens are after sorting: ``sources`` (S,) rows to gather, ``places`` (G L,) where each went."""

    sources: Tensor
    places: Tensor


def _sort(group: _Group, order: Tensor, hash_round: int) -> _Places:
    """Lay a round's sorted tokens out in chunks, an empty chunk before each head's."""
    size, length, rows = group.bucket_size, group.length, group.num_heads * group.width
    order_GL = order[group.cell, group.heads, hash_round, :length].long()
    stride = (math.ceil(length / size) + 1) * size
    head = torch.arange(group.num_heads, device=order.device)[:, None]
    sources = torch.full((group.num_heads, stride), rows, dtype=torch.int64, device=order.device)  # a row that fills up
    sources[:, size : size + length] = order_GL + head * group.width
    ranks = torch.arange(length, device=order.device) + head * stride
    places = torch.zeros(group.num_heads, group.width, dtype=torch.int64, device=order.device)
    places.scatter_(1, order_GL, ranks)
    return _Places(sources.view(-1), places.view(-1))


class _Operands(NamedTuple):
    """Queries, keys, values (and gradients) of tokens side by side in a row, each W columns; the last row fills up."""

    rows: Tensor  # (G L + 1, 3 W or 4 W), or (S, 3 W or 4 W) once sorted
    width: int
    bucket_size: int

    def sorted(self, sources: Tensor, workspace: _Workspace) -> "_Operands":
        memory = workspace.take("sorted rows", self.rows, len(sources), self.rows.shape[1])
        return self._replace(rows=torch.index_select(self.rows, 0, sources, out=memory))

    def own(self, part: int, chunks: slice) -> Tensor:
        """Return the rows of a tile's chunks, (T, K, W)."""
        rows = self.rows[self.bucket_size :].unflatten(0, (-1, self.bucket_size))
        return rows[chunks, :, part * self.width : (part + 1) * self.width]

    def window(self, part: int, chunks: slice) -> Tensor:
        """Return what a tile's chunks see: each its predecessor's rows and its own, (T, 2 K, W)."""
        size, total = self.bucket_size, self.rows.shape[1]
        shape, strides = (chunks.stop - chunks.start, 2 * size, self.width), (size * total, total, 1)
        return self.rows.as_strided(shape, strides, chunks.start * size * total + part * self.width)


QUERY, KEY, VALUE, GRADIENT = range(4)


def _pack(
    group: _Group,
    query: Tensor,
    value: Tensor,
    bound: Tensor,
    gradient: Tensor | None = None,
    dot: Tensor | None = None,
) -> _Operands:
    """Put the operands of a group's products side by side.

    ``bound`` (G L, 1) is in powers of two. ``gradient`` (G L, D) is that of the output over the sum of weights, ``dot``
    (G L, 1) its product with the output.
    """
    num_rows, head_width = query.shape
    width = math.ceil((head_width + EXTRA_COLUMNS) / WIDTH_STEP) * WIDTH_STEP
    parts = 3 if gradient is None else 4
    rows = group.workspace.take("rows", bound, num_rows + 1, parts * width).zero_()
    tokens = rows[:-1].unflatten(1, (parts, width))
    head, first, second = slice(0, head_width), slice(head_width, head_width + 1), slice(head_width + 1, head_width + 2)
    torch.mul(query, _scale(head_width), out=tokens[:, QUERY, head])
    tokens[:, QUERY, first] = -bound
    tokens[:, QUERY, second] = 1
    torch.div(query, _norm(query), out=tokens[:, KEY, head])
    tokens[:, KEY, first] = 1
    rows[-1, KEY * width + head_width + 1] = -PENALTY
    tokens[:, VALUE, head] = value
    tokens[:, VALUE, first] = 1
    if gradient is not None and dot is not None:
        tokens[:, GRADIENT, head] = gradient
        tokens[:, GRADIENT, first] = -dot
    return _Operands(rows, width, group.bucket_size)


def _scale(head_width: int) -> float:
    """Return what turns products into powers of two."""
    return LOG2_E / math.sqrt(head_width)


def _norm(query: Tensor) -> Tensor:
    """Return lengths (G L, 1); a product with ones, because reductions over few columns are slow on a CPU."""
    return query.square().mv(query.new_ones(query.shape[1])).sqrt_().clamp_(min=SMALLEST_NORM).unsqueeze(1)


def _attend(group: _Group, query: Tensor, value: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Return attended values (G L, D), and each token's bound, in powers of two, and sum of weights (G L, 2)."""
    head_width = value.shape[-1]
    bound = _norm(query) * _scale(head_width)
    if group.length < 2:  # alone, a token attends to itself
        return value, torch.cat([bound, torch.ones_like(bound)], dim=1)
    sums = _sum_rounds(group, _pack(group, query, value, bound), order)
    is_lost = sums[:, head_width, None] < SMALLEST_SUM
    if group.is_padding is not None:
        is_lost &= ~group.is_padding.repeat(group.num_heads)[:, None]
    if bool(is_lost.any()):
        largest = _largest_scores(group, _pack(group, query, value, torch.zeros_like(bound)), order)
        bound = torch.where(is_lost, largest, bound)
        sums = _sum_rounds(group, _pack(group, query, value, bound), order)
    total = sums[:, head_width, None]
    return sums[:, :head_width] / total, torch.cat([bound, total], dim=1)


def _sum_rounds(group: _Group, operands: _Operands, order: Tensor) -> Tensor:
    """Return each token's weighted sum of values and, in the column after them, of ones, over all rounds, (G L, W)."""
    sums, sorted_sums = group.take_sums("sums", operands), group.take_sorted("sorted sums", operands)[1:]
    tile = group.take_tile("tile", operands.rows)
    for hash_round in range(order.shape[2]):
        sources, places = _sort(group, order, hash_round)
        rows = operands.sorted(sources, group.workspace)
        for chunks in group.tiles():
            weights = _weights(rows, chunks, tile)
            torch.bmm(weights, rows.window(VALUE, chunks), out=sorted_sums[chunks])
        sums += sorted_sums.flatten(0, 1).index_select(0, places)
    return sums


def _largest_scores(group: _Group, operands: _Operands, order: Tensor) -> Tensor:
    """Return each token's largest score over all rounds in powers of two, (G L, 1); the operands' bound is zero."""
    largest = operands.rows.new_full((len(operands.rows) - 1, 1), -math.inf)
    sorted_largest = operands.rows.new_empty(group.num_chunks, group.bucket_size)
    tile = group.take_tile("tile", operands.rows)
    for hash_round in range(order.shape[2]):
        sources, places = _sort(group, order, hash_round)
        rows = operands.sorted(sources, group.workspace)
        for chunks in group.tiles():
            scores = _scores(rows, chunks, tile)
            _own_weights(scores).fill_(-math.inf)
            torch.amax(scores, dim=-1, out=sorted_largest[chunks])
        torch.maximum(largest, sorted_largest.view(-1, 1).index_select(0, places), out=largest)
    return largest


def _scores(rows: _Operands, chunks: slice, tile: Tensor) -> Tensor:
    """Return a tile's scores less their bound, (T, K, 2 K), in the memory of ``tile``."""
    scores = tile[: chunks.stop - chunks.start]
    return torch.bmm(rows.own(QUERY, chunks), rows.window(KEY, chunks).transpose(1, 2), out=scores)


def _weights(rows: _Operands, chunks: slice, tile: Tensor) -> Tensor:
    """Return a tile's softmax weights before division by their sum, (T, K, 2 K), in the memory of ``tile``."""
    weights = _scores(rows, chunks, tile).exp2_()
    _own_weights(weights).zero_()
    return weights


def _own_weights(tile: Tensor) -> Tensor:
    """Return the view of each token's weight for itself, (T, K)."""
    return tile.diagonal(offset=tile.shape[1], dim1=1, dim2=2)


def _differentiate(
    group: _Group, order: Tensor, query: Tensor, value: Tensor, output: Tensor, normaliser: Tensor, gradient: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of a group's query-keys and values, (G L, D); ``gradient`` is that of its output."""
    if group.length < 2:
        return torch.zeros_like(gradient), gradient
    head_width = value.shape[-1]
    bound, total = normaliser.split(1, dim=1)
    gradient = gradient / total  # so that weights need no division
    dot = (gradient * output).sum(dim=-1, keepdim=True)
    sums = _sum_gradients(group, _pack(group, query, value, bound, gradient, dot), order)
    of_query, of_key, of_value = (each[:, :head_width] for each in sums)

    norm = _norm(query)
    key = query / norm
    of_key = of_key / LOG2_E  # it was summed over queries scaled to powers of two
    through_norm = (of_key - key * (key * of_key).sum(dim=-1, keepdim=True)) / norm
    return of_query / math.sqrt(head_width) + through_norm, of_value


def _sum_gradients(group: _Group, operands: _Operands, order: Tensor) -> list[Tensor]:
    """Return the gradients of queries, keys and values, each (G L, W), summed over all rounds."""
    parts = ("queries", "keys", "values")
    sums = [group.take_sums(f"sums of {part}", operands) for part in parts]
    # Each in memory of its own: products written between other columns are several times slower.
    sorted_sums = [group.take_sorted(f"sorted sums of {part}", operands) for part in parts]
    tile, grad_tile = group.take_tile("tile", operands.rows), group.take_tile("gradient tile", operands.rows)
    for hash_round in range(order.shape[2]):
        sources, places = _sort(group, order, hash_round)
        rows = operands.sorted(sources, group.workspace)
        for sorted_sum in sorted_sums:
            sorted_sum[0] = 0  # the empty chunk that the first one looks back at
        for chunks in group.tiles():
            _differentiate_tile(rows, chunks, tile, grad_tile, *sorted_sums)
        for total, sorted_sum in zip(sums, sorted_sums, strict=True):
            total += sorted_sum[1:].flatten(0, 1).index_select(0, places)
    return sums


def _differentiate_tile(
    rows: _Operands,
    chunks: slice,
    tile: Tensor,
    grad_tile: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    of_value: Tensor,
) -> None:
    """Write the gradients of a tile's chunks into (N + 1, K, W) each, and add what their predecessors get."""
    size = rows.bucket_size
    weights = _weights(rows, chunks, tile)
    grad_scores = grad_tile[: chunks.stop - chunks.start]
    query, gradient = rows.own(QUERY, chunks), rows.own(GRADIENT, chunks)
    torch.bmm(gradient, rows.window(VALUE, chunks).transpose(1, 2), out=grad_scores)
    grad_scores *= weights

    own = slice(chunks.start + 1, chunks.stop + 1)
    torch.bmm(grad_scores, rows.window(KEY, chunks), out=of_query[own])
    torch.bmm(grad_scores[:, :, size:].transpose(1, 2), query, out=of_key[own])
    torch.bmm(weights[:, :, size:].transpose(1, 2), gradient, out=of_value[own])
    of_key[chunks].baddbmm_(grad_scores[:, :, :size].transpose(1, 2), query)
    of_value[chunks].baddbmm_(weights[:, :, :size].transpose(1, 2), gradient)


def _like_heads(tensor: Tensor) -> Tensor:
    """Return an empty (B, H, L, D) that lies in memory as (B, L, H, D), so that joining the heads copies nothing."""
    return tensor.new_empty(tensor.transpose(1, 2).shape).transpose(1, 2)


def _precision(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
