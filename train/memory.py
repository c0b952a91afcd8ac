"""How many bytes a model needs for a batch of cells, how many are free, and how many cells fit into them.

What is predicted is what tensors need at the highest moment of a step, tokens of the batch included; Python, the
libraries, and what they keep for themselves are there before and are not in it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from screformer.configuration_screformer import ScReformerConfig
from screformer.train.memory_account import MODELS, Head, MemoryAccount, Precision, count_weights

ADAM_MOMENTS = 2  # of each parameter: running means of the gradient and of its square
# Times the working memory: what the C library holds beyond what is in use, because it keeps freed blocks of up to 32 MB
# and the holes between them (benchmarks/results/memory_cpu.md has what a process takes by default).
HOARDED = 2
# What is left for the file's counts, data loaders and other programs.
USED_SHARE = 0.8
# Beyond this a batch gains no speed on any device.
MOST_CELLS = 256
GIGABYTE, MEGABYTE = 10**9, 10**6


class MemoryEstimate(NamedTuple):
    """What a step needs, in bytes.

    Attributes
    ----------
    weights
        Parameters and buffers.
    gradients
        Of all parameters, as they are kept while gradients are accumulated; 0 for inference.
    optimizer
        AdamW's two moments; 0 for inference.
    activations_per_cell
        What each cell of the batch adds in the phase that needs most.
    working
        What that phase needs beside, whatever the batch size (on a GPU it grows with the batch).
    batch_size
        Cells at once.
    phase
        The phase that needs most.
    """

    weights: int
    gradients: int
    optimizer: int
    activations_per_cell: int
    working: int
    batch_size: int
    phase: str

    @property
    def total(self) -> int:
        """All of it."""
        fixed = self.weights + self.gradients + self.optimizer + self.working
        return fixed + self.batch_size * self.activations_per_cell


def predict_memory(
    config: ScReformerConfig,
    *,
    num_tokens: int,
    batch_size: int,
    training: bool,
    dtype: Precision = "float32",
    head: Head | None = "cell_classification",
    device_type: str = "cpu",
) -> MemoryEstimate:
    """Return the bytes that a forward pass, or a training step with AdamW, has allocated at its highest.

    Parameters
    ----------
    config
        The model's shape.
    num_tokens
        Tokens of the longest cell: ``config.num_genes`` in full gene space, otherwise the most expressed genes of a
        cell.
    batch_size
        Cells at once.
    training
        Forward and backward with AdamW, or forward without gradients.
    dtype
        What matrices are multiplied in: ``"bfloat16"`` is autocast. Weights, streams and moments are float32 anyway.
    head
        ``"masked_lm"`` and ``"cell_classification"``; None for the encoder alone, which cannot be trained.
    device_type
        The encoder works in blocks, larger ones on accelerators than on a ``"cpu"``.

    Raises
    ------
    ValueError
        A number or a name is out of its range, or the encoder alone is to be trained.

    Examples
    --------
    >>> config = ScReformerConfig.preset("base")
    >>> estimate = predict_memory(config, num_tokens=2000, batch_size=16, training=False)
    >>> estimate.total > 16 * estimate.activations_per_cell
    True
    """
    _check(config, num_tokens, batch_size, training, dtype, head)
    weights = count_weights(config, head)
    account = MemoryAccount(
        config=config,
        weights=weights,
        num_tokens=num_tokens,
        batch_size=batch_size,
        training=training,
        dtype=dtype,
        head=head,
        device_type=device_type,
    )
    worst = max(account.phases(), key=lambda phase: batch_size * phase.per_cell + phase.working)
    return MemoryEstimate(
        weights=weights.total,
        gradients=weights.parameters if training else 0,
        optimizer=ADAM_MOMENTS * weights.parameters if training else 0,
        activations_per_cell=worst.per_cell,
        working=worst.working,
        batch_size=batch_size,
        phase=worst.name,
    )


def _check(
    config: ScReformerConfig, num_tokens: int, batch_size: int, training: bool, dtype: str, head: str | None
) -> None:
    if not 1 <= num_tokens <= config.num_genes:
        raise ValueError(f"num_tokens got {num_tokens}; a cell has 1 to num_genes={config.num_genes} tokens.")
    if batch_size < 1:
        raise ValueError(f"batch_size got {batch_size}; it must be at least 1.")
    if dtype not in get_args(Precision):
        raise ValueError(f"dtype got {dtype!r}; allowed are {', '.join(map(repr, get_args(Precision)))}.")
    if head not in MODELS:
        raise ValueError(f"head got {head!r}; allowed are {', '.join(map(repr, MODELS))}.")
    if training and head is None:
        raise ValueError("head got None with training=True; the encoder alone has no loss. Name a head.")


class BatchChoice(NamedTuple):
    """A batch size, and why it was chosen.

    Attributes
    ----------
    batch_size
        Cells at once.
    estimate
        What they need in all.
    needed, allowed, available
        Bytes: what is still to be allocated for them (on a CPU with what the C library may hold beyond), what may be,
        and what is free.
    """

    batch_size: int
    estimate: MemoryEstimate
    needed: int
    allowed: int
    available: int

    def __str__(self) -> str:
        """Give one readable line."""
        free = f"{USED_SHARE:.0%} of the {_readable(self.available)} free"
        return f"{self.batch_size} cells at once: they need {_readable(self.needed)}, and {free} may be used"


def largest_batch_size(
    config: ScReformerConfig,
    *,
    num_tokens: int,
    training: bool,
    dtype: Precision = "float32",
    head: Head | None = "cell_classification",
    device: str | torch.device = "cpu",
    is_loaded: bool = True,
    available: int | None = None,
    most: int = MOST_CELLS,
) -> BatchChoice:
    """Return the largest batch size, any number up to `most`, whose predicted memory fits into what is free.

    Parameters
    ----------
    config, num_tokens, training, dtype, head
        As for `predict_memory`.
    device
        Where the model will run.
    is_loaded
        Whether the weights are on the device already, and so are not free.
    available
        Bytes that are free; default what `available_memory` says. `USED_SHARE` of it is used.
    most
        The largest batch size to choose.

    Raises
    ------
    ValueError
        Not even one cell fits; the message says what it needs and what helps.
    """
    device = torch.device(device)
    free = available_memory(device) if available is None else available
    allowed = int(USED_SHARE * free)

    def choose(batch_size: int) -> BatchChoice:
        estimate = predict_memory(
            config,
            num_tokens=num_tokens,
            batch_size=batch_size,
            training=training,
            dtype=dtype,
            head=head,
            device_type=device.type,
        )
        needed = estimate.total - (estimate.weights if is_loaded else 0)
        needed += HOARDED * estimate.working if device.type == "cpu" else 0
        return BatchChoice(batch_size, estimate, needed, allowed, free)

    fits, too_many = choose(1), most + 1
    if fits.needed > allowed:
        raise ValueError(_explain_misfit(fits, config, num_tokens, training, device))
    while fits.batch_size + 1 < too_many:
        middle = choose((fits.batch_size + too_many) // 2)
        if middle.needed <= allowed:
            fits = middle
        else:
            too_many = middle.batch_size
    return fits


def available_memory(device: str | torch.device = "cpu", *, root: Path = Path("/")) -> int:
    """Return the bytes that a process can still get on a device.

    On a CPU (Linux only): the least of what the machine has (``MemAvailable``) and what each control group of this
    process has left of its limit, file caches that the system would give up counted as free. On CUDA: what the driver
    has free, and what PyTorch keeps for new tensors.

    Parameters
    ----------
    device
        ``"cpu"``, or a CUDA device.
    root
        Where ``proc`` and ``sys`` are.

    Raises
    ------
    ValueError
        The free memory of this device or system is not known.
    """
    device = torch.device(device)
    remedy = 'Give the batch size as a number instead of "auto".'
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        raise ValueError(f"device got {device.type!r}; free memory is known of 'cpu' and 'cuda'. {remedy}")
    try:
        text = (root / "proc/meminfo").read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"device 'cpu': free memory is read from /proc/meminfo, which is not here. {remedy}"
        ) from error
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    if found is None:
        raise ValueError(f"device 'cpu': /proc/meminfo does not say MemAvailable. {remedy}")
    return max(0, min([int(found[1]) * 1024, *_left_in_control_groups(root)]))


class _Controller(NamedTuple):
    """Where a version of Linux control groups keeps the memory's limit, usage, and file cache that can go."""

    folder: str
    limit: str
    usage: str
    cache: str


