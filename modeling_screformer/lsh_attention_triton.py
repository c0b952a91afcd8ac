"""LSH attention as fused GPU kernels, in Triton; optional: without Triton the other implementations serve.

Shape letters: B cells, H heads, R hash rounds, L tokens, D head width, K bucket size (tokens a chunk), C hash columns.

A program handles one chunk of one head in one round. It gathers its tokens by their order, attends to the chunk before
and its own, and adds to each token's running softmax (largest score, sum, weighted values). A token is in one chunk a
round, and rounds are launched one after another: nothing is added atomically, so the same input always gives the same
bits, and no round's output is kept. The backward pass is the same walk: a chunk is visited once as queries (towards the
chunk before and itself) and as keys (from itself and the chunk after).

Scores are products of the vectors as they are, scaled afterwards by the length of each key, so that keys need not be
rounded to unit length in half precision. Head widths are padded in registers to a power of two.

Counts, a head and token, for R rounds; e is the bytes of an element, D' the padded width:

* forward: 8 K D' R flops in matrix units (two products with 2 K keys), 2 K R exponentials; bytes: 5 D e R gathered (one
  query, two keys, two values; from cache if a head's 2 L D e bytes fit), 8 D (R - 1) of running sums, D e written.
* backward: 24 K D' R flops (twelve K x K products a chunk), 3 K R exponentials; bytes: about 12 D e R gathered,
  16 D (R - 1) of running sums, 2 D e written.
* hashing: 2 D R C flops outside the matrix units, D e read, 2 R written.
* compiled for an H100 (Triton 3.9.0, bfloat16, heads 20 wide, chunks of 64), registers a thread: forward 166,
  backward 255 and 24 bytes beside them, hashing 98; see `screformer benchmark kernels`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this system
    triton = None

LOG2_E = math.log2(math.e)
HASH_TOKENS = 64
HASH_WARPS = 8
MOST_COLUMNS = 14  # codes, and one more for padding, in 16 bits
SMALLEST_BUCKET, LARGEST_BUCKET, WIDEST_HEAD = 16, 128, 128


def why_not_triton(device: torch.device, bucket_size: int, head_dim: int) -> str | None:
    """Return why these kernels cannot serve, None if they can."""
    if triton is None:
        return "Triton is not installed"
    if device.type == "cpu" and not is_interpreted():
        return "the tensors are on the CPU (TRITON_INTERPRET=1 runs the kernels there, for tests)"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 7.0"
    if bucket_size & (bucket_size - 1) or not SMALLEST_BUCKET <= bucket_size <= LARGEST_BUCKET:
        return f"bucket_size {bucket_size} is not a power of two from {SMALLEST_BUCKET} to {LARGEST_BUCKET}"
    if head_dim > WIDEST_HEAD:
        return f"heads are {head_dim} wide, more than {WIDEST_HEAD}"
    return None


def triton_attention(
    query_key: Tensor, value: Tensor, order: Tensor, *, bucket_size: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Return LSH attention (B, H, L, D) for the token order of ``lsh_order`` (B, H, R, L); zero at padding.

    The numbers and gradients of ``lsh_attention(implementation="reference")``, whose rules it follows, for float32,
    float16 and bfloat16; products are summed in single precision.
    """
    if query_key.dtype == torch.float64:
        raise TypeError("query_key got float64; the Triton kernels compute in single precision. Use float32.")
    return _TritonAttention.apply(query_key, value, order, attention_mask, bucket_size)


