"""How near LSH attention comes to exact attention on real cells, and at what price: where its defaults come from.

Query-key and value are those of a model's layers on cells in the full gene space. For every number of rounds, bucket
size, family of hash functions, and rotations shared by the heads or not:

* *error*: ``|lsh - exact| / |exact|`` of the attention output, all cells, heads and genes of a layer together;
* *covered mass*: the share of a gene's exact softmax that lies on genes which it sees in at least one round, the mean
  over heads and evenly spaced genes;
* the time of both steps (hashing included) on one cell, all settings in turn, and their peak memory.

Two baselines say what hashing gains: genes in random order instead of hashed, and the mean of all values as the output.
Fresh and little trained weights attend almost evenly, and an even sample of genes is then nearer than similar genes;
``sharpness`` multiplies the queries, to see what holds once attention is sharper.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import anndata
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from screformer.benchmarks import rivals
from screformer.benchmarks.measuring import (
    STEPS,
    Row,
    Shape,
    Step,
    Workload,
    describe_device,
    make_call,
    memory_in_new_process,
    time_in_turn,
)
from screformer.benchmarks.speed_figures import format_hashing, plot_hashing, write_text
from screformer.configuration_screformer import ScReformerConfig
from screformer.lsh_attention import draw_rotations, exact_attention, lsh_attention, lsh_order
from screformer.lsh_hashing import FINER_COLUMNS, Hashing, num_hash_columns
from screformer.modeling_screformer import ScReformerLayer, ScReformerModel
from screformer.tokenization.example_cells import example_cells_path
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer
from screformer.train.result_files import software_versions, write_json

NAME = "hashing"
# "coarse_sign" is sign hashing with one bucket a chunk, as cross-polytope hashing has.
HASHINGS = ("cross_polytope", "coarse_sign", "sign")
ROUNDS = (1, 2, 4, 8)
BUCKET_SIZES = (32, 64, 128)
NUM_CELLS = 2
NUM_QUERIES = 128  # genes a head whose covered mass is taken
SEED = 2022
MEMORY_LIMIT, TIME_LIMIT = 14.0, 600.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setting:
    """One way to hash."""

    num_hashes: int
    bucket_size: int
    hashing: str
    is_per_head: bool = False

    @property
    def family(self) -> Hashing:
        """The family of hash functions."""
        return "cross_polytope" if self.hashing == "cross_polytope" else "sign"


class AttentionInputs(NamedTuple):
    """What a layer's attention gets, both (B, H, L, D)."""

    query_key: Tensor
    value: Tensor


