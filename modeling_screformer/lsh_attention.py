"""LSH attention (Kitaev et al. 2020, section 2) with shared query-key: hash, sort, chunk, attend, combine.

Hashing is lsh_hashing.py, the fast forms of the rest lsh_attention_blocked.py (CPU) and lsh_attention_triton.py (GPU);
here are the public function, the plain form and exact attention. Shape letters: B cells, H heads, R hash rounds,
L tokens, D head width, C hash columns, N chunks, K bucket size (tokens a chunk).

Differences from the Reformer reference (trax, reformer-pytorch, transformers), each for a reason:

* The first chunk does not look back at the last one. Chunk order is bucket order, which is not a circle, and a
  wrap-around would make the first bucket's result depend on padding.
* Padding sorts last, so that it fills chunks of its own and no cell sees how far its batch was padded.
* The number of buckets follows each cell's own length, not the batch's. Together with the two points above: the same
  cell gives the same result whatever it is batched with.
* Rotations are given, not drawn: hashing is part of the model, and nothing touches the global random generators.
"""

import logging
import math
from functools import cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .lsh_attention_blocked import blocked_attention
from .lsh_attention_triton import triton_attention, why_not_triton
from .lsh_hashing import Hashing, draw_rotations, lsh_order

__all__ = ["draw_rotations", "exact_attention", "lsh_attention", "lsh_order"]

logger = logging.getLogger(__name__)

Implementation = Literal["auto", "reference", "blocked", "triton", "exact"]
IMPLEMENTATIONS = ("auto", "reference", "blocked", "triton", "exact")

# A token's score with itself: far below any other, above masked ones, and within half precision.
SELF_SCORE = -5e4
# Queries that exact attention handles at once: bounds its mask to (B, 1, 1024, L).
EXACT_QUERY_BLOCK = 1024


class RoundOutput(NamedTuple):
    """One hash round's result: values (B, H, L, D) and the log of each token's softmax denominator (B, H, L)."""

    values: Tensor
    log_normaliser: Tensor


def lsh_attention(
    query_key: Tensor,
    value: Tensor,
    rotations: Tensor,
    *,
    bucket_size: int,
    attention_mask: Tensor | None = None,
    implementation: Implementation = "auto",
    hashing: Hashing = "cross_polytope",
    order: Tensor | None = None,
) -> Tensor:
    """Return softmax attention of every token over the tokens that hash near it, (B, H, L, D).

    Query and key are the same vector; keys are scaled to unit length. Tokens are sorted by bucket and cut into chunks
    of ``bucket_size``; a token attends to its own chunk and the one before, and to itself only when it has nothing
    else. Rounds are combined by their softmax denominators.

    Parameters
    ----------
    query_key, value
        Floating point, (B, H, L, D).
    rotations
        Random directions, (R, D, C): R hash rounds. A cell uses as many of the first columns as its length asks for
        (:func:`~screformer.lsh_hashing.num_hash_columns`).
    bucket_size
        Tokens a chunk, at least 2. Cells no longer than this get exact attention.
    attention_mask
        (B, L), 1 or True for tokens, 0 for padding; padded rows of the result are zero.
    implementation
        ``"reference"``: a few lines of plain PyTorch, which hold every score; ``"blocked"``: the same numbers, a few
        tiles at a time; ``"triton"``: the same by fused GPU kernels; ``"exact"``: full attention with the same rule,
        ignoring ``rotations``; ``"auto"``: ``"triton"`` where it can run, else ``"blocked"``.
    hashing
        ``"cross_polytope"``, the Reformer's, or ``"sign"``; see :func:`lsh_order`.
    order
        The result of :func:`lsh_order` for the same input, to use instead of hashing again.

    Raises
    ------
    ValueError
        For shapes that do not fit, an unknown implementation, or ``"triton"`` where its kernels cannot run.
    TypeError
        For integer inputs, or float64 with ``"triton"``.
    """
    _check_inputs(query_key, value, rotations, bucket_size, attention_mask, implementation)
    mask = None if attention_mask is None else attention_mask.to(torch.bool)
    if mask is not None and implementation in ("reference", "exact"):  # whatever padding holds, NaN included
        query_key, value = (each.masked_fill(~mask[:, None, :, None], 0.0) for each in (query_key, value))
    if implementation == "exact":
        output = _exact_attention(query_key, value, mask)
    else:
        if order is None:
            order = lsh_order(query_key, rotations, bucket_size=bucket_size, attention_mask=mask, hashing=hashing)
        if implementation != "reference":
            attend = triton_attention if _takes_triton(query_key, bucket_size, implementation) else blocked_attention
            return attend(query_key, value, order, bucket_size=bucket_size, attention_mask=mask)
        output = _reference_attention(query_key, value, order, bucket_size, mask)
    return output if mask is None else output * mask[:, None, :, None].to(output.dtype)


