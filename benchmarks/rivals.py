"""Attention cores and encoders at a given shape: ours, and those of the other libraries.

Every function takes (shape, device) and returns a `Workload`. Attention cores take query-key and value as
(B, L, hidden), before heads are split, and return (B, L, hidden), after heads are merged; nothing is projected.
Encoders are layers of attention and feed-forward from hidden states (B, L, hidden), without embeddings.

Each library has its own defaults but for the shape, dropout (none) and these:

* transformers chooses its number of buckets itself. Its attention gets query-key and value as given: its two
  projections are an identity and a module that returns the value.
* reformer-pytorch takes multiples of two chunks only; other lengths are padded with zeros within the call, without
  the mask that its own padding adds, which would only slow it.
* performer-pytorch's Performer has heads 64 wide by default; here they are as wide as everyone's.
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from screformer.benchmarks.measuring import Build, Shape, Workload

if TYPE_CHECKING:
    from screformer.lsh_hashing import Hashing

SEED = 2022
OURS, OURS_BFLOAT16, OURS_EXACT = "ours", "ours_bfloat16", "ours_exact"
RIVAL_PACKAGES = ("reformer-pytorch", "performer-pytorch")


@dataclass(frozen=True)
class Contestant:
    """One row of a comparison.

    Attributes
    ----------
    title
        Its name in tables and figures.
    build
        Makes its workload; a function at the top of a module, so that another process finds it.
    growth
        The power of the length that its time is expected to grow with; 1 for all but exact attention.
    """

    title: str
    build: Build
    growth: float = 1.0


def choose_contestants(known: Mapping[str, Contestant], names: Sequence[str]) -> dict[str, Contestant]:
    """Return the named contestants in the order of `known`; ValueError for unknown names or without ours."""
    unknown = sorted(set(names) - set(known))
    if unknown or OURS not in names:
        raise ValueError(f"contestants must be of {', '.join(known)}, {OURS!r} among them, got {', '.join(names)}")
    return {name: contestant for name, contestant in known.items() if name in names}


def quieten_transformers() -> None:
    """Let transformers' Reformer no longer tell each number of buckets that it chooses."""
    logging.getLogger("transformers.models.reformer.modeling_reformer").setLevel(logging.ERROR)


def rival_versions() -> dict[str, str | None]:
    """Return the versions of the other libraries; None for one that is not installed."""
    versions: dict[str, str | None] = {}
    for package in RIVAL_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def our_attention(shape: Shape, device: str) -> Workload:
    """LSH attention of this package, hashing included, with the hash functions that its models have by default."""
    return _our_attention(shape, device)


def our_attention_cross_polytope(shape: Shape, device: str) -> Workload:
    """LSH attention of this package with the hash functions of the other libraries."""
    return _our_attention(shape, device, hashing="cross_polytope")


def our_attention_bfloat16(shape: Shape, device: str) -> Workload:
    """LSH attention of this package on bfloat16 inputs."""
    return _our_attention(shape, device, dtype=torch.bfloat16)


