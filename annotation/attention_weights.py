"""The attention probabilities of a running model, from what its attention modules are given; no model code is repeated.

The rule is that of lsh_attention.py: queries and unit keys of the same vectors, chunks of sorted tokens that look one
chunk back, rounds joined by their softmax denominators, a token itself only when it has nothing else, padding last.

Shape letters: B cells, H heads, R hash rounds, L tokens, D head width, N chunks, K bucket size, G tokens asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from screformer.lsh_attention import SELF_SCORE, look_one_back, to_chunks, unit_vectors
from screformer.modeling_screformer import ScReformerAttention, ScReformerModel

# Bounds what is held at once: scores (32 MB each copy; with their keys 100 MB), and sums of pairs (8 MB).
MOST_SCORES, MOST_SUMS = 2**23, 2**20


class AttentionCall(NamedTuple):
    """What one attention module was given for some neighbouring cells of a batch.

    Attributes
    ----------
    layer
        Number of the layer, from 0.
    first_cell
        The first of the cells in its batch.
    query_key
        (B, H, L, D).
    attention_mask
        (B, L) bool, None where nothing is padding.
    order
        (B, H, R, L): tokens sorted by bucket; None where attention is exact.
    bucket_size
        Tokens a chunk.
    """

    layer: int
    first_cell: int
    query_key: Tensor
    attention_mask: Tensor | None
    order: Tensor | None
    bucket_size: int

    def num_tokens(self, cell: int) -> int:
        """Return how many tokens a cell of the call has; they are its first."""
        length = self.query_key.shape[2]
        return length if self.attention_mask is None else int(self.attention_mask[cell].sum())


class AttentionRows(NamedTuple):
    """Probabilities of some queries over the keys they see; heads and rounds are rows of their own, to be summed.

    Attributes
    ----------
    queries
        int64 (rows,): number of the query among the tokens asked for.
    keys
        int64 (rows, keys): the same of the keys; as many as were asked for where it is none of them.
    weights
        (rows, keys).
    """

    queries: npt.NDArray[np.int64]
    keys: npt.NDArray[np.int64]
    weights: npt.NDArray[np.floating[Any]]


@contextmanager
def watch_attention(
    model: ScReformerModel, layers: Sequence[int], receive: Callable[[AttentionCall], object]
) -> Iterator[None]:
    """Call `receive` with what each of the `layers` is given, during one forward pass of a batch."""
    seen = dict.fromkeys(layers, 0)

    def look_at(layer: int) -> Callable[[ScReformerAttention, tuple[Any, ...], tuple[Tensor, Tensor | None]], None]:
        def look(module: ScReformerAttention, given: tuple[Any, ...], result: tuple[Tensor, Tensor | None]) -> None:
            query_key, _, mask = given[:3]
            receive(AttentionCall(layer, seen[layer], query_key, mask, result[1], module.bucket_size))
            seen[layer] += len(query_key)

        return look

    modules = {layer: model.encoder.layers[layer].get_submodule("attention") for layer in seen}
    handles = [module.register_forward_hook(look_at(layer)) for layer, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sum_attention(call: AttentionCall, cell: int, is_wanted: Tensor) -> csr_matrix:
    """Return the mean over heads of one cell's attention between the tokens asked for, float64 (G, G), row = query.

    Parameters
    ----------
    call
        Of one layer.
    cell
        Its number in the call.
    is_wanted
        (tokens of the cell,) bool.
    """
    length, num_wanted = call.num_tokens(cell), int(is_wanted.sum())
    query_key = call.query_key[cell, :, :length]
    query_key = query_key.to(torch.promote_types(query_key.dtype, torch.float32))
    places = torch.where(is_wanted, is_wanted.cumsum(0) - 1, num_wanted)
    if call.order is None:
        rows = exact_rows(query_key, places, num_wanted)
    else:
        order = call.order[cell, :, :, :length].long()
        rows = lsh_rows(query_key, order, call.bucket_size, places, num_wanted)
    total = csr_matrix((num_wanted, num_wanted), dtype=np.float64)
    for some in _join(rows):
        total = total + sum_pairs(some, num_wanted)
    return total / len(query_key)


def lsh_rows(
    query_key: Tensor, order: Tensor, bucket_size: int, places: Tensor, num_wanted: int
) -> Iterator[AttentionRows]:
    """Yield LSH attention, some heads at a time.

    Parameters
    ----------
    query_key
        (H, L, D), without padding.
    order
        (H, R, L) int64.
    bucket_size
        Tokens a chunk.
    places
        (L,): each token's number among those asked for; `num_wanted` for all others.
    num_wanted
        Tokens asked for.
    """
    heads, rounds, length = order.shape
    step = max(1, MOST_SCORES // (rounds * length * 2 * bucket_size))
    places = F.pad(places, (0, 1), value=num_wanted)  # the last is what fills a chunk up, number -1
    for start in range(0, heads, step):
        some = slice(start, start + step)
        tokens = to_chunks(order[some] + 1, bucket_size) - 1
        yield _lsh_rows(query_key[some], tokens, places, num_wanted)


def exact_rows(query_key: Tensor, places: Tensor, num_wanted: int) -> Iterator[AttentionRows]:
    """Yield exact attention summed over heads, some queries at a time; parameters as for `lsh_rows`."""
    heads, length, width = query_key.shape
    wanted = (places < num_wanted).nonzero()[:, 0]
    key = unit_vectors(query_key).transpose(1, 2)
    for some in wanted.split(max(1, MOST_SCORES // (heads * length))):
        scores = (query_key[:, some] / math.sqrt(width)) @ key
        scores[:, torch.arange(len(some), device=some.device), some] = SELF_SCORE
        weights = scores.softmax(dim=-1).sum(dim=0)[:, wanted]
        keys = places[wanted].expand(len(some), -1)
        yield AttentionRows(*(each.cpu().numpy() for each in (places[some], keys, weights)))


def sum_pairs(rows: AttentionRows, num_wanted: int) -> csr_matrix:
    """Return the sums of the weights by query and key, float64 (G, G), made a band of queries at a time."""
    by_query = np.argsort(rows.queries, kind="stable")
    queries, width, parts = rows.queries[by_query], num_wanted + 1, []
    height = max(1, MOST_SUMS // width)
    for first in range(0, num_wanted, height):
        last = min(first + height, num_wanted)
        start, stop = np.searchsorted(queries, [first, last])
        some = by_query[start:stop]
        pairs = (queries[start:stop, None] - first) * width + rows.keys[some]
        sums = np.bincount(pairs.ravel(), rows.weights[some].ravel(), minlength=(last - first) * width)
        parts.append(csr_matrix(sums.reshape(-1, width)[:, :num_wanted]))
    return vstack(parts, format="csr") if parts else csr_matrix((0, 0), dtype=np.float64)


def _join(rows: Iterator[AttentionRows]) -> Iterator[AttentionRows]:
    """Yield the same rows, more of them together: summing has a price of its own each time."""
    waiting: list[AttentionRows] = []
    for some in rows:
        waiting.append(some)
        if sum(one.weights.size for one in waiting) >= MOST_SCORES:
            yield AttentionRows(*map(np.concatenate, zip(*waiting, strict=True)))
            waiting = []
    if waiting:
        yield AttentionRows(*map(np.concatenate, zip(*waiting, strict=True)))


def _lsh_rows(query_key: Tensor, tokens: Tensor, places: Tensor, num_wanted: int) -> AttentionRows:
    """Return the rows of all heads given: a token's weights sum to 1 over its rows, one a round.

    Parameters
    ----------
    query_key
        (H, L, D).
    tokens
        (H, R, N, K): tokens of each chunk; -1 where there is none.
    places, num_wanted
        (L + 1,), as for `lsh_rows`; the last is that of no token.
    """
    every_head = torch.arange(len(query_key), device=tokens.device)[:, None, None, None]
    query = F.pad(query_key, (0, 0, 0, 1))[every_head, tokens]
    scores = (query / math.sqrt(query.shape[-1])) @ look_one_back(unit_vectors(query)).transpose(-1, -2)
    is_row = places[tokens] < num_wanted
    head, hash_round, chunk, _ = is_row.nonzero(as_tuple=True)
    own, seen = tokens[is_row], (look_one_back(tokens + 1) - 1)[head, hash_round, chunk]
    scores = scores[is_row]
    scores.masked_fill_(seen == own[:, None], SELF_SCORE).masked_fill_(seen < 0, -math.inf)
    queries = places[own]
    of_round = scores.new_empty(*tokens.shape[:2], num_wanted)
    of_round[head, hash_round, queries] = scores.logsumexp(dim=-1)
    weights = (scores - of_round.logsumexp(dim=1)[head, queries].unsqueeze(-1)).exp()
    return AttentionRows(*(each.cpu().numpy() for each in (queries, places[seen], weights)))