def triton_sign_codes(
    query_key: Tensor, rotations: Tensor, num_columns: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Return sign-hash codes (B, H, R, L) int16, those of padding above all others.

    Parameters
    ----------
    query_key
        (B, H, L, D).
    rotations
        (R, D, C), C at most `MOST_COLUMNS`.
    num_columns
        (B,) int32: how many of the columns each cell uses.
    attention_mask
        (B, L), True or 1 for tokens.
    """
    batch, heads, length, width = query_key.shape
    rounds, _, columns = rotations.shape
    codes = torch.empty(batch, heads, rounds, length, dtype=torch.int16, device=query_key.device)
    mask = _as_mask(attention_mask)
    _sign_codes_kernel[(triton.cdiv(length, HASH_TOKENS), batch * heads)](
        query_key,
        rotations.to(torch.float32).contiguous(),
        num_columns,
        mask if mask is not None else num_columns,
        codes,
        heads,
        length,
        columns,
        *query_key.stride()[:3],
        rounds=rounds,
        head_dim=width,
        padded_dim=padded_width(width),
        padded_columns=16,
        tokens=HASH_TOKENS,
        has_mask=mask is not None,
        widen=_must_widen(query_key),
        num_warps=HASH_WARPS,
    )
    return codes


def triton_sign_order(
    query_key: Tensor, rotations: Tensor, *, bucket_size: int, finer_columns: int, attention_mask: Tensor | None = None
) -> Tensor:
    """Return each round's token order (B, H, R, L) int32 as ``lsh_order(hashing="sign")`` does, padding last.

    Nothing waits for the device: how many columns a cell uses is computed there. A projection within rounding of zero
    may fall on the other side than on another device.
    """
    batch, _, length, _ = query_key.shape
    lengths = torch.full((batch,), length, dtype=torch.int32, device=query_key.device)
    if attention_mask is not None:
        lengths = attention_mask.to(torch.bool).sum(dim=-1, dtype=torch.int32)
    chunks = (lengths + bucket_size - 1) // bucket_size
    doublings = torch.frexp((chunks - 1).clamp(min=0).to(torch.float32)).exponent  # the logarithm, rounded up
    num_columns = (doublings + finer_columns).clamp(max=rotations.shape[-1]).to(torch.int32)
    codes = triton_sign_codes(query_key, rotations, num_columns, attention_mask)
    return torch.sort(codes, dim=-1, stable=True).indices.to(torch.int32)


class _TritonAttention(torch.autograd.Function):
    """Keeps inputs, output, order and the logarithm of each token's sum of weights, base two, (B, H, L)."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's context has no public type
        query_key: Tensor,
        value: Tensor,
        order: Tensor,
        attention_mask: Tensor | None,
        bucket_size: int,
    ) -> Tensor:
        mask = _as_mask(attention_mask)
        launch = _Launch(query_key, order, mask, bucket_size)
        value = _as_rows(value)
        output = launch.like_heads(query_key, is_padded=mask is not None)
        log_sum = launch.per_token(query_key, is_padded=mask is not None)
        sums = None if launch.rounds == 1 else torch.empty_like(output, dtype=torch.float32)
        running = output if sums is None else sums
        states = log_sum if sums is None else torch.empty(2, *log_sum.shape, dtype=torch.float32, device=output.device)
        for hash_round in range(launch.rounds):
            launch.run(
                _attend_kernel,
                hash_round,
                (launch.query_key, value, launch.order, launch.lengths, running, states, output, log_sum),
                (launch.query_key, value, running, output),
            )
        ctx.save_for_backward(launch.query_key, value, order, output, log_sum, launch.lengths)
        ctx.bucket_size, ctx.is_padded = bucket_size, mask is not None
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        query_key, value, order, output, log_sum, lengths = ctx.saved_tensors
        launch = _Launch(query_key, order, None, ctx.bucket_size, lengths)
        grad_output = _as_rows(grad_output.to(output.dtype))
        dot = (grad_output.float() * output.float()).sum(dim=-1)
        grads = [launch.like_heads(query_key, is_padded=ctx.is_padded) for _ in range(2)]
        is_one = launch.rounds == 1
        sums = grads if is_one else [torch.empty_like(each, dtype=torch.float32) for each in grads]
        for hash_round in range(launch.rounds):
            launch.run(
                _differentiate_kernel,
                hash_round,
                (query_key, value, grad_output, launch.order, lengths, log_sum, dot, *sums, *grads),
                (query_key, value, grad_output, sums[0], grads[0]),
            )
        return *grads, None, None, None


