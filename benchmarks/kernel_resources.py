"""What the GPU kernels take of a GPU, by compiling them: no GPU is needed, and what does not compile is found.

Registers, spilled bytes and shared memory of each kernel for NVIDIA's and AMD's architectures, and how many programs
fit on one multiprocessor with them. For NVIDIA the assembler (ptxas, which Triton brings) tells them, for AMD the
metadata of the assembly.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from screformer import lsh_attention_triton
from screformer.benchmarks.measuring import Row
from screformer.benchmarks.speed_figures import format_table, write_text
from screformer.train.result_files import write_json

NAME = "kernel_resources"
DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
HALF_OR_SINGLE = ("query_key", "value", "output", "grad_output", "grad_query_key", "grad_value")
SINGLE = ("running", "states", "log_sum", "dot", "sum_query_key", "sum_value", "rotations")
INTEGERS = {"order": "*i32", "lengths": "*i32", "num_columns": "*i32", "codes": "*i16", "mask": "*i1"}


class Gpu(NamedTuple):
    """An architecture, and what one multiprocessor of it has.

    Attributes
    ----------
    backend, architecture, warp_size
        As Triton names them.
    registers
        Of 32 bits; for AMD, those of a thread's lane in one SIMD unit.
    shared_bytes
        For all programs together.
    warps
        The most at once.
    """

    backend: str
    architecture: int | str
    warp_size: int
    registers: int
    shared_bytes: int
    warps: int


GPUS = {
    "sm_80 (A100)": Gpu("cuda", 80, 32, 65_536, 164 * 1024, 64),
    "sm_90 (H100)": Gpu("cuda", 90, 32, 65_536, 228 * 1024, 64),
    "gfx942 (MI300)": Gpu("hip", "gfx942", 64, 512, 64 * 1024, 32),
}


class Use(NamedTuple):
    """What one program of a kernel takes."""

    registers: int
    spilled_bytes: int
    shared_bytes: int


def measure_kernels(
    *,
    head_dim: int = 20,
    bucket_size: int = 64,
    rounds: int = 4,
    dtype: str = "bfloat16",
    gpus: Sequence[str] = tuple(GPUS),
) -> list[Row]:
    """Compile every kernel for some GPUs and return a row each: what a program takes, and how many fit.

    Parameters
    ----------
    head_dim, bucket_size, rounds
        As the model's config has them; a middle round is compiled, which does the most.
    dtype
        ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    gpus
        Names in `GPUS`.

    Raises
    ------
    RuntimeError
        Triton is not installed, or runs as its interpreter.
    ValueError
        There is no such GPU.
    """
    if lsh_attention_triton.triton is None or lsh_attention_triton.is_interpreted():
        raise RuntimeError("kernels are compiled by Triton: pip install triton, and leave TRITON_INTERPRET unset")
    unknown = sorted({*gpus} - {*GPUS})
    if unknown:
        raise ValueError(f"gpus got {unknown}; known are {list(GPUS)}")
    rows = []
    torch_dtype = getattr(torch, dtype)
    for gpu, (name, kernel, warps, constants) in itertools.product(
        gpus, _cases(head_dim, bucket_size, rounds, torch_dtype)
    ):
        precision = lsh_attention_triton.product_precision(torch_dtype, is_nvidia=GPUS[gpu].backend == "cuda")
        constants = {key: precision if key == "precision" else value for key, value in constants.items()}
        use = _compile(kernel, warps, constants, DTYPES[dtype], GPUS[gpu])
        fits = _programs_at_once(use, GPUS[gpu], warps)
        rows.append(
            {
                "kernel": name,
                "gpu": gpu,
                "warps": warps,
                **use._asdict(),
                "programs_at_once": fits,
                "occupancy": fits * warps / GPUS[gpu].warps,
            }
        )
    return rows


def _cases(
    head_dim: int, bucket_size: int, rounds: int, dtype: torch.dtype
) -> Iterator[tuple[str, Any, int, dict[str, Any]]]:
    padded = lsh_attention_triton.padded_width(head_dim)
    shape = {"rounds": rounds, "head_dim": head_dim, "padded_dim": padded, "widen": False}
    walk = {**shape, "size": bucket_size, "is_first": False, "is_last": False, "precision": None}
    hashing = {**shape, "padded_columns": 16, "tokens": lsh_attention_triton.HASH_TOKENS, "has_mask": True}
    warps = lsh_attention_triton.attention_warps(head_dim, bucket_size, dtype)
    yield "forward", lsh_attention_triton._attend_kernel, warps, walk
    yield "backward", lsh_attention_triton._differentiate_kernel, warps, walk
    yield "hashing", lsh_attention_triton._sign_codes_kernel, lsh_attention_triton.HASH_WARPS, hashing


def _compile(
    kernel: Any, warps: int, constants: dict[str, Any], dtype: str, gpu: Gpu
) -> Use:  # Any: Triton has no types
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    types = {
        **dict.fromkeys(HALF_OR_SINGLE, f"*{dtype}"),
        **dict.fromkeys(SINGLE, "*fp32"),
        **INTEGERS,
        **dict.fromkeys(constants, "constexpr"),
        "scale": "fp32",
    }
    source = ASTSource(
        fn=kernel, signature={name: types.get(name, "i32") for name in kernel.arg_names}, constexprs=constants
    )
    target = GPUTarget(gpu.backend, gpu.architecture, gpu.warp_size)
    compiled = compile_kernel(source, target=target, options={"num_warps": warps})
    if gpu.backend == "cuda":
        registers, spilled = _assemble(compiled.asm["ptx"], int(gpu.architecture))
    else:
        registers, spilled = (_amd_count(compiled.asm["amdgcn"], key) for key in ("vgpr_count", "vgpr_spill_count"))
        spilled *= 4
    return Use(registers, spilled, compiled.metadata.shared)


def _assemble(ptx: str, capability: int) -> tuple[int, int]:
    """Return a thread's registers and spilled bytes, as ptxas tells them."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None, "every PTX file names its target"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        told = subprocess.run(
            [get_ptxas(capability).path, "-v", f"--gpu-name={target[1]}", str(source), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        ).stderr
    registers, spilled = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
    assert registers is not None, told
    assert spilled is not None, told
    return int(registers[1]), int(spilled[1])


