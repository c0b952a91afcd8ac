"""Whole models on a GPU: cells a second and memory of inference and training, and where the time goes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from screformer.benchmarks.measuring import Row, peak_memory, time_in_turn
from screformer.benchmarks.rivals import SEED
from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM
from screformer.train.collator import IGNORED_LABEL, CellCollator
from screformer.train.compiled_layers import compile_layers
from screformer.train.cuda_graphs import GraphedForward
from screformer.train.packed_batches import expand_batch

Kind = Literal["inference", "pretraining", "fine-tuning"]
KINDS: tuple[Kind, ...] = ("inference", "pretraining", "fine-tuning")
# What the paper's table 1 and section 2.11 tell of an A100 with 80 GB.
PAPER_CELLS_PER_SECOND = {"inference": 233, "pretraining": 326, "fine-tuning": 51}
NUM_LABELS, EXPRESSED, MASKED = 9, 0.1, 0.15
LEARNING_RATE = 1e-4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepCase:
    """A step of a whole model.

    Attributes
    ----------
    kind
        What is done.
    preset
        The model's size.
    batch_size
        Cells a step.
    num_hashes
        Rounds; None for the preset's.
    attention
        ``"lsh"`` or ``"exact"``.
    is_graphed
        Whether inference replays a CUDA graph.
    is_compiled
        Whether the dense parts of layers are compiled.
    """

    kind: Kind
    preset: str
    batch_size: int
    num_hashes: int | None = None
    attention: Literal["lsh", "exact"] = "lsh"
    is_graphed: bool = False
    is_compiled: bool = False

    def config(self, num_genes: int) -> ScReformerConfig:
        """Return the model's shape."""
        rounds = {} if self.num_hashes is None else {"num_hashes": self.num_hashes}
        return ScReformerConfig.preset(
            self.preset, num_genes=num_genes, num_labels=NUM_LABELS, attention=self.attention, **rounds
        )