class _Launch:
    """What every launch over the chunks of a batch shares."""

    def __init__(
        self, query_key: Tensor, order: Tensor, mask: Tensor | None, bucket_size: int, lengths: Tensor | None = None
    ) -> None:
        self.query_key = _as_rows(query_key)
        self.batch, self.heads, self.length, self.head_dim = query_key.shape
        self.order = order.to(torch.int32).contiguous()
        self.rounds = order.shape[2]
        self.bucket_size = bucket_size
        if lengths is None and mask is not None:
            lengths = mask.sum(dim=-1, dtype=torch.int32)
        if lengths is None:
            lengths = torch.full((self.batch,), self.length, dtype=torch.int32, device=query_key.device)
        self.lengths = lengths

    def like_heads(self, tensor: Tensor, *, is_padded: bool) -> Tensor:
        """Return memory for (B, H, L, D) that lies as (B, L, H, D); zeros where padding will not be written."""
        shape = (self.batch, self.length, self.heads, self.head_dim)
        return (tensor.new_zeros(shape) if is_padded else tensor.new_empty(shape)).transpose(1, 2)

    def per_token(self, tensor: Tensor, *, is_padded: bool) -> Tensor:
        """Return memory for a number a head and token, (B, H, L)."""
        shape = (self.batch, self.heads, self.length)
        return (tensor.new_zeros if is_padded else tensor.new_empty)(shape, dtype=torch.float32)

    def run(self, kernel: Any, hash_round: int, tensors: tuple[Tensor, ...], strided: tuple[Tensor, ...]) -> None:
        """Launch a kernel over all chunks of one round; ``strided`` are those whose strides it is told."""
        grid = (triton.cdiv(self.length, self.bucket_size), self.batch * self.heads)
        dtype = self.query_key.dtype
        kernel[grid](
            *tensors,
            self.batch * self.heads * self.length,
            self.heads,
            self.length,
            hash_round,
            LOG2_E / math.sqrt(self.head_dim),
            *(stride for tensor in strided for stride in tensor.stride()[:3]),
            rounds=self.rounds,
            head_dim=self.head_dim,
            padded_dim=padded_width(self.head_dim),
            size=self.bucket_size,
            is_first=hash_round == 0,
            is_last=hash_round == self.rounds - 1,
            precision=product_precision(dtype, is_nvidia=self.query_key.is_cuda and torch.version.hip is None),
            widen=_must_widen(self.query_key),
            num_warps=attention_warps(self.head_dim, self.bucket_size, dtype),
        )


def _as_mask(attention_mask: Tensor | None) -> Tensor | None:
    return None if attention_mask is None else attention_mask.to(torch.bool)


def _as_rows(tensor: Tensor) -> Tensor:
    """Return (B, H, L, D) whose vectors are dense, and whose tokens the kernels reach with offsets of 32 bits."""
    is_near = tensor.shape[2] * tensor.stride(2) < 2**31
    return tensor if tensor.stride(-1) == 1 and is_near else tensor.contiguous()


def padded_width(width: int) -> int:
    """Return the width in registers: a power of two that matrix units take."""
    return max(16, 1 << (width - 1).bit_length())


def attention_warps(width: int, bucket_size: int, dtype: torch.dtype) -> int:
    """Return the warps of a program: as few as keep most of its tiles in registers."""
    is_small = padded_width(width) <= 32 and bucket_size <= 64 and dtype != torch.float32
    return 4 if is_small else 8


def product_precision(dtype: torch.dtype, *, is_nvidia: bool) -> str:
    """Return how matrix units multiply.

    Single precision goes through them in three parts of 11 bits where NVIDIA's have no more: multiplied without them a
    program's tiles would not fit into its registers.
    """
    if dtype != torch.float32:
        return "tf32"  # of half precision nothing is lost
    return "tf32x3" if is_nvidia else "ieee"


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: ``TRITON_INTERPRET=1``."""
    return bool(triton is not None and triton.knobs.runtime.interpret)


def _must_widen(tensor: Tensor) -> bool:
    """Whether vectors are widened before products: Triton's interpreter cannot multiply bfloat16."""
    return is_interpreted() and tensor.dtype == torch.bfloat16


