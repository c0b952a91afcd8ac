import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from screformer import ScReformerConfig, ScReformerForCellClassification
from screformer.configuration_screformer import PRESETS


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def on_meta(preset):
    with torch.device("meta"):
        return ScReformerForCellClassification(ScReformerConfig.preset(preset, num_labels=9))


def test_base_has_the_stated_shape_and_about_6m_parameters_in_the_encoder():
    config = ScReformerConfig()
    stated = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.bucket_size)
    assert (*stated, config.num_genes) == (200, 6, 10, 64, 17_330)
    assert count(on_meta("base").screformer) == pytest.approx(6e6, rel=0.05)


def test_large_has_95m_parameters_in_the_encoder_and_30m_in_the_head():
    model = on_meta("large")
    assert count(model.screformer) == pytest.approx(95e6, rel=0.02)
    assert count(model.classifier) == pytest.approx(30e6, rel=0.02)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_configuration_survives_saving(tmp_path, preset):
    config = ScReformerConfig.preset(preset, id2label={0: "alpha", 1: "beta", 2: "delta"}, num_genes=77)
    config.save_pretrained(tmp_path)
    assert ScReformerConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_special_ids_follow_the_bins():
    config = ScReformerConfig(num_bins=16)
    assert (config.pad_token_id, config.mask_token_id, config.vocab_size) == (16, 17, 18)


@pytest.mark.parametrize(("hashing", "buckets"), [("sign", lambda c: 2**c), ("cross_polytope", lambda c: 2 * c)])
def test_a_full_cell_has_a_bucket_for_every_chunk(hashing, buckets):
    config = ScReformerConfig(hashing=hashing)
    assert buckets(config.max_hash_columns) * config.bucket_size >= config.num_genes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 202}, "hidden_size=202 is not divisible by num_attention_heads=10"),
        ({"hidden_size": 15, "num_attention_heads": 3}, "hidden_size got 15; it must be even"),
        ({"hidden_size": "200"}, "hidden_size"),
        ({"num_genes": 0}, "num_genes got 0"),
        ({"bucket_size": 1}, "bucket_size got 1"),
        ({"num_bins": 2}, "num_bins got 2; allowed are 3 to 254"),
        ({"num_bins": 255}, "num_bins got 255; allowed are 3 to 254"),
        ({"pad_token_id": 0}, "Leave them out: they follow from num_bins"),
        ({"attention": "performer"}, "lsh"),
        ({"gene_space": "top1000"}, "expressed"),
        ({"hidden_dropout_prob": 1.0}, r"must be in \[0, 1\)"),
        ({"classifier_hidden_sizes": [64]}, "two positive widths"),
    ],
)
def test_a_wrong_field_is_named(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ScReformerConfig(**fields)


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="preset got 'huge'; allowed are tiny, base, large"):
        ScReformerConfig.preset("huge")