def make_step(case: StepCase, num_genes: int, device: str) -> Callable[[], None]:
    """Return a step on every gene of made-up cells, in bfloat16 autocast; in training with backward pass and AdamW."""
    torch.manual_seed(SEED)
    config = case.config(num_genes)
    model_class = ScReformerForMaskedLM if case.kind == "pretraining" else ScReformerForCellClassification
    model = model_class(config).to(device)
    if case.is_compiled:
        compile_layers(model)
    batch = _make_batch(case, config, device)
    kind = torch.device(device).type
    if case.kind == "inference":
        forward = GraphedForward(model.eval(), "logits")
        cells = {"input_ids": batch["input_ids"]}

        @torch.inference_mode()
        def infer() -> None:
            # Weights that were cast once and kept would be none of a recording's.
            with torch.autocast(kind, dtype=torch.bfloat16, cache_enabled=not case.is_graphed):
                if case.is_graphed:
                    forward(cells)
                else:
                    model(**cells)

        return infer
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=kind == "cuda")

    def train() -> None:
        with torch.autocast(kind, dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return train


def _make_batch(case: StepCase, config: ScReformerConfig, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    shape = (case.batch_size, config.num_genes)
    is_expressed = torch.rand(shape, generator=generator) < EXPRESSED
    bins = torch.randint(1, config.num_bins, shape, generator=generator) * is_expressed
    if case.kind != "pretraining":
        labels = torch.randint(config.num_labels, shape[:1], generator=generator)
        return {"input_ids": bins.to(device), "labels": labels.to(device)}
    is_masked = is_expressed & (torch.rand(shape, generator=generator) < MASKED)
    assert config.mask_token_id is not None
    batch = {
        "input_ids": bins.masked_fill(is_masked, config.mask_token_id),
        "labels": bins.masked_fill(~is_masked, IGNORED_LABEL),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def measure_steps(cases: Sequence[StepCase], num_genes: int, device: str, *, repeats: int) -> Iterator[Row]:
    """Yield a row for each case: its facts, seconds, ``cells_per_second``, ``peak_bytes``; or the reason why not.

    On CUDA the peak is all that PyTorch's allocator handed out, weights and moments among it; on a CPU it is above what
    was resident before.
    """
    for case in cases:
        place = {
            "kind": case.kind,
            "preset": case.preset,
            "attention": case.attention,
            "rounds": case.config(num_genes).num_hashes,
            "is_default_rounds": case.num_hashes is None,
            "is_graphed": case.is_graphed,
            "is_compiled": case.is_compiled,
            "batch_size": case.batch_size,
        }
        try:
            step = make_step(case, num_genes, device)
            step()
            seconds = time_in_turn({"step": step}, repeats=repeats, device=device)["step"]
            peak = peak_memory(step, device=device)
            if torch.device(device).type == "cuda":
                peak = torch.cuda.max_memory_allocated(device)
            rate = case.batch_size / median(seconds)
            row = {"seconds": seconds, "cells_per_second": rate, "peak_bytes": peak}
            logger.info("%s, %d cells: %.1f cells/s", case.kind, case.batch_size, rate)
        except (RuntimeError, ValueError) as error:  # out of memory is a RuntimeError
            row = {"reason": str(error).strip().splitlines()[0]}
            logger.info("%s, %d cells: %s", case.kind, case.batch_size, row["reason"])
        step = None  # type: ignore[assignment]
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        yield {**place, **row}


def measure_feeding(num_genes: int, batch_size: int, device: str, *, repeats: int) -> list[Row]:
    """Return, for batches laid out on the CPU and on the device, bytes sent and the seconds to make and to deliver one.

    ``make_seconds`` is the collator's time with masks; ``deliver_seconds`` is from memory (pinned, for CUDA) to a batch
    over every gene on the device.
    """
    generator = np.random.default_rng(SEED)
    config = ScReformerConfig(num_genes=num_genes)
    cells = []
    for _ in range(batch_size):
        genes = np.flatnonzero(generator.random(num_genes) < EXPRESSED)
        cells.append({"gene_ids": genes, "input_ids": generator.integers(1, config.num_bins, len(genes))})
    rows = []
    is_cuda = torch.device(device).type == "cuda"
    for is_packed in (False, True):
        collator = CellCollator.from_config(config, masked_fraction=MASKED, packed=is_packed)
        batch = {name: tensor.pin_memory() if is_cuda else tensor for name, tensor in collator(cells).items()}
        make = time_in_turn({"": partial(_make, collator, cells)}, repeats=repeats)[""]
        deliver = time_in_turn({"": partial(_deliver, batch, num_genes, device)}, repeats=repeats, device=device)[""]
        rows.append(
            {
                "laid_out_on": "device" if is_packed else "CPU",
                "batch_size": batch_size,
                "bytes_sent": sum(tensor.nbytes for tensor in batch.values()),
                "make_seconds": median(make),
                "deliver_seconds": median(deliver),
            }
        )
    return rows


def _make(collator: CellCollator, cells: Sequence[Mapping[str, Any]]) -> None:
    collator(cells)


def _deliver(batch: dict[str, Tensor], num_genes: int, device: str) -> None:
    expand_batch({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}, num_genes)


def profile_step(case: StepCase, num_genes: int, device: str, *, most: int = 15) -> list[Row]:
    """Return where a step's time goes: kernel (on a CPU: operator), calls, milliseconds, share; the largest first."""
    step = make_step(case, num_genes, device)
    step()
    is_cuda = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiled:
        step()
        if is_cuda:
            torch.cuda.synchronize(device)

    def own_time(event: Any) -> float:  # Any: the profiler's events have no public type
        return float(event.self_device_time_total if is_cuda else event.self_cpu_time_total)

    events = [
        event
        for event in profiled.key_averages()
        if own_time(event) > 0 and (not is_cuda or event.device_type == torch.autograd.DeviceType.CUDA)
    ]
    total = sum(map(own_time, events))
    return [
        {
            "name": event.key[:80],
            "calls": event.count,
            "milliseconds": own_time(event) / 1000,
            "share": own_time(event) / total,
        }
        for event in sorted(events, key=own_time, reverse=True)[:most]
    ]