def exact_attention(query_key: Tensor, value: Tensor, *, attention_mask: Tensor | None = None) -> Tensor:
    """Return full attention under the rule of :func:`lsh_attention`, (B, H, L, D): all tokens in one chunk."""
    rotations = query_key.new_zeros(1, query_key.shape[-1], 1)
    return lsh_attention(
        query_key, value, rotations, bucket_size=2, attention_mask=attention_mask, implementation="exact"
    )


def _takes_triton(query_key: Tensor, bucket_size: int, implementation: str) -> bool:
    """Whether the GPU kernels are asked for, or can run where the choice is ours."""
    if implementation == "blocked" or (implementation == "auto" and query_key.device.type == "cpu"):
        return False
    reason = why_not_triton(query_key.device, bucket_size, query_key.shape[-1])
    if implementation == "triton" and reason is not None:
        msg = f"implementation 'triton' cannot run: {reason}. Use 'auto', which takes 'blocked' then."
        raise ValueError(msg)
    if reason is None and implementation == "auto" and query_key.dtype == torch.float64:
        reason = "the tensors are float64"
    if reason is not None:
        _say_once(reason)
    return reason is None


@cache
def _say_once(reason: str) -> None:
    logger.warning("LSH attention runs without its GPU kernels, slower: %s", reason)


def _reference_attention(
    query_key: Tensor, value: Tensor, order_BHRL: Tensor, bucket_size: int, mask: Tensor | None
) -> Tensor:
    """Attend round by round in plain PyTorch, and combine."""
    rounds = [
        _attend_round(query_key, value, order_BHL.long(), bucket_size, mask) for order_BHL in order_BHRL.unbind(dim=2)
    ]
    if len(rounds) == 1:
        return rounds[0].values
    weights = torch.stack([each.log_normaliser for each in rounds], dim=-1).softmax(dim=-1)
    return torch.stack([each.values for each in rounds], dim=-1).mul(weights.unsqueeze(-2)).sum(dim=-1)


def _attend_round(
    query_key: Tensor, value: Tensor, order: Tensor, bucket_size: int, mask: Tensor | None
) -> RoundOutput:
    """Sort, chunk, attend and undo the sort for one round; ``order`` is (B, H, L)."""
    batch, heads, length, width = query_key.shape
    index = order.unsqueeze(-1).expand(-1, -1, -1, width)
    query = to_chunks(query_key.gather(2, index), bucket_size)
    key = look_one_back(unit_vectors(query))
    chunked_value = look_one_back(to_chunks(value.gather(2, index), bucket_size))

    scores = (query / math.sqrt(width)) @ key.transpose(-1, -2)
    scores.diagonal(offset=bucket_size, dim1=-2, dim2=-1).fill_(SELF_SCORE)
    is_hidden = ~_seen_keys(order, mask, bucket_size)
    scores = scores.masked_fill_(is_hidden.unsqueeze(-2), torch.finfo(scores.dtype).min)
    highest = scores.detach().amax(dim=-1, keepdim=True)
    weights = (scores - highest).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    attended = (weights @ chunked_value) / total
    log_normaliser = highest + total.log()

    place = torch.empty_like(order).scatter_(2, order, torch.arange(length, device=order.device).expand_as(order))
    values = attended.reshape(batch, heads, -1, width)[:, :, :length].gather(
        2, place.unsqueeze(-1).expand(-1, -1, -1, width)
    )
    return RoundOutput(values, log_normaliser.reshape(batch, heads, -1)[:, :, :length].gather(2, place))