_VERSION_1 = _Controller("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Controller("", "memory.max", "memory.current", "inactive_file")


def _left_in_control_groups(root: Path) -> list[int]:
    """Return what each group that this process is in, and each group around it, has left."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        controller = _VERSION_1 if controllers else _VERSION_2
        top = root / "sys/fs/cgroup" / controller.folder
        # In a container the name may be that of a group outside, which cannot be seen; the top is then its own.
        here = top / group.strip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(top):
                break
            left += _left_in_group(folder, controller)
    return left


def _left_in_group(folder: Path, controller: _Controller) -> list[int]:
    """Return what one group has left, nothing if it has no limit."""
    try:
        limit, usage = ((folder / name).read_text().strip() for name in (controller.limit, controller.usage))
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    if limit == "max":
        return []
    return [int(limit) - int(usage) + int(statistics.get(controller.cache, 0))]


def _explain_misfit(
    choice: BatchChoice, config: ScReformerConfig, num_tokens: int, training: bool, device: torch.device
) -> str:
    step = "a training step" if training else "inference"
    remedies = ["a smaller preset" if training else "a smaller model", "a machine with more memory"]
    if training and not config.reversible:
        remedies.insert(0, "reversible=True")
    if config.attention == "exact":
        remedies.insert(0, 'attention="lsh"')
    if num_tokens == config.num_genes:
        remedies.insert(0, 'gene_space="expressed", which leaves out genes without counts')
    return (
        f"batch_size 'auto': not even one cell of {num_tokens:,} tokens fits on {device.type}: {step} needs "
        f"{_readable(choice.needed)}, and {USED_SHARE:.0%} of the {_readable(choice.available)} free are "
        f"{_readable(choice.allowed)}. What helps: {'; '.join(remedies)}"
    )


def _readable(num_bytes: int) -> str:
    return f"{num_bytes / GIGABYTE:.2f} GB" if num_bytes >= GIGABYTE else f"{num_bytes / MEGABYTE:.1f} MB"
