"""Attention on a GPU: whether it is right, how fast it is beside others, and how near to what the device can do."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from screformer.benchmarks.measuring import STEPS, Row, Shape, Step, Workload, make_call, peak_memory, time_in_turn
from screformer.benchmarks.rivals import (
    SEED,
    exact_attention,
    our_attention_bfloat16,
    reformer_pytorch_attention,
    transformers_attention,
)
from screformer.configuration_screformer import ScReformerConfig
from screformer.lsh_attention import draw_rotations, lsh_attention, lsh_order
from screformer.lsh_attention_triton import padded_width

FLASH = "flash"
ROUNDS = (1, 2, 4)
DTYPES = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 8e-3}  # what rounding of results alone leaves
CHECKED = {"head_dims": (16, 20, 32, 64), "rounds": (1, 3), "length": 300, "bucket_size": 64}
BFLOAT16_BYTES = 2

logger = logging.getLogger(__name__)

Builds = Mapping[str, Callable[[Shape, str], Workload]]


def ours(rounds: int) -> str:
    """Return the contestant's name for a number of hash rounds."""
    return f"ours, {rounds} round{'s' if rounds > 1 else ''}"


def our_attention(rounds: int, shape: Shape, device: str) -> Workload:
    """LSH attention of this package with that many rounds, bfloat16."""
    return our_attention_bfloat16(replace(shape, num_hashes=rounds), device)


def flash_attention(shape: Shape, device: str) -> Workload:
    """PyTorch's exact attention by its flash kernel, which must serve; on a CPU by what PyTorch takes there."""
    workload = exact_attention(shape, device, torch.bfloat16)
    if torch.device(device).type == "cpu":
        return workload

    def forward() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return workload.forward()

    return workload._replace(forward=forward)


BUILDS: Builds = {
    **{ours(rounds): partial(our_attention, rounds) for rounds in ROUNDS},
    FLASH: flash_attention,
    "transformers": partial(transformers_attention, dtype=torch.bfloat16),
    "reformer-pytorch": partial(reformer_pytorch_attention, dtype=torch.bfloat16),
}


def check_correctness(device: str, implementation: str, **checked: Any) -> list[Row]:
    """Compare output and gradients with the plain form in float64; padding and several rounds among them.

    Returns a row for each type of number, head width and number of rounds: the greatest error relative to the float64
    result, that of the plain form in the same type, and ``is_right``: at most twice that, or rounding alone.

    Parameters
    ----------
    device, implementation
        Where, and which form of `lsh_attention`.
    **checked
        Instead of values in `CHECKED`.
    """
    options = {**CHECKED, **checked}
    rows = []
    for dtype in DTYPES:
        for head_dim in options["head_dims"]:
            for rounds in options["rounds"]:
                errors = _errors(device, implementation, dtype, head_dim, rounds, options)
                worst = max(errors, key=lambda pair: pair[0] / max(2 * pair[1], DTYPES[dtype]))
                rows.append(
                    {
                        "dtype": dtype,
                        "head_dim": head_dim,
                        "rounds": rounds,
                        "error": worst[0],
                        "plain_error": worst[1],
                        "is_right": all(own <= max(2 * plain, DTYPES[dtype]) for own, plain in errors),
                    }
                )
    return rows


def _errors(
    device: str, implementation: str, dtype: str, head_dim: int, rounds: int, options: Mapping[str, Any]
) -> list[tuple[float, float]]:
    """Return (our error, the plain form's) of output and both gradients."""
    generator = torch.Generator().manual_seed(SEED)
    length, bucket_size = options["length"], options["bucket_size"]
    shape = (3, 2, 2, length, head_dim)
    tensors = torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)).unbind(0)
    mask = torch.rand((2, length), generator=generator).to(device) < 0.8
    mask[:, 0] = True
    rotations = draw_rotations(rounds, head_dim, 12, seed=SEED).to(device)
    order = lsh_order(tensors[0], rotations, bucket_size=bucket_size, attention_mask=mask, hashing="sign")

    def differentiate(name: str, *given: Tensor) -> tuple[Tensor, ...]:
        query_key, value = (tensor.detach().clone().requires_grad_() for tensor in given[:2])
        output = lsh_attention(
            query_key,
            value,
            rotations,
            bucket_size=bucket_size,
            attention_mask=mask,
            order=order,
            implementation=name,  # type: ignore[arg-type]
        )
        output.backward(given[2])
        assert query_key.grad is not None
        assert value.grad is not None
        return output.detach(), query_key.grad, value.grad

    exact = differentiate("reference", *(tensor.double() for tensor in tensors))
    plain, found = differentiate("reference", *tensors), differentiate(implementation, *tensors)

    def error(result: Tensor, expected: Tensor) -> float:
        return float((result.double() - expected).norm() / expected.norm().clamp(min=1e-12))

    return [
        (error(own, expected), error(rough, expected)) for own, rough, expected in zip(found, plain, exact, strict=True)
    ]


def measure_ladder(
    shapes: Sequence[Shape], device: str, *, repeats: int, builds: Builds = BUILDS
) -> Iterator[list[Row]]:
    """Yield the rows of each shape: contestant, step, seconds, median, peak bytes above the inputs; or why none."""
    for shape in shapes:
        yield [row for step in STEPS for row in _measure_shape(shape, step, device, repeats, builds)]