if triton is not None:
    LOWEST = tl.constexpr(-1e30)  # the largest score where there is none: below every score, and no infinity

    @triton.jit
    def _rows(pointer, tokens, is_token, stride, head_dim: tl.constexpr, padded_dim: tl.constexpr, widen: tl.constexpr):
        """Gather the vectors of some tokens, zero where there is none, (K, D'); ``widen`` them to single precision."""
        columns = tl.arange(0, padded_dim)
        where = is_token[:, None] & (columns < head_dim)[None, :]
        rows = tl.load(pointer + (tokens * stride)[:, None] + columns[None, :], mask=where, other=0.0)
        return rows.to(tl.float32) if widen else rows

    @triton.jit
    def _put(pointer, tokens, is_token, stride, values, head_dim: tl.constexpr, padded_dim: tl.constexpr):
        """Write the vectors of some tokens to their places."""
        columns = tl.arange(0, padded_dim)
        where = is_token[:, None] & (columns < head_dim)[None, :]
        places = pointer + (tokens * stride)[:, None] + columns[None, :]
        tl.store(places, values.to(pointer.dtype.element_ty), mask=where)

    @triton.jit
    def _inverse_lengths(vectors):
        """Return one over the length of each vector, (K,); zeros count as 1e-12 long."""
        vectors = vectors.to(tl.float32)
        return 1.0 / tl.maximum(tl.sqrt(tl.sum(vectors * vectors, axis=1)), 1e-12)

    @triton.jit
    def _scores(query, key, inverse_key, is_key, is_self, scale, is_alone, precision: tl.constexpr):
        """Return scores in powers of two, (K, K), -inf where a key may not be seen."""
        scores = tl.dot(query, tl.trans(key), input_precision=precision) * (inverse_key * scale)[None, :]
        return tl.where(is_key[None, :] & (is_alone | ~is_self), scores, float("-inf"))

    @triton.jit
    def _attend_kernel(
        query_key, value, order, lengths, running, states, output, log_sum,
        num_tokens, heads, length, hash_round, scale,
        query_key_b, query_key_h, query_key_l, value_b, value_h, value_l,
        running_b, running_h, running_l, output_b, output_h, output_l,
        rounds: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr, size: tl.constexpr,
        is_first: tl.constexpr, is_last: tl.constexpr, precision: tl.constexpr, widen: tl.constexpr,
    ):  # fmt: skip
        """Add one round to the running softmax of a chunk's tokens; the last round writes the result."""
        chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        cell, head = row // heads, row % heads
        num = tl.load(lengths + cell)
        if chunk * size < num:
            places = chunk * size + tl.arange(0, size)
            is_token = places < num
            is_before = (places >= size) & (places - size < num)
            in_order = order + (row * rounds + hash_round) * length
            tokens = tl.load(in_order + places, mask=is_token, other=0)
            before = tl.load(in_order + places - size, mask=is_before, other=0)
            query_key += cell * query_key_b + head * query_key_h
            value += cell * value_b + head * value_h
            query = _rows(query_key, tokens, is_token, query_key_l, head_dim, padded_dim, widen)
            is_self = tl.arange(0, size)[:, None] == tl.arange(0, size)[None, :]
            at = row * length + tokens

            # One tile of scores after the other: both at once would take the registers of half the programs.
            weights = _scores(query, query, _inverse_lengths(query), is_token, is_self, scale, num == 1, precision)
            largest = tl.maximum(tl.max(weights, axis=1), LOWEST)
            weights = tl.exp2(weights - largest[:, None])
            total = tl.sum(weights, axis=1)
            seen = _rows(value, tokens, is_token, value_l, head_dim, padded_dim, widen)
            attended = tl.dot(weights.to(seen.dtype), seen, input_precision=precision)

            key = _rows(query_key, before, is_before, query_key_l, head_dim, padded_dim, widen)
            nowhere = tl.zeros((size, size), dtype=tl.int1)
            weights = _scores(query, key, _inverse_lengths(key), is_before, nowhere, scale, num == 1, precision)
            earlier = largest
            largest = tl.maximum(tl.max(weights, axis=1), largest)
            weights = tl.exp2(weights - largest[:, None])
            shrink = tl.exp2(earlier - largest)
            total = total * shrink + tl.sum(weights, axis=1)
            seen = _rows(value, before, is_before, value_l, head_dim, padded_dim, widen)
            attended = attended * shrink[:, None] + tl.dot(weights.to(seen.dtype), seen, input_precision=precision)

            running += cell * running_b + head * running_h
            if not is_first:
                now = largest
                earlier = tl.load(states + at, mask=is_token, other=0.0)
                largest = tl.maximum(earlier, now)
                grow, shrink = tl.exp2(now - largest), tl.exp2(earlier - largest)
                total = total * grow + tl.load(states + num_tokens + at, mask=is_token, other=0.0) * shrink
                sums = _rows(running, tokens, is_token, running_l, head_dim, padded_dim, widen)
                attended = attended * grow[:, None] + sums * shrink[:, None]
            if is_last:
                total = tl.where(is_token, total, 1.0)
                output += cell * output_b + head * output_h
                _put(output, tokens, is_token, output_l, attended / total[:, None], head_dim, padded_dim)
                tl.store(log_sum + at, largest + tl.log2(total), mask=is_token)
            else:
                _put(running, tokens, is_token, running_l, attended, head_dim, padded_dim)
                tl.store(states + at, largest, mask=is_token)
                tl.store(states + num_tokens + at, total, mask=is_token)

    @triton.jit
    def _differentiate_kernel(
        query_key, value, grad_output, order, lengths, log_sum, dot,
        sum_query_key, sum_value, grad_query_key, grad_value,
        num_tokens, heads, length, hash_round, scale,
        query_key_b, query_key_h, query_key_l, value_b, value_h, value_l, output_b, output_h, output_l,
        sum_b, sum_h, sum_l, grad_b, grad_h, grad_l,
        rounds: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr, size: tl.constexpr,
        is_first: tl.constexpr, is_last: tl.constexpr, precision: tl.constexpr, widen: tl.constexpr,
    ):  # fmt: skip
        """Add one round to the gradients of a chunk's tokens, as queries and as keys; the last round writes them."""
        chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
        cell, head = row // heads, row % heads
        num = tl.load(lengths + cell)
        if chunk * size < num:
            places = chunk * size + tl.arange(0, size)
            is_token = places < num
            in_order = order + (row * rounds + hash_round) * length
            tokens = tl.load(in_order + places, mask=is_token, other=0)
            query_key += cell * query_key_b + head * query_key_h
            value += cell * value_b + head * value_h
            grad_output += cell * output_b + head * output_h
            log_sum += row * length
            dot += row * length
            is_self = tl.arange(0, size)[:, None] == tl.arange(0, size)[None, :]
            nowhere = tl.zeros((size, size), dtype=tl.int1)

            own = _rows(query_key, tokens, is_token, query_key_l, head_dim, padded_dim, widen)
            own_value = _rows(value, tokens, is_token, value_l, head_dim, padded_dim, widen)
            own_grad = _rows(grad_output, tokens, is_token, output_l, head_dim, padded_dim, widen)
            inverse = _inverse_lengths(own)
            # Queries that are no tokens have no gradient, and infinite sums so that their weights are zero.
            own_log_sum = tl.load(log_sum + tokens, mask=is_token, other=float("inf"))
            own_dot = tl.load(dot + tokens, mask=is_token, other=0.0)

            scores = _scores(own, own, inverse, is_token, is_self, scale, num == 1, precision)
            weights = tl.exp2(scores - own_log_sum[:, None])
            of_weights = tl.dot(own_grad, tl.trans(own_value), input_precision=precision)
            of_scores = weights * (of_weights - own_dot[:, None])
            scaled = (of_scores * inverse[None, :]).to(own.dtype)
            of_query = tl.dot(scaled, own, input_precision=precision)
            of_key = tl.dot(tl.trans(of_scores).to(own.dtype), own, input_precision=precision)
            of_value = tl.dot(tl.trans(weights).to(own_grad.dtype), own_grad, input_precision=precision)

            is_before = (places >= size) & (places - size < num)
            before = tl.load(in_order + places - size, mask=is_before, other=0)
            key = _rows(query_key, before, is_before, query_key_l, head_dim, padded_dim, widen)
            key_value = _rows(value, before, is_before, value_l, head_dim, padded_dim, widen)
            inverse_key = _inverse_lengths(key)
            scores = _scores(own, key, inverse_key, is_before, nowhere, scale, num == 1, precision)
            weights = tl.exp2(scores - own_log_sum[:, None])
            of_weights = tl.dot(own_grad, tl.trans(key_value), input_precision=precision)
            of_scores = weights * (of_weights - own_dot[:, None])
            scaled = (of_scores * inverse_key[None, :]).to(own.dtype)
            of_query += tl.dot(scaled, key, input_precision=precision)

            is_after = places + size < num
            after = tl.load(in_order + places + size, mask=is_after, other=0)
            query = _rows(query_key, after, is_after, query_key_l, head_dim, padded_dim, widen)
            query_grad = _rows(grad_output, after, is_after, output_l, head_dim, padded_dim, widen)
            after_log_sum = tl.load(log_sum + after, mask=is_after, other=float("inf"))
            after_dot = tl.load(dot + after, mask=is_after, other=0.0)
            scores = _scores(query, own, inverse, is_token, nowhere, scale, num == 1, precision)
            weights = tl.exp2(scores - after_log_sum[:, None])
            of_weights = tl.dot(query_grad, tl.trans(own_value), input_precision=precision)
            of_scores = weights * (of_weights - after_dot[:, None])
            of_key += tl.dot(tl.trans(of_scores).to(query.dtype), query, input_precision=precision)
            of_value += tl.dot(tl.trans(weights).to(query_grad.dtype), query_grad, input_precision=precision)

            unit = own.to(tl.float32) * inverse[:, None]
            of_key -= unit * tl.sum(unit * of_key, axis=1)[:, None]
            # Scores are in powers of two, gradients are not.
            of_query_key = (of_query + of_key * inverse[:, None]) * (scale * 0.6931471805599453)
            sum_query_key += cell * sum_b + head * sum_h
            sum_value += cell * sum_b + head * sum_h
            if not is_first:
                of_query_key += _rows(sum_query_key, tokens, is_token, sum_l, head_dim, padded_dim, widen)
                of_value += _rows(sum_value, tokens, is_token, sum_l, head_dim, padded_dim, widen)
            if is_last:
                grad_query_key += cell * grad_b + head * grad_h
                grad_value += cell * grad_b + head * grad_h
                _put(grad_query_key, tokens, is_token, grad_l, of_query_key, head_dim, padded_dim)
                _put(grad_value, tokens, is_token, grad_l, of_value, head_dim, padded_dim)
            else:
                _put(sum_query_key, tokens, is_token, sum_l, of_query_key, head_dim, padded_dim)
                _put(sum_value, tokens, is_token, sum_l, of_value, head_dim, padded_dim)

    @triton.jit
    def _sign_codes_kernel(
        query_key, rotations, num_columns, mask, codes, heads, length, columns,
        query_key_b, query_key_h, query_key_l,
        rounds: tl.constexpr, head_dim: tl.constexpr, padded_dim: tl.constexpr, padded_columns: tl.constexpr,
        tokens: tl.constexpr, has_mask: tl.constexpr, widen: tl.constexpr,
    ):  # fmt: skip
        """Write each round's code of some tokens of a head: the signs of their projections as binary digits."""
        row = tl.program_id(1).to(tl.int64)
        cell, head = row // heads, row % heads
        used = tl.load(num_columns + cell)
        token = tl.program_id(0) * tokens + tl.arange(0, tokens)
        is_token = token < length
        query_key += cell * query_key_b + head * query_key_h
        vectors = _rows(query_key, token, is_token, query_key_l, head_dim, padded_dim, widen).to(tl.float32)
        column, dimension = tl.arange(0, padded_columns), tl.arange(0, padded_dim)
        is_hidden = tl.zeros((tokens,), dtype=tl.int1)
        if has_mask:
            is_hidden = tl.load(mask + cell * length + token, mask=is_token, other=0) == 0
        place_value = tl.where(column < used, 1 << tl.maximum(used - 1 - column, 0), 0)
        for hash_round in tl.static_range(rounds):
            where = (dimension < head_dim)[:, None] & (column < columns)[None, :]
            at = (hash_round * head_dim + dimension[:, None]) * columns + column[None, :]
            rotation = tl.load(rotations + at, mask=where, other=0.0)
            projected = tl.dot(vectors, rotation, input_precision="ieee")
            code = tl.sum(tl.where(projected > 0, place_value[None, :], 0), axis=1)
            code = tl.where(is_hidden, 1 << used, code).to(tl.int16)
            tl.store(codes + (row * rounds + hash_round) * length + token, code, mask=is_token)