def _our_attention(
    shape: Shape, device: str, *, dtype: torch.dtype = torch.float32, hashing: Hashing | None = None
) -> Workload:
    from screformer.configuration_screformer import ScReformerConfig
    from screformer.lsh_attention import draw_rotations, lsh_attention

    hashing = ScReformerConfig().hashing if hashing is None else hashing
    config = ScReformerConfig(num_genes=shape.length, bucket_size=shape.bucket_size, hashing=hashing)
    columns = config.max_hash_columns
    rotations = draw_rotations(shape.num_hashes, shape.hidden_size // shape.num_heads, columns, seed=SEED).to(device)
    query_key, value, gradient = _random_states(shape, device, dtype, count=3)

    def forward() -> Tensor:
        query_key_heads, value_heads = _split_heads(query_key, shape), _split_heads(value, shape)
        attended = lsh_attention(
            query_key_heads, value_heads, rotations, bucket_size=shape.bucket_size, hashing=config.hashing
        )
        return _merge_heads(attended)

    return Workload(forward, (query_key, value), gradient)


def transformers_attention(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Workload:
    """LSHSelfAttention of transformers without its projections."""
    reformer = _import("transformers.models.reformer.modeling_reformer")
    query_key, value, gradient = _random_states(shape, device, dtype, count=3)
    attention = reformer.LSHSelfAttention(_transformers_config(shape)).to(device)
    attention.query_key = nn.Identity()
    attention.value = _Given(value)
    return Workload(lambda: attention(query_key).hidden_states, (query_key, value), gradient, attention)


def reformer_pytorch_attention(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Workload:
    """LSHAttention of reformer-pytorch, which takes heads as a part of the batch."""
    library = _import("reformer_pytorch")
    attention = library.LSHAttention(bucket_size=shape.bucket_size, n_hashes=shape.num_hashes)
    query_key, value, gradient = _random_states(shape, device, dtype, count=3)

    def forward() -> Tensor:
        padded = (_split_heads(_pad(states, shape), shape).flatten(0, 1) for states in (query_key, value))
        attended = attention(*padded)[0][:, : shape.length]
        return _merge_heads(attended.unflatten(0, (shape.batch_size, shape.num_heads)))

    return Workload(forward, (query_key, value), gradient, attention)


def performer_attention(shape: Shape, device: str) -> Workload:
    """FastAttention (FAVOR+) of performer-pytorch, its query and key the same."""
    library = _import("performer_pytorch")
    with _same_weights():
        attention = library.FastAttention(shape.hidden_size // shape.num_heads).to(device)
    query_key, value, gradient = _random_states(shape, device, count=3)

    def forward() -> Tensor:
        query_key_heads = _split_heads(query_key, shape)
        return _merge_heads(attention(query_key_heads, query_key_heads, _split_heads(value, shape)))

    return Workload(forward, (query_key, value), gradient, attention)


def exact_attention(shape: Shape, device: str, dtype: torch.dtype = torch.float32) -> Workload:
    """PyTorch's scaled dot product attention, its query and key the same."""
    query_key, value, gradient = _random_states(shape, device, dtype, count=3)

    def forward() -> Tensor:
        query_key_heads = _split_heads(query_key, shape)
        attended = F.scaled_dot_product_attention(query_key_heads, query_key_heads, _split_heads(value, shape))
        return _merge_heads(attended)

    return Workload(forward, (query_key, value), gradient)


def our_encoder(shape: Shape, device: str) -> Workload:
    """The reversible encoder of this package."""
    return _our_encoder(shape, device)


def our_encoder_bfloat16(shape: Shape, device: str) -> Workload:
    """The reversible encoder of this package under bfloat16 autocast."""
    return _our_encoder(shape, device, is_bfloat16=True)


def our_exact_encoder(shape: Shape, device: str) -> Workload:
    """The reversible encoder of this package with exact attention."""
    return _our_encoder(shape, device, attention="exact")


def _our_encoder(shape: Shape, device: str, *, attention: str = "lsh", is_bfloat16: bool = False) -> Workload:
    from screformer.configuration_screformer import ScReformerConfig
    from screformer.modeling_screformer import ScReformerModel

    config = ScReformerConfig(
        num_genes=shape.length,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        bucket_size=shape.bucket_size,
        num_hashes=shape.num_hashes,
        attention=attention,
        hidden_dropout_prob=0.0,
    )
    with _same_weights():
        encoder = ScReformerModel(config).encoder.to(device)
    hidden_states, gradient = _random_states(shape, device, count=2)

    def forward() -> Tensor:
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=is_bfloat16):
            streams = encoder(hidden_states, None, reversible=True)
        return (streams[0] + streams[1]) / 2

    return Workload(forward, (hidden_states,), gradient, encoder)


def transformers_encoder(shape: Shape, device: str) -> Workload:
    """ReformerEncoder of transformers, whose output is twice as wide: both streams."""
    reformer = _import("transformers.models.reformer.modeling_reformer")
    with _same_weights():
        encoder = reformer.ReformerEncoder(_transformers_config(shape)).to(device)
    hidden_states, *gradient = _random_states(shape, device, count=3)
    return Workload(
        lambda: encoder(hidden_states).hidden_states, (hidden_states,), torch.cat(gradient, dim=-1), encoder
    )


def reformer_pytorch_encoder(shape: Shape, device: str) -> Workload:
    """Reformer of reformer-pytorch with its default of 100 feed-forward chunks."""
    library = _import("reformer_pytorch")
    with _same_weights():
        encoder = library.Reformer(
            shape.hidden_size,
            shape.num_layers,
            heads=shape.num_heads,
            bucket_size=shape.bucket_size,
            n_hashes=shape.num_hashes,
            ff_mult=shape.intermediate_size // shape.hidden_size,
        ).to(device)
    hidden_states, gradient = _random_states(shape, device, count=2)
    return Workload(lambda: encoder(_pad(hidden_states, shape))[:, : shape.length], (hidden_states,), gradient, encoder)


def performer_encoder(shape: Shape, device: str) -> Workload:
    """Performer of performer-pytorch, not reversible by default."""
    library = _import("performer_pytorch")
    with _same_weights():
        encoder = library.Performer(
            shape.hidden_size,
            shape.num_layers,
            heads=shape.num_heads,
            dim_head=shape.hidden_size // shape.num_heads,
            ff_mult=shape.intermediate_size // shape.hidden_size,
        ).to(device)
    hidden_states, gradient = _random_states(shape, device, count=2)
    return Workload(lambda: encoder(hidden_states), (hidden_states,), gradient, encoder)


def bert_eager_encoder(shape: Shape, device: str) -> Workload:
    """BertEncoder of transformers with eager attention, which keeps every pair of genes."""
    return _bert_encoder(shape, device, "eager")


def bert_sdpa_encoder(shape: Shape, device: str) -> Workload:
    """BertEncoder of transformers with `scaled_dot_product_attention`, which keeps no pairs."""
    return _bert_encoder(shape, device, "sdpa")


def _bert_encoder(shape: Shape, device: str, implementation: str) -> Workload:
    config = _import("transformers").BertConfig(
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        intermediate_size=shape.intermediate_size,
        max_position_embeddings=shape.length,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=implementation,
    )
    with _same_weights():
        encoder = _import("transformers.models.bert.modeling_bert").BertEncoder(config).to(device)
    hidden_states, gradient = _random_states(shape, device, count=2)
    return Workload(lambda: encoder(hidden_states).last_hidden_state, (hidden_states,), gradient, encoder)


def _transformers_config(shape: Shape) -> Any:  # Any: transformers is not type-checked
    return _import("transformers").ReformerConfig(
        hidden_size=shape.hidden_size,
        num_attention_heads=shape.num_heads,
        attention_head_size=shape.hidden_size // shape.num_heads,
        feed_forward_size=shape.intermediate_size,
        attn_layers=["lsh"] * shape.num_layers,
        num_hashes=shape.num_hashes,
        lsh_attn_chunk_length=shape.bucket_size,
        lsh_num_chunks_before=1,
        lsh_num_chunks_after=0,
        num_buckets=None,
        max_position_embeddings=shape.length,
        hidden_act="gelu",
        hidden_dropout_prob=0.0,
        lsh_attention_probs_dropout_prob=0.0,
        axial_pos_embds=False,
        is_decoder=False,
    )


class _Given(nn.Module):
    """Stands where a projection was and returns what it was made with."""

    def __init__(self, states: Tensor) -> None:
        super().__init__()
        self.states = states

    def forward(self, _: Tensor) -> Tensor:
        """Return the given states."""
        return self.states


def _split_heads(states: Tensor, shape: Shape) -> Tensor:
    """(B, L, hidden) -> (B, H, L, head width)."""
    return states.unflatten(-1, (shape.num_heads, -1)).transpose(1, 2)


def _merge_heads(states: Tensor) -> Tensor:
    """(B, H, L, head width) -> (B, L, hidden)."""
    return states.transpose(1, 2).flatten(2)


def _pad(states: Tensor, shape: Shape) -> Tensor:
    """Lengthen (B, L, hidden) with zeros to a multiple of two chunks."""
    return F.pad(states, (0, 0, 0, -shape.length % (2 * shape.bucket_size)))


def _random_states(shape: Shape, device: str, dtype: torch.dtype = torch.float32, *, count: int) -> tuple[Tensor, ...]:
    """Return `count` tensors (B, L, hidden), the same ones for every contestant."""
    generator = torch.Generator().manual_seed(SEED)
    size = (count, shape.batch_size, shape.length, shape.hidden_size)
    return tuple(states.to(device, dtype) for states in torch.randn(size, generator=generator).unbind(0))


@contextmanager
def _same_weights() -> Iterator[None]:
    """Let weights be drawn from a fixed seed, and leave the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        yield


def _import(name: str) -> Any:  # Any: the libraries have no types
    """Import a library that only benchmarks need."""
    try:
        with warnings.catch_warnings():
            # performer-pytorch compares versions with distutils.
            warnings.filterwarnings("ignore", "distutils Version classes are deprecated", DeprecationWarning)
            return importlib.import_module(name)
    except ImportError as error:
        msg = f'{name} cannot be imported ({error}); install what is compared: pip install "screformer[benchmarks]"'
        raise ImportError(msg) from error


ATTENTION = {
    OURS: Contestant("screformer", our_attention),
    OURS_BFLOAT16: Contestant("screformer, bf16", our_attention_bfloat16),
    "ours_cross_polytope": Contestant("screformer, cross-polytope", our_attention_cross_polytope),
    "transformers": Contestant("transformers LSHSelfAttention", transformers_attention),
    "reformer_pytorch": Contestant("reformer-pytorch LSHAttention", reformer_pytorch_attention),
    "performer_pytorch": Contestant("performer-pytorch FastAttention", performer_attention),
    "exact": Contestant("exact (PyTorch SDPA)", exact_attention, growth=2.0),
}
ENCODERS = {
    OURS: Contestant("screformer", our_encoder),
    OURS_BFLOAT16: Contestant("screformer, bf16 autocast", our_encoder_bfloat16),
    OURS_EXACT: Contestant("screformer, exact attention", our_exact_encoder, growth=2.0),
    "transformers": Contestant("transformers ReformerEncoder", transformers_encoder),
    "reformer_pytorch": Contestant("reformer-pytorch Reformer", reformer_pytorch_encoder),
    "performer_pytorch": Contestant("performer-pytorch Performer", performer_encoder),
}