def _measure_shape(shape: Shape, step: Step, device: str, repeats: int, builds: Builds) -> Iterator[Row]:
    place = {"step": step, "length": shape.length, "batch_size": shape.batch_size}
    calls, peaks = {}, {}
    for name, build in builds.items():
        try:
            call = make_call(build(shape, device), step)
            call()  # compiles, and tunes
            peaks[name] = peak_memory(call, device=device)
            calls[name] = call
        except (RuntimeError, ValueError, ImportError) as error:  # out of memory is a RuntimeError
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            logger.info("%s, length %d: %s cannot run: %s", step, shape.length, name, reason)
            yield {**place, "contestant": name, "reason": reason}
            _free(device)
    for name, seconds in time_in_turn(calls, repeats=repeats, device=device).items():
        measured = {"seconds": seconds, "median_seconds": median(seconds), "peak_bytes": peaks[name]}
        logger.info("%s, length %d: %s takes %.3f ms", step, shape.length, name, 1000 * median(seconds))
        yield {**place, "contestant": name, **measured}
    _free(device)


def _free(device: str) -> None:
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def attention_counts(shape: Shape, rounds: int) -> dict[str, dict[str, float]]:
    """Return the flops in matrix units, exponentials and bytes of our kernels in bfloat16, as their source states them.

    Parameters
    ----------
    shape
        Of the batch.
    rounds
        Of hashing.
    """
    head_dim = shape.hidden_size // shape.num_heads
    padded, size, wide = padded_width(head_dim), shape.bucket_size, BFLOAT16_BYTES
    columns = ScReformerConfig(num_genes=shape.length, bucket_size=size).max_hash_columns
    head_tokens = shape.batch_size * shape.num_heads * shape.length
    later = rounds - 1
    per_token = {
        "forward": {
            "flops": 8 * size * padded * rounds,
            "exponentials": 2 * size * rounds,
            "bytes": 5 * head_dim * wide * rounds + 8 * head_dim * later + head_dim * wide,
        },
        "backward": {
            "flops": 24 * size * padded * rounds,
            "exponentials": 3 * size * rounds,
            "bytes": 12 * head_dim * wide * rounds + 16 * head_dim * later + 2 * head_dim * wide,
        },
        "hashing": {
            "flops": 2 * head_dim * rounds * columns,
            "exponentials": 0,
            "bytes": head_dim * wide + 2 * rounds,
        },
    }
    return {part: {name: float(count * head_tokens) for name, count in of.items()} for part, of in per_token.items()}


def measure_peaks(device: str, *, width: int = 8192, repeats: int = 10) -> dict[str, float]:
    """Return what the device reaches: flops a second of a bfloat16 matrix product, bytes a second of a copy."""
    left, right = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    target = torch.empty_like(left)
    calls = {"product": lambda: _discard(left @ right), "copy": lambda: _discard(target.copy_(left))}
    seconds = {name: min(each) for name, each in time_in_turn(calls, repeats=repeats, device=device).items()}
    return {
        "flops_per_second": 2 * width**3 / seconds["product"],
        "bytes_per_second": 2 * left.nbytes / seconds["copy"],
    }


def measure_roofline(shape: Shape, device: str, peaks: Mapping[str, float], *, repeats: int) -> list[Row]:
    """Return, for each part and number of rounds, its time and what share of the device's peaks it reaches.

    ``bound_seconds`` is the larger of flops and bytes over the peaks: what the device would take at the least, if every
    byte that is gathered came from its memory. Sorting is timed with hashing, and not counted.
    """
    rows = []
    for rounds in ROUNDS:
        counts = attention_counts(shape, rounds)
        for part, seconds in _time_parts(shape, rounds, device, repeats).items():
            of = counts[part]
            by = {"flops": of["flops"] / peaks["flops_per_second"], "bytes": of["bytes"] / peaks["bytes_per_second"]}
            rows.append(
                {
                    "part": part,
                    "rounds": rounds,
                    "seconds": seconds,
                    **of,
                    "share_of_flops": by["flops"] / seconds,
                    "share_of_bytes": by["bytes"] / seconds,
                    "bound_seconds": max(by.values()),
                }
            )
    return rows


def _time_parts(shape: Shape, rounds: int, device: str, repeats: int) -> dict[str, float]:
    workload = our_attention(rounds, shape, device)
    query_key, value = (
        tensor.detach().unflatten(-1, (shape.num_heads, -1)).transpose(1, 2) for tensor in workload.inputs
    )
    columns = ScReformerConfig(num_genes=shape.length, bucket_size=shape.bucket_size).max_hash_columns
    rotations = draw_rotations(rounds, query_key.shape[-1], columns, seed=SEED).to(device)
    hash_tokens = partial(lsh_order, query_key, rotations, bucket_size=shape.bucket_size, hashing="sign")
    order = hash_tokens()
    attend = partial(lsh_attention, rotations=rotations, bucket_size=shape.bucket_size, hashing="sign", order=order)
    leaves = tuple(tensor.clone().requires_grad_() for tensor in (query_key, value))
    calls = {
        "hashing": torch.no_grad()(lambda: _discard(hash_tokens())),
        "forward": torch.no_grad()(lambda: _discard(attend(query_key, value))),
        "both": lambda: attend(*leaves).backward(value),
    }
    seconds = {name: median(each) for name, each in time_in_turn(calls, repeats=repeats, device=device).items()}
    backward = max(seconds["both"] - seconds["forward"], math.ulp(1.0))
    return {"hashing": seconds["hashing"], "forward": seconds["forward"], "backward": backward}


def _discard(_: object) -> None:
    return None
