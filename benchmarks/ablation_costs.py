"""What a training step of one cell costs with each kind of attention, at all genes and at the variable ones.

The paper says that a standard BERT runs out of memory at all genes. It does with eager attention, which keeps a number
for every pair of genes, head and layer; it does not with `scaled_dot_product_attention`. Each is run once in a process
of its own, forward and backward, from hidden states to hidden states, without an optimizer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from screformer.benchmarks.contest import DEFAULT_LIMITS, PAPER_SHAPE, Limits
from screformer.benchmarks.measuring import Build, CannotRunError, Shape, memory_in_new_process
from screformer.benchmarks.rivals import bert_eager_encoder, bert_sdpa_encoder, our_encoder, our_exact_encoder
from screformer.model_cards.markdown import table
from screformer.train.result_files import write_json

logger = logging.getLogger("screformer.benchmarks.ablation_costs")
Json = dict[str, Any]
NUM_VARIABLE_GENES = 3_000  # the paper's
BYTES_OF_A_SCORE = 4
COST_SHAPE = replace(PAPER_SHAPE, num_layers=6)  # the paper's
COST_LIMITS = replace(DEFAULT_LIMITS, time_limit=600, memory_limit=18)


class Cost(NamedTuple):
    """One row: its title, what makes it, on how many genes (None: all), and whether it keeps every pair of genes."""

    title: str
    build: Build
    num_genes: int | None = None
    keeps_pairs: bool = False


COSTS = {
    "lsh": Cost("LSH attention, reversible (ours)", our_encoder),
    "exact": Cost("Exact attention (SDPA), reversible", our_exact_encoder),
    "bert_sdpa": Cost("Standard BERT (transformers), SDPA", bert_sdpa_encoder),
    "bert_eager": Cost("Standard BERT (transformers), eager", bert_eager_encoder, keeps_pairs=True),
    "bert_eager_variable_genes": Cost(
        "Standard BERT (transformers), eager", bert_eager_encoder, NUM_VARIABLE_GENES, keeps_pairs=True
    ),
    "bert_sdpa_variable_genes": Cost("Standard BERT (transformers), SDPA", bert_sdpa_encoder, NUM_VARIABLE_GENES),
}


def measure_costs(
    names: Sequence[str] = tuple(COSTS),
    *,
    shape: Shape = COST_SHAPE,
    limits: Limits = COST_LIMITS,
) -> list[Json]:
    """Return a row each: ``name``, ``title``, ``num_genes``, ``seconds``, ``peak_bytes``, ``reason``.

    ``reason`` says why there is no figure; ``pair_bytes`` is what attention scores alone take in one layer where they
    are kept, by arithmetic.

    Parameters
    ----------
    names
        Of `COSTS`.
    shape
        Default the paper's: 17,330 genes, 6 layers of 200, 10 heads.
    limits
        Memory and time that one may take, and where; `repeats` has no effect.

    Raises
    ------
    ValueError
        A name is unknown.
    """
    unknown = sorted(set(names) - set(COSTS))
    if unknown:
        raise ValueError(f"names got {unknown}; there are {', '.join(COSTS)}")
    rows: list[Json] = []
    for name in names:
        cost = COSTS[name]
        at = replace(shape, length=cost.num_genes or shape.length)
        row: Json = {"name": name, "title": cost.title, "num_genes": at.length, "shape": asdict(at)}
        row["pair_bytes"] = BYTES_OF_A_SCORE * at.num_heads * at.length**2 if cost.keeps_pairs else None
        row |= {"seconds": None, "peak_bytes": None, "reason": None}
        try:
            use = memory_in_new_process(
                cost.build,
                at,
                "training",
                device=limits.device,
                memory_limit=limits.memory_limit,
                time_limit=limits.time_limit,
            )
            row |= {"seconds": use.seconds, "peak_bytes": use.peak_bytes}
        except CannotRunError as error:
            row["reason"] = str(error)
        logger.info("%s, %d genes: %s", cost.title, at.length, row["reason"] or f"{row['seconds']:.2f} s")
        rows.append(row)
    return rows


def write_costs(rows: Sequence[Json], output: str | Path, *, provenance: Mapping[str, Any]) -> Json:
    """Write ``ablations-step_costs.json`` and ``.md`` of `measure_costs`' rows, and return the JSON."""
    shape = rows[0]["shape"]
    columns, cells = costs_rows(rows)
    notes = [
        f"One cell, {shape['num_layers']} layers of {shape['hidden_size']} with {shape['num_heads']} heads (the "
        "paper's width), from hidden states to hidden states, forward and backward once, without an optimizer, each in "
        "a process of its own. In brackets: times the first row. Lengths are multiples of the bucket size."
    ]
    results = {
        "question": "What does a training step cost with each kind of attention?",
        **provenance,
        "columns": columns,
        "rows": cells,
        "notes": notes,
        "steps": list(rows),
    }
    stem = Path(output, "ablations-step_costs")
    write_json(f"{stem}.json", results)
    text = "\n\n".join(
        [f"# {results['question']}", f"{results['date']}, `{results['command']}`.", *notes, table(columns, cells)]
    )
    Path(f"{stem}.md").write_text(text + "\n", encoding="utf-8")
    return results


def costs_rows(rows: Sequence[Json]) -> tuple[list[str], list[list[str]]]:
    """Return header and cells of the table, time and memory as multiples of the first that ran, ours."""
    known = [row for row in rows if row["seconds"] is not None]
    cells = []
    for row in rows:
        pairs = "" if row["pair_bytes"] is None else f"; scores of a layer alone are {row['pair_bytes'] / 1e9:.1f} GB"
        if row["seconds"] is None:
            measured = ["-", f"**{row['reason']}**{pairs}"]
        else:
            slower, larger = row["seconds"] / known[0]["seconds"], row["peak_bytes"] / known[0]["peak_bytes"]
            measured = [
                f"{row['seconds']:.2f} ({slower:.2g}x)", f"{row['peak_bytes'] / 1e9:.2f} ({larger:.2g}x){pairs}"
            ]  # fmt: skip
        cells.append([row["title"], f"{row['num_genes']:,}", *measured])
    return ["encoder", "genes", "seconds of a step", "GB of a step"], cells
