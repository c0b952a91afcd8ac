"""The standard transformer encoder that the ablations put in place of ours."""

from contextlib import suppress

import torch

from screformer.benchmarks.standard_encoder import StandardEncoder, standard_encoders
from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerForMaskedLM, ScReformerModel
from screformer.reversible import ReversibleSequence

CONFIG = ScReformerConfig.preset("tiny", num_genes=30, hidden_dropout_prob=0.0)


def standard_model(model_class=ScReformerModel):
    torch.manual_seed(0)
    with standard_encoders():
        return model_class(CONFIG).eval()


def test_only_models_made_within_have_it_and_the_rest_of_them_is_ours():
    inside, after = standard_model(), ScReformerModel(CONFIG)
    assert isinstance(inside.encoder, StandardEncoder)
    assert isinstance(after.encoder, ReversibleSequence)

    def names_of(model):
        return {name for name in model.state_dict() if not name.startswith("encoder.")}

    assert names_of(inside) == names_of(after)
    layer = inside.encoder.layers[0]
    assert len(inside.encoder.layers) == CONFIG.num_hidden_layers
    assert (layer.self_attn.embed_dim, layer.self_attn.num_heads) == (CONFIG.hidden_size, CONFIG.num_attention_heads)
    assert (layer.linear1.out_features, layer.norm_first) == (CONFIG.intermediate_size, True)


def test_an_error_within_gives_ours_back():
    with suppress(KeyError), standard_encoders():
        raise KeyError
    assert isinstance(ScReformerModel(CONFIG).encoder, ReversibleSequence)


def test_padding_is_not_looked_at_and_every_gene_is():
    model = standard_model()
    torch.manual_seed(1)
    bins, genes = torch.randint(1, 6, (1, 20)), torch.arange(20)[None]
    with torch.no_grad():
        alone = model(bins, gene_ids=genes).last_hidden_state
        padded_bins = torch.cat([bins, torch.full((1, 6), CONFIG.pad_token_id)], dim=1)
        padded_genes, mask = torch.cat([genes, torch.zeros(1, 6, dtype=torch.long)], dim=1), torch.arange(26)[None] < 20
        padded = model(padded_bins, gene_ids=padded_genes, attention_mask=mask.long()).last_hidden_state[:, :20]
        bins[0, 7] = bins[0, 7] % 5 + 1
        other = model(bins, gene_ids=genes).last_hidden_state
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)
    assert ((other - alone).abs().amax(dim=-1) > 0).all()


def test_a_saved_model_is_read_again_within(tmp_path):
    model = standard_model(ScReformerForMaskedLM)
    model.save_pretrained(tmp_path)
    with standard_encoders():
        again = ScReformerForMaskedLM.from_pretrained(tmp_path).eval()
    bins = torch.randint(0, 6, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(again(bins).logits, model(bins).logits)