def _seen_keys(order: Tensor, mask: Tensor | None, bucket_size: int) -> Tensor:
    """Return which keys of each chunk's window are tokens, not padding or filling, (B, H or 1, N, 2 K)."""
    if mask is None:  # the same for every cell and head
        is_token = torch.ones_like(order[:1, :1], dtype=torch.bool)
    else:
        is_token = mask[:, None, :].expand_as(order).gather(2, order)
    return look_one_back(to_chunks(is_token, bucket_size))


def to_chunks(sorted_tokens: Tensor, bucket_size: int) -> Tensor:
    """Cut (B, H, L, ...) into (B, H, N, K, ...); the last chunk is filled with zeros (False)."""
    batch, heads, length, *rest = sorted_tokens.shape
    missing = -length % bucket_size
    if missing:
        filling = sorted_tokens.new_zeros(batch, heads, missing, *rest)
        sorted_tokens = torch.cat([sorted_tokens, filling], dim=2)
    return sorted_tokens.reshape(batch, heads, -1, bucket_size, *rest)


def look_one_back(chunks: Tensor) -> Tensor:
    """Put each chunk's predecessor before it, (B, H, N, 2 K, ...); before the first is nothing (zeros, False)."""
    before = torch.cat([torch.zeros_like(chunks[:, :, :1]), chunks[:, :, :-1]], dim=2)
    return torch.cat([before, chunks], dim=3)


def _exact_attention(query_key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Full attention by PyTorch's memory-efficient kernel, a block of queries at a time."""
    length = query_key.shape[2]
    key = unit_vectors(query_key)
    positions = torch.arange(length, device=query_key.device)
    blocks = []
    for start in range(0, length, EXACT_QUERY_BLOCK):
        stop = min(start + EXACT_QUERY_BLOCK, length)
        bias = query_key.new_zeros(1, 1, stop - start, length)
        bias = bias.masked_fill(positions[start:stop, None] == positions, SELF_SCORE)
        if mask is not None:
            bias = bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min)
        blocks.append(F.scaled_dot_product_attention(query_key[:, :, start:stop], key, value, attn_mask=bias))
    return torch.cat(blocks, dim=2)


def unit_vectors(vectors: Tensor) -> Tensor:
    """Scale to unit length; zeros stay zeros, in half precision too, where 1e-12 is none."""
    return F.normalize(vectors, dim=-1, eps=max(1e-12, torch.finfo(vectors.dtype).tiny))


def _check_inputs(
    query_key: Tensor,
    value: Tensor,
    rotations: Tensor,
    bucket_size: int,
    attention_mask: Tensor | None,
    implementation: str,
) -> None:
    if implementation not in IMPLEMENTATIONS:
        msg = f"implementation got {implementation!r}; allowed are {', '.join(map(repr, IMPLEMENTATIONS))}."
        raise ValueError(msg)
    if not query_key.is_floating_point() or not value.is_floating_point():
        msg = f"query_key and value got {query_key.dtype} and {value.dtype}; they must be floating point."
        raise TypeError(msg)
    if query_key.ndim != 4 or query_key.shape != value.shape:
        shapes = f"{tuple(query_key.shape)} and {tuple(value.shape)}"
        msg = f"query_key and value got shapes {shapes}; both must be (B, H, L, D)."
        raise ValueError(msg)
    if rotations.ndim != 3 or rotations.shape[1] != query_key.shape[-1] or 0 in rotations.shape:
        msg = f"rotations got shape {tuple(rotations.shape)}; it must be (rounds, {query_key.shape[-1]}, columns)."
        raise ValueError(msg)
    if bucket_size < 2:
        raise ValueError(f"bucket_size got {bucket_size}; it must be at least 2.")
    batch, _, length, _ = query_key.shape
    if attention_mask is not None and attention_mask.shape != (batch, length):
        msg = f"attention_mask got shape {tuple(attention_mask.shape)}; it must be ({batch}, {length})."
        raise ValueError(msg)