def benchmark_hashing(
    output: str | Path,
    *,
    checkpoint: str | None = None,
    num_cells: int = NUM_CELLS,
    layers: Sequence[int] | None = None,
    settings: Sequence[Setting] | None = None,
    sharpness: float = 1.0,
    repeats: int = 3,
    with_memory: bool = True,
    command: str = "benchmark_hashing",
) -> dict[str, Any]:
    """Measure on packaged cells, write ``hashing.json``, ``.md`` and ``.png``, and return the JSON.

    Parameters
    ----------
    output
        Folder for the results.
    checkpoint
        Model and tokenizer; without one a ``base`` model with fresh weights from a fixed seed.
    num_cells
        Cells, evenly spaced in the packaged file.
    layers
        Numbers of the layers, from 0; the times are those of the first one. Default: first, middle and last.
    settings
        What to compare (default: `every_setting`).
    sharpness
        What queries are multiplied by; other than 1 the files are named by it.
    repeats
        Timed calls of each setting and step, after one to warm up.
    with_memory
        Whether to measure peak memory, each call in a process of its own.
    command
        What the result file says that it was made by.

    Raises
    ------
    ValueError
        The model lacks a layer, or a number is not positive.
    """
    for name, number in (("num_cells", num_cells), ("repeats", repeats), ("sharpness", sharpness)):
        if not number > 0:
            raise ValueError(f"{name} must be positive, got {number}")
    model, tokenizer = load_model(checkpoint)
    input_ids = read_cells(tokenizer, num_cells)
    depth = model.config.num_hidden_layers
    layers = sorted({0, depth // 2, depth - 1}) if layers is None else layers
    settings = every_setting() if settings is None else settings
    results = {
        "question": "How near is LSH attention to exact attention on real cells, and at what price?",
        "command": command,
        "date": date.today().isoformat(),
        "device": describe_device("cpu"),
        "versions": software_versions(),
        "model": checkpoint or f"base, fresh weights, seed {SEED}",
        "num_cells": num_cells,
        "num_genes": input_ids.shape[1],
        "layers": list(layers),
        "sharpness": sharpness,
        **measure_settings(
            model, input_ids, layers, settings, sharpness=sharpness, repeats=repeats, with_memory=with_memory
        ),
    }
    stem = Path(output) / (NAME if sharpness == 1 else f"{NAME}_sharpness_{sharpness:g}")
    write_json(stem.with_suffix(".json"), results)
    write_text(stem.with_suffix(".md"), format_hashing(results))
    plot_hashing(results, stem.with_suffix(".png"))
    return results


def every_setting(
    rounds: Iterable[int] = ROUNDS, bucket_sizes: Iterable[int] = BUCKET_SIZES, hashings: Iterable[str] = HASHINGS
) -> list[Setting]:
    """Return all combinations, rotations shared by the heads and not."""
    return [Setting(*choice) for choice in itertools.product(rounds, bucket_sizes, hashings, (False, True))]


def load_model(checkpoint: str | None) -> tuple[ScReformerModel, ScReformerTokenizer]:
    """Return the encoder and tokenizer of a checkpoint, or of the preset ``base`` with fresh weights."""
    if checkpoint is not None:
        tokenizer = ScReformerTokenizer.from_pretrained(checkpoint)
        return ScReformerModel.from_pretrained(checkpoint).eval(), tokenizer
    tokenizer = ScReformerTokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        config = ScReformerConfig.preset("base", num_genes=tokenizer.num_genes, num_bins=tokenizer.num_bins)
        return ScReformerModel(config).eval(), tokenizer


def read_cells(tokenizer: ScReformerTokenizer, num_cells: int) -> Tensor:
    """Return bins (cells, num_genes) of evenly spaced packaged cells, genes in vocabulary order."""
    adata = anndata.read_h5ad(example_cells_path())
    rows = np.linspace(0, adata.n_obs - 1, num_cells).astype(int)
    return tokenizer(adata[rows].copy(), gene_space="full", return_tensors="pt")["input_ids"]


@torch.no_grad()
def attention_inputs(model: ScReformerModel, input_ids: Tensor, layers: Sequence[int]) -> dict[int, AttentionInputs]:
    """Return what the attention of these layers gets when the model reads the cells.

    Raises
    ------
    ValueError
        The model lacks a layer.
    """
    every = model.encoder.layers
    if not layers or not 0 <= min(layers) <= max(layers) < len(every):
        raise ValueError(f"layers must be of 0 to {len(every) - 1}, got {list(layers)}")
    embedded = model.embeddings(model.embeddings.bin_embeddings(input_ids), None)
    seconds = itertools.chain([embedded], (streams.second for streams in model.encoder.iterate(embedded)))
    inputs = {}
    for number, (layer, second) in enumerate(zip(every[: max(layers) + 1], seconds, strict=False)):
        if number in layers:
            assert isinstance(layer, ScReformerLayer)
            states = layer.attention_norm(second)
            projected = (layer.attention.query_key(states), layer.attention.value(states))
            inputs[number] = AttentionInputs(
                *(each.unflatten(-1, (model.config.num_attention_heads, -1)).transpose(1, 2) for each in projected)
            )
    return inputs


def measure_settings(
    model: ScReformerModel,
    input_ids: Tensor,
    layers: Sequence[int],
    settings: Sequence[Setting],
    *,
    sharpness: float,
    repeats: int,
    with_memory: bool,
) -> dict[str, Any]:
    """Return ``settings`` (a row each) and ``baselines``: errors, covered mass, times and memory."""
    inputs = {
        layer: AttentionInputs(query_key * sharpness, value)
        for layer, (query_key, value) in attention_inputs(model, input_ids, layers).items()
    }
    exact = {layer: exact_attention(*of_layer) for layer, of_layer in inputs.items()}
    logger.info("exact attention of %d layers is there", len(inputs))
    default = Setting(model.config.num_hashes, model.config.bucket_size, model.config.hashing)
    rows = []
    for setting in settings:
        rows.append({**asdict(setting), "is_default": setting == default, **_errors(inputs, exact, setting)})
        logger.info("%s: error %.3f", setting, rows[-1]["error"])
    windows = dict.fromkeys((setting.num_hashes, setting.bucket_size) for setting in settings)
    random_order = []
    for rounds, size in windows:
        errors = _errors(inputs, exact, Setting(rounds, size, default.hashing), is_random=True)
        random_order.append({"num_hashes": rounds, "bucket_size": size, **errors})
    of_means = [
        relative_error(value.mean(dim=2, keepdim=True).expand_as(value), exact[layer])
        for layer, (_, value) in inputs.items()
    ]
    baselines = {"mean_of_values": {"error": mean(of_means)}, "random_order": random_order}
    _add_times(rows, AttentionInputs(*(each[:1] for each in inputs[layers[0]])), settings, repeats)
    if with_memory:
        _add_memory(rows, model.config, input_ids.shape[1], windows)
    return {"settings": rows, "baselines": baselines}


def relative_error(output: Tensor, exact: Tensor) -> float:
    """Return ``|output - exact| / |exact|``."""
    return float((output - exact).norm() / exact.norm())


def covered_mass(query_key: Tensor, order: Tensor, *, bucket_size: int, num_queries: int = NUM_QUERIES) -> float:
    """Return the mean share of a token's exact softmax on tokens that it sees in at least one round of `order`.

    Parameters
    ----------
    query_key
        (B, H, L, D).
    order
        (B, H, R, L), of `lsh_order`.
    bucket_size
        Tokens a chunk; a token sees its own chunk and the one before.
    num_queries
        How many evenly spaced tokens of each head to look at.
    """
    length, width = query_key.shape[2:]
    queries = torch.linspace(0, length - 1, min(num_queries, length), dtype=torch.float64).long()
    places = torch.empty_like(order, dtype=torch.long)
    places.scatter_(-1, order.long(), torch.arange(length).expand_as(order))
    chunks = places // bucket_size
    shares = []
    for head in range(query_key.shape[1]):
        key = F.normalize(query_key[:, head], dim=-1)
        scores = query_key[:, head, queries] @ key.transpose(1, 2) / math.sqrt(width)
        scores[:, torch.arange(len(queries)), queries] = -torch.inf  # a token attends to itself only if alone
        chunk_of_query, chunk_of_key = chunks[:, head][..., queries, None], chunks[:, head][..., None, :]
        is_seen = ((chunk_of_key == chunk_of_query) | (chunk_of_key == chunk_of_query - 1)).any(dim=1)
        shares.append((scores.softmax(dim=-1) * is_seen).sum(dim=-1).mean())
    return float(torch.stack(shares).mean())


def find_order(query_key: Tensor, setting: Setting, rotations: Sequence[Tensor]) -> Tensor:
    """Return the token order (B, H, R, L); `rotations` are one set, or one a head."""
    hash_tokens = partial(lsh_order, bucket_size=setting.bucket_size, hashing=setting.family)
    if not setting.is_per_head:
        return hash_tokens(query_key, rotations[0])
    heads = zip(query_key.split(1, dim=1), rotations, strict=True)
    return torch.cat([hash_tokens(head, own) for head, own in heads], dim=1)


def draw_setting_rotations(setting: Setting, query_key: Tensor) -> list[Tensor]:
    """Return one set of rotations (R, D, C), or one a head."""
    _, heads, length, width = query_key.shape
    columns = num_hash_columns(length, setting.bucket_size, setting.family)
    if setting.hashing == "coarse_sign":
        columns = max(1, columns - FINER_COLUMNS)
    num_sets = heads if setting.is_per_head else 1
    return [draw_rotations(setting.num_hashes, width, columns, seed=SEED + number) for number in range(num_sets)]


def draw_random_order(query_key: Tensor, setting: Setting) -> Tensor:
    """Return the tokens in random order (B, H, R, L), as if hashing knew nothing."""
    generator = torch.Generator().manual_seed(SEED)
    batch, heads, length, _ = query_key.shape
    return torch.rand(batch, heads, setting.num_hashes, length, generator=generator).argsort(dim=-1).to(torch.int32)


@torch.no_grad()
def _errors(
    inputs: dict[int, AttentionInputs], exact: dict[int, Tensor], setting: Setting, *, is_random: bool = False
) -> Row:
    errors, masses = [], []
    for layer, (query_key, value) in inputs.items():
        rotations = draw_setting_rotations(setting, query_key)
        order = draw_random_order(query_key, setting) if is_random else find_order(query_key, setting, rotations)
        output = lsh_attention(query_key, value, rotations[0], bucket_size=setting.bucket_size, order=order)
        errors.append(relative_error(output, exact[layer]))
        masses.append(covered_mass(query_key, order, bucket_size=setting.bucket_size))
    return {"error": mean(errors), "covered_mass": mean(masses), "layer_errors": errors, "layer_covered_masses": masses}


def _add_times(rows: list[Row], inputs: AttentionInputs, settings: Sequence[Setting], repeats: int) -> None:
    """Add each setting's times on one cell."""
    for step in STEPS:
        calls = {str(index): make_call(_workload(inputs, setting), step) for index, setting in enumerate(settings)}
        for index, seconds in time_in_turn(calls, repeats=repeats).items():
            rows[int(index)][f"{step}_seconds"] = seconds
            rows[int(index)][f"{step}_median_seconds"] = median(seconds)
        logger.info("%s: timed %d settings", step, len(settings))


def _workload(inputs: AttentionInputs, setting: Setting) -> Workload:
    query_key, value = (each.clone() for each in inputs)
    rotations = draw_setting_rotations(setting, query_key)

    def forward() -> Tensor:
        order = find_order(query_key.detach(), setting, rotations)
        return lsh_attention(query_key, value, rotations[0], bucket_size=setting.bucket_size, order=order)

    return Workload(forward, (query_key, value), torch.ones_like(value))


def _add_memory(rows: list[Row], config: ScReformerConfig, length: int, windows: Iterable[tuple[int, int]]) -> None:
    """Add the peak memory of each number of rounds and bucket size, on random inputs hashed the default way."""
    for rounds, bucket_size in windows:
        shape = Shape(
            length,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            bucket_size=bucket_size,
            num_hashes=rounds,
        )
        peaks = {f"{step}_peak_bytes": _peak_bytes(shape, step) for step in STEPS}
        for row in rows:
            if (row["num_hashes"], row["bucket_size"]) == (rounds, bucket_size):
                row.update(peaks)
        logger.info("%d rounds, buckets of %d: memory measured", rounds, bucket_size)


def _peak_bytes(shape: Shape, step: Step) -> int:
    use = memory_in_new_process(rivals.our_attention, shape, step, memory_limit=MEMORY_LIMIT, time_limit=TIME_LIMIT)
    return use.peak_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(
        prog="python -m screformer.benchmarks.hashing",
        description="Measure how near LSH attention comes to exact attention on real cells, and at what price.",
        epilog="example: python -m screformer.benchmarks.hashing --rounds 2 4 --layers 0 --output runs",
    )
    parser.add_argument("--output", default="benchmarks/results", help="Folder for the results (default: %(default)s).")
    parser.add_argument("--checkpoint", help="Model and tokenizer (default: the base preset with fresh weights).")
    parser.add_argument("--cells", type=int, default=NUM_CELLS, help="Number of cells (default: %(default)s).")
    parser.add_argument(
        "--layers", type=int, nargs="+", help="Numbers of layers, from 0 (default: first, middle and last)."
    )
    parser.add_argument("--rounds", type=int, nargs="+", default=list(ROUNDS), help="Numbers of hash rounds.")
    parser.add_argument("--bucket-sizes", type=int, nargs="+", default=list(BUCKET_SIZES), help="Bucket sizes.")
    parser.add_argument("--hashings", nargs="+", choices=HASHINGS, default=list(HASHINGS), help="Hash functions.")
    parser.add_argument(
        "--sharpness", type=float, default=1.0, help="What queries are multiplied by (default: %(default)s)."
    )
    parser.add_argument("--repeats", type=int, default=3, help="Timed calls of each setting (default: %(default)s).")
    parser.add_argument("--no-memory", action="store_true", help="Leave peak memory out.")
    parser.add_argument("--threads", type=int, help="Threads of PyTorch (default: its own choice).")
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    given = sys.argv[1:] if argv is None else argv
    try:
        results = benchmark_hashing(
            options.output,
            checkpoint=options.checkpoint,
            num_cells=options.cells,
            layers=options.layers,
            settings=every_setting(options.rounds, options.bucket_sizes, options.hashings),
            sharpness=options.sharpness,
            repeats=options.repeats,
            with_memory=not options.no_memory,
            command=" ".join([parser.prog, *given]),
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.stdout.write("\n" + format_hashing(results))


if __name__ == "__main__":
    main()
