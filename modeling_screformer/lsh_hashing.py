"""Locality-sensitive hashing: which tokens are near each other, as an order of the tokens (Kitaev et al. 2020).

Shape letters: H heads, R hash rounds, L tokens, D head width, C hash columns.

Two families of hash functions, of Gaussian directions in both:

* ``"sign"`` (random hyperplanes, Charikar 2002): a bit a column says on which side of a plane a token lies.
* ``"cross_polytope"`` (Andoni et al. 2015, the Reformer's): the nearest of the directions and their opposites.

The number of buckets follows each cell's own length, so that its result does not depend on what it is batched with.
"""

import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .lsh_attention_triton import MOST_COLUMNS, SMALLEST_BUCKET, triton_sign_order, why_not_triton

Hashing = Literal["sign", "cross_polytope"]
HASHINGS = ("sign", "cross_polytope")
# Planes beyond one bucket a chunk: buckets are uneven, and eight times as many sort the inside of full ones by nearness
# too. It takes a fifth off the error against exact attention (benchmarks/results/hashing.md) and costs next to nothing.
FINER_COLUMNS = 3
# Tokens of all heads that are handled together: what two megabytes of cache hold. Other devices want few launches.
CPU_GROUP_ROWS, GROUP_ROWS = 2**14, 2**20


@torch.no_grad()
def lsh_order(
    query_key: Tensor,
    rotations: Tensor,
    *,
    bucket_size: int,
    attention_mask: Tensor | None = None,
    hashing: Hashing = "cross_polytope",
) -> Tensor:
    """Return each round's token order after sorting by bucket, (B, H, R, L) int32; padding is last.

    Within a bucket tokens keep their order. Half precision is hashed in single precision.

    Parameters
    ----------
    query_key
        Floating point, (B, H, L, D).
    rotations
        Random directions, (R, D, C), of which a cell uses as many columns as :func:`num_hash_columns` says for its
        length, or all.
    bucket_size
        Tokens a chunk.
    attention_mask
        (B, L), 1 or True for tokens, 0 for padding.
    hashing
        ``"sign"`` or ``"cross_polytope"``.

    Raises
    ------
    ValueError
        For another ``hashing``.
    """
    if hashing not in HASHINGS:
        raise ValueError(f"hashing got {hashing!r}; allowed are {', '.join(map(repr, HASHINGS))}.")
    if _takes_triton(query_key, rotations, hashing):
        return triton_sign_order(
            query_key,
            rotations,
            bucket_size=bucket_size,
            finer_columns=FINER_COLUMNS,
            attention_mask=attention_mask,
        )
    bucket_ids = _sign_buckets if hashing == "sign" else _cross_polytope_buckets
    dtype = torch.promote_types(query_key.dtype, torch.float32)
    rotations = rotations.to(dtype)
    batch, heads, length, _ = query_key.shape
    order = torch.empty(batch, heads, len(rotations), length, dtype=torch.int32, device=query_key.device)
    with torch.autocast(query_key.device.type, enabled=False):
        for cell, own_length in enumerate(lengths_of_cells(attention_mask, batch, length)):
            columns = min(num_hash_columns(own_length, bucket_size, hashing), rotations.shape[-1])
            for some in split_heads(heads, length, query_key.device):
                buckets_HRL = bucket_ids(query_key[cell, some].to(dtype), rotations[:, :, :columns])
                if attention_mask is not None and own_length < length:
                    is_padding = ~attention_mask[cell].to(torch.bool)
                    buckets_HRL.masked_fill_(is_padding, torch.iinfo(buckets_HRL.dtype).max)
                order[cell, some] = _stable_argsort(buckets_HRL)
    return order


def _takes_triton(query_key: Tensor, rotations: Tensor, hashing: Hashing) -> bool:
    if hashing != "sign" or query_key.device.type == "cpu" or rotations.shape[-1] > MOST_COLUMNS:
        return False
    return why_not_triton(query_key.device, SMALLEST_BUCKET, query_key.shape[-1]) is None


def num_hash_columns(length: int, bucket_size: int, hashing: Hashing) -> int:
    """Return how many columns of a round's rotations ``length`` tokens use.

    ``"cross_polytope"``: about one bucket a chunk, two a column. ``"sign"``: about eight; a column doubles them.
    """
    chunks = max(1, math.ceil(length / bucket_size))
    if hashing == "sign":
        return math.ceil(math.log2(chunks)) + FINER_COLUMNS
    return max(1, math.ceil(chunks / 2))


def draw_rotations(num_hashes: int, head_dim: int, num_columns: int, *, seed: int) -> Tensor:
    """Return Gaussian hash directions (R, D, C), float32, from a private generator seeded with ``seed``.

    The numbers are the same on every machine; they are on torch's default device, as new weights are.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    rotations = torch.randn(num_hashes, head_dim, num_columns, generator=generator, device="cpu", dtype=torch.float32)
    return rotations.to(torch.get_default_device())


def split_heads(num_heads: int, length: int, device: torch.device) -> Iterator[slice]:
    """Yield the heads of a cell that are handled together."""
    rows = CPU_GROUP_ROWS if device.type == "cpu" else GROUP_ROWS
    step = max(1, min(num_heads, rows // max(1, length)))
    for start in range(0, num_heads, step):
        yield slice(start, min(start + step, num_heads))


def lengths_of_cells(attention_mask: Tensor | None, batch: int, length: int) -> list[int]:
    """Return each cell's number of tokens that are not padding."""
    return [length] * batch if attention_mask is None else attention_mask.to(torch.bool).sum(dim=-1).tolist()


def _sign_buckets(vectors_HLD: Tensor, rotations_RDC: Tensor) -> Tensor:
    """Return bucket ids (H, R, L): the columns' signs as binary digits."""
    rounds, width, columns = rotations_RDC.shape
    projected = vectors_HLD @ rotations_RDC.transpose(0, 1).reshape(width, rounds * columns)
    # Digits are summed by a product with powers of two, which every precision of matrix product represents exactly.
    digits = (2.0 ** torch.arange(columns - 1, -1, -1)).to(projected)
    place_value = torch.block_diag(*[digits[:, None]] * rounds)
    codes_HLR = (projected > 0).to(projected.dtype) @ place_value
    return codes_HLR.to(_smallest_integer(2**columns)).transpose(1, 2).contiguous()


def _cross_polytope_buckets(vectors_HLD: Tensor, rotations_RDC: Tensor) -> Tensor:
    """Return bucket ids (H, R, L): column c or, for the opposite direction, C + c."""
    columns = rotations_RDC.shape[-1]
    rounds = []
    for rotation_DC in rotations_RDC:
        projected = vectors_HLD @ rotation_DC
        nearest = projected.abs().argmax(dim=-1, keepdim=True)
        is_opposite = projected.gather(-1, nearest) < 0
        rounds.append((nearest + columns * is_opposite).squeeze(-1))
    return torch.stack(rounds, dim=1).to(_smallest_integer(2 * columns))


def _smallest_integer(num_buckets: int) -> torch.dtype:
    """Return the type that holds ``num_buckets`` ids and one more for padding: 16 bits sort several times faster."""
    return torch.int16 if num_buckets < torch.iinfo(torch.int16).max else torch.int32


def _stable_argsort(keys: Tensor) -> Tensor:
    if keys.device.type == "cpu":  # a radix sort, unlike torch's
        return torch.from_numpy(np.argsort(keys.numpy(), axis=-1, kind="stable"))
    return torch.sort(keys, dim=-1, stable=True).indices
