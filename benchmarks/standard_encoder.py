"""A standard transformer encoder in place of the Reformer, for the row of the ablations that the paper calls so.

Queries and keys of their own, every token looks at every other and at itself, one residual stream, nothing recomputed.
Embeddings, pretraining, heads and training stay as they are, so that the encoder is all that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from screformer import modeling_screformer
from screformer.modeling_screformer import ScReformerLayer
from screformer.reversible import Streams, TokenOrders


class StandardEncoder(nn.Module):
    """PyTorch's encoder layers, normalised before each branch as ours are; called as `ReversibleSequence` is.

    Parameters
    ----------
    layers
        The layers it stands for: their number, width, heads and dropout are taken from them.
    """

    def __init__(self, layers: Iterable[ScReformerLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(_standard_layer, layers))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        reversible: bool = False,
        token_orders: TokenOrders | None = None,
    ) -> Streams:
        """Return the states (B, L, hidden) after the last layer, as both streams; the last two have no effect."""
        streams = Streams(hidden_states, hidden_states)
        for streams in self.iterate(hidden_states, attention_mask):  # noqa: B007 - the last ones
            pass
        return streams

    def iterate(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, token_orders: TokenOrders | None = None
    ) -> Iterator[Streams]:
        """Yield the states after each layer, as both streams."""
        is_padding = None if attention_mask is None else ~attention_mask.bool()
        for layer in self.layers:
            hidden_states = layer(hidden_states, src_key_padding_mask=is_padding)
            yield Streams(hidden_states, hidden_states)


def _standard_layer(layer: ScReformerLayer) -> nn.TransformerEncoderLayer:
    widening = layer.feed_forward[0]
    assert isinstance(widening, nn.Linear)
    return nn.TransformerEncoderLayer(
        widening.in_features,
        layer.attention.num_heads,
        widening.out_features,
        layer.attention_dropout.p,
        "gelu",
        layer.attention_norm.eps,
        batch_first=True,
        norm_first=True,
    )


@contextmanager
def standard_encoders() -> Iterator[None]:
    """Let models that are made or loaded within it have a `StandardEncoder`; those of before and after do not."""
    ours = modeling_screformer.ReversibleSequence
    modeling_screformer.ReversibleSequence = StandardEncoder  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        modeling_screformer.ReversibleSequence = ours  # type: ignore[misc]
