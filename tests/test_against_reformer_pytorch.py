"""The encoder against lucidrains' reformer-pytorch, with the same weights and rotations.

The definitions differ in two places, and each test says how it meets them:

* reformer-pytorch's first chunk of a round looks back at the last chunk of the round before (with one round: its own
  last). Ours looks back at nothing: buckets are not a circle. Here that pair of chunks is masked in theirs (one round)
  or the tokens of first chunks are left out of the comparison (several rounds).
* reformer-pytorch hashes padding like tokens; ours sorts it last. Here there is no padding.

Both must be 1e-5 apart at most, the rounding of two float32 implementations.
"""

import pytest
import torch
from torch import nn

from screformer.lsh_attention import draw_rotations, lsh_attention, lsh_order
from screformer.modeling_screformer import ScReformerLayer
from screformer.reversible import ReversibleSequence

reformer_pytorch = pytest.importorskip("reformer_pytorch.reformer_pytorch")

BUCKET, LENGTH, WIDTH, HEADS, DEPTH = 8, 64, 16, 2, 3
ATOL = 1e-5


def hash_with(rotations):
    """Return a replacement of LSHAttention.hash_vectors: given rotations (R, D, C) instead of random ones."""

    def hash_vectors(self, n_buckets, vectors, **_):
        rotated = torch.einsum("btd,rdc->brtc", vectors, rotations)
        buckets = torch.cat([rotated, -rotated], dim=-1).argmax(-1)
        offsets = torch.arange(self.n_hashes)[:, None] * n_buckets
        return (buckets + offsets).flatten(1)

    return hash_vectors


def without_wrap_around(lsh):
    """Make one round of LSHAttention mask the look from the first chunk back at the last one."""
    attend = lsh.forward

    def forward(query_key, value, **kwargs):
        buckets = lsh.hash_vectors(LENGTH // BUCKET, query_key)
        order = buckets.sort(dim=-1, stable=True).indices
        allowed = torch.ones(len(query_key), LENGTH, LENGTH, dtype=torch.bool)
        for row, tokens in enumerate(order):
            allowed[row, tokens[:BUCKET, None], tokens[None, -BUCKET:]] = False
        return attend(query_key, value, input_attn_mask=allowed, **kwargs)

    return forward


def twins(tiny_config, *, attention="lsh", rounds=1):
    """Return our encoder and reformer-pytorch's with the same weights."""
    torch.manual_seed(0)
    config = tiny_config(
        hidden_size=WIDTH, num_attention_heads=HEADS, bucket_size=BUCKET, num_hashes=rounds, num_genes=LENGTH,
        attention=attention, intermediate_size=4 * WIDTH, hashing="cross_polytope",
    )  # fmt: skip
    ours = ReversibleSequence(ScReformerLayer(config, index) for index in range(DEPTH)).eval()
    theirs = reformer_pytorch.Reformer(
        WIDTH, DEPTH, heads=HEADS, bucket_size=BUCKET, n_hashes=rounds, causal=False, ff_chunks=1,
        use_full_attn=attention == "exact",
    ).eval()  # fmt: skip
    for layer, block in zip(ours.layers, theirs.layers.blocks, strict=True):
        attention_branch, feed_branch = block.f.net, block.g.net
        pairs = [
            (attention_branch.norm, layer.attention_norm),
            (attention_branch.fn.toqk, layer.attention.query_key),
            (attention_branch.fn.tov, layer.attention.value),
            (attention_branch.fn.to_out, layer.attention.output),
            (feed_branch.norm, layer.feed_forward_norm),
            (feed_branch.fn.fn.w1, layer.feed_forward[0]),
            (feed_branch.fn.fn.w2, layer.feed_forward[2]),
        ]
        for target, source in pairs:
            target.load_state_dict(source.state_dict())
        assert isinstance(feed_branch.fn.fn.act, nn.GELU)
        lsh = attention_branch.fn.lsh_attn
        lsh.hash_vectors = hash_with(layer.attention.rotations).__get__(lsh)
        if attention == "lsh":
            lsh.forward = without_wrap_around(lsh)
    return ours, theirs


@pytest.mark.parametrize("attention", ["lsh", "exact"])
def test_the_encoder_reproduces_reformer_pytorch(tiny_config, attention):
    ours, theirs = twins(tiny_config, attention=attention)
    hidden_states = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    first, second = ours(hidden_states)
    torch.testing.assert_close((first + second) / 2, theirs(hidden_states), atol=ATOL, rtol=0)


def test_lsh_and_exact_encoders_differ(tiny_config):
    # Otherwise the test above would not see hashing at all.
    hidden_states = torch.randn(3, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    lsh, exact = (twins(tiny_config, attention=kind)[0](hidden_states).first for kind in ("lsh", "exact"))
    assert (lsh - exact).abs().max() > 100 * ATOL


@pytest.mark.parametrize("attention", ["lsh", "exact"])
def test_gradients_reproduce_reformer_pytorch(tiny_config, attention):
    ours, theirs = twins(tiny_config, attention=attention)
    ours.train(), theirs.train()  # reformer-pytorch records its random state in training mode only
    for module in [*ours.modules(), *theirs.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    hidden_states = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(2))
    mine, his = (hidden_states.clone().requires_grad_() for _ in range(2))
    ((ours(mine).first + ours(mine).second) / 2).square().sum().backward()
    theirs(his).square().sum().backward()
    scale = his.grad.abs().max().item()
    torch.testing.assert_close(mine.grad, his.grad, atol=ATOL * scale, rtol=0)


def test_several_rounds_agree_for_tokens_outside_first_chunks():
    rounds = 4
    generator = torch.Generator().manual_seed(3)
    query_key, value = torch.randn(2, 1, 1, LENGTH, WIDTH, generator=generator).unbind(0)
    rotations = draw_rotations(rounds, WIDTH, LENGTH // BUCKET // 2, seed=5)
    theirs = reformer_pytorch.LSHAttention(bucket_size=BUCKET, n_hashes=rounds, causal=False)
    theirs.hash_vectors = hash_with(rotations).__get__(theirs)
    expected = theirs(query_key[0], value[0])[0]
    result = lsh_attention(query_key, value, rotations, bucket_size=BUCKET)[0]
    order = lsh_order(query_key, rotations, bucket_size=BUCKET)[0, 0].long()
    agree = torch.ones(LENGTH, dtype=torch.bool)
    agree[order[:, :BUCKET].flatten()] = False
    assert agree.sum() > LENGTH // 3
    torch.testing.assert_close(result[:, agree], expected[:, agree], atol=ATOL, rtol=0)
    assert (result[:, ~agree] - expected[:, ~agree]).abs().max() > 100 * ATOL  # the wrap-around is real