def _amd_count(assembly: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s*(\d+)", assembly)
    assert found is not None, f"the metadata of AMD's assembly has no {key}"
    return int(found[1])


def _programs_at_once(use: Use, gpu: Gpu, warps: int) -> int:
    """Return how many programs registers, shared memory and warps leave room for on one multiprocessor."""
    if gpu.backend == "cuda":
        # A warp's registers are handed out by 256, a program's shared memory with 1 KB of the system's.
        of_warp = -(-use.registers * gpu.warp_size // 256) * 256
        by_registers = gpu.registers // (of_warp * warps)
        by_memory = gpu.shared_bytes // (use.shared_bytes + 1024)
    else:
        by_registers = (gpu.registers // max(use.registers, 1)) * 4 // warps  # four SIMD units
        by_memory = gpu.shared_bytes // max(use.shared_bytes, 1)
    return max(0, min(by_registers, by_memory, gpu.warps // warps))


def format_kernel_resources(results: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    columns = {
        "GPU": "gpu",
        "Kernel": "kernel",
        "Warps": "warps",
        "Registers a thread": "registers",
        "Spilled bytes": "spilled_bytes",
        "Shared bytes": "shared_bytes",
        "Programs at once": "programs_at_once",
    }
    lines = [[*(str(row[key]) for key in columns.values()), f"{row['occupancy']:.0%}"] for row in results["kernels"]]
    shape = results["shape"]
    told = (
        f"{results['date']}, Triton {results['triton']}; compiled, not run. Heads {shape['head_dim']} wide, chunks of "
        f"{shape['bucket_size']}, {shape['rounds']} rounds (a middle one), {shape['dtype']}. "
        f"Made by `{results['command']}`."
    )
    return f"# {results['question']}\n\n{told}\n\n{format_table([*columns, 'Occupancy'], lines)}\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, compile, and write ``kernel_resources.json`` and ``.md``."""
    parser = argparse.ArgumentParser(
        prog="screformer benchmark kernels",
        description="Registers, shared memory and occupancy of the GPU kernels, by compiling them; needs no GPU.",
        epilog="example: screformer benchmark kernels --head-dim 64 --output runs",
    )
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--head-dim", type=int, default=20, help="Width of a head (default: %(default)s).")
    parser.add_argument("--bucket-size", type=int, default=64, help="Tokens a chunk (default: %(default)s).")
    parser.add_argument("--rounds", type=int, default=4, help="Rounds of hashing (default: %(default)s).")
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="Of vectors (default: %(default)s).")
    parser.add_argument("--gpus", nargs="+", default=list(GPUS), help=f"Some of {', '.join(map(repr, GPUS))}.")
    given = parser.parse_args(argv)
    shape = {"head_dim": given.head_dim, "bucket_size": given.bucket_size, "rounds": given.rounds, "dtype": given.dtype}
    try:
        kernels = measure_kernels(**shape, gpus=given.gpus)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
    results = {
        "question": "What do the GPU kernels take of a GPU?",
        "command": "screformer benchmark kernels",
        "date": date.today().isoformat(),
        "triton": version("triton"),
        "shape": shape,
        "kernels": kernels,
    }
    Path(given.output).mkdir(parents=True, exist_ok=True)
    write_json(Path(given.output) / f"{NAME}.json", results)
    text = format_kernel_resources(results)
    write_text(Path(given.output) / f"{NAME}.md", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
