import json

import pytest
import torch

from screformer.benchmarks import hashing
from screformer.benchmarks.hashing import (
    HASHINGS,
    AttentionInputs,
    Setting,
    attention_inputs,
    benchmark_hashing,
    covered_mass,
    draw_random_order,
    draw_setting_rotations,
    every_setting,
    find_order,
    load_model,
    main,
    measure_settings,
    read_cells,
    relative_error,
)
from screformer.lsh_attention import exact_attention, lsh_attention, lsh_order
from screformer.modeling_screformer import ScReformerModel
from screformer.tokenization.tokenization_screformer import ScReformerTokenizer


@pytest.fixture
def model(tiny_config):
    torch.manual_seed(0)
    return ScReformerModel(tiny_config()).eval()


@pytest.fixture
def inputs(model, random_cells):
    return attention_inputs(model, random_cells(), [0])[0]


def test_inputs_of_every_layer_are_those_of_the_models_own_pass(model, random_cells):
    seen = []
    for layer in model.encoder.layers:
        layer.attention.value.register_forward_hook(lambda _, __, output: seen.append(output))
    bins = random_cells()
    with torch.no_grad():
        model(bins)
    expected, found = list(seen), attention_inputs(model, bins, [0, 1])
    for layer in (0, 1):
        torch.testing.assert_close(found[layer].value.transpose(1, 2).flatten(2), expected[layer])


@pytest.mark.parametrize("layers", [[], [2], [-1]])
def test_layers_that_the_model_lacks_are_refused(model, random_cells, layers):
    with pytest.raises(ValueError, match="layers must be of 0 to 1"):
        attention_inputs(model, random_cells(), layers)


@pytest.mark.parametrize("kind", HASHINGS)
def test_one_bucket_covers_the_whole_softmax_and_has_no_error(inputs, kind):
    setting = Setting(1, 64, kind)  # more than the 60 genes
    rotations = draw_setting_rotations(setting, inputs.query_key)
    order = find_order(inputs.query_key, setting, rotations)
    assert covered_mass(inputs.query_key, order, bucket_size=64) == pytest.approx(1, abs=1e-6)
    output = lsh_attention(*inputs, rotations[0], bucket_size=64, order=order)
    assert relative_error(output, exact_attention(*inputs)) < 1e-5


def test_covered_mass_of_given_windows_equals_a_sum_by_hand():
    query_key = torch.randn(1, 1, 6, 4, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([[5, 0, 3, 1, 4, 2], [0, 1, 2, 3, 4, 5]], dtype=torch.int32)[None, None]
    seen = [
        {5, 0, 1},  # first round: chunk (5, 0); second: (0, 1)
        {3, 1, 5, 0},
        {4, 2, 3, 1, 0},
        {3, 1, 5, 0, 2},
        {4, 2, 3, 1, 5},
        {5, 0, 4, 2, 3},
    ]
    key = torch.nn.functional.normalize(query_key[0, 0], dim=-1)
    shares = []
    for token, keys in enumerate(seen):
        weights = (query_key[0, 0, token] @ key.T / 2).exp()
        weights[token] = 0
        shares.append(weights[sorted(keys)].sum() / weights.sum())
    expected = float(torch.stack(shares).mean())
    assert covered_mass(query_key, order, bucket_size=2) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", HASHINGS)
def test_more_rounds_cover_more_and_hashing_covers_more_than_random_order(kind):
    # Ten groups of similar tokens, so that there is something to find.
    generator = torch.Generator().manual_seed(2)
    groups = 3 * torch.randn(1, 2, 10, 1, 8, generator=generator)
    query_key = (groups + 0.2 * torch.randn(1, 2, 10, 12, 8, generator=generator)).flatten(2, 3)
    masses = {}
    for rounds in (1, 4):
        setting = Setting(rounds, 8, kind)
        order = find_order(query_key, setting, draw_setting_rotations(setting, query_key))
        masses[rounds] = covered_mass(query_key, order, bucket_size=8)
        random_order = draw_random_order(query_key, setting)
        assert random_order.sort(dim=-1).values.equal(order.sort(dim=-1).values)  # a permutation, too
        assert masses[rounds] > 1.2 * covered_mass(query_key, random_order, bucket_size=8)
    assert masses[4] > masses[1]


@pytest.mark.parametrize("kind", HASHINGS)
def test_rotations_per_head_hash_every_head_by_its_own(inputs, kind):
    setting = Setting(2, 8, kind, is_per_head=True)
    rotations = draw_setting_rotations(setting, inputs.query_key)
    order = find_order(inputs.query_key, setting, rotations)
    assert order.shape == (3, 2, 2, 60)
    for head, own in enumerate(rotations):
        assert order[:, head].equal(lsh_order(inputs.query_key, own, bucket_size=8, hashing=setting.family)[:, head])
    assert not torch.equal(*rotations)


def test_coarse_signs_have_one_bucket_a_chunk(inputs):
    coarse, fine = (
        draw_setting_rotations(Setting(2, 8, kind), inputs.query_key)[0] for kind in ("coarse_sign", "sign")
    )
    assert coarse.shape == (2, inputs.query_key.shape[-1], 3)  # 60 genes, 8 chunks
    assert fine.shape[-1] > coarse.shape[-1]


def test_sharper_queries_are_farther_from_an_even_mean(model, random_cells):
    errors = [
        measure_settings(
            model,
            random_cells(),
            [0],
            [Setting(1, 8, "sign")],
            sharpness=sharpness,
            repeats=1,
            with_memory=False,
        )["baselines"]["mean_of_values"]["error"]
        for sharpness in (1.0, 10.0)
    ]
    assert errors[1] > errors[0]


def test_rows_have_errors_times_and_baselines(model, random_cells):
    settings = [Setting(2, 8, model.config.hashing), Setting(1, 16, "sign", is_per_head=True)]
    results = measure_settings(model, random_cells(), [0, 1], settings, sharpness=1.0, repeats=2, with_memory=False)
    first, second = results["settings"]
    assert (first["is_default"], second["is_default"]) == (True, False)
    for row in (first, second):
        assert len(row["layer_errors"]) == 2
        assert row["error"] == pytest.approx(sum(row["layer_errors"]) / 2)
        assert 0 < row["covered_mass"] < 1
        assert len(row["forward_seconds"]) == len(row["training_seconds"]) == 2
    assert [row["bucket_size"] for row in results["baselines"]["random_order"]] == [8, 16]
    assert results["baselines"]["mean_of_values"]["error"] > 0


def test_the_mean_of_values_is_exact_where_every_score_is_the_same(inputs):
    # Then exact attention is the mean of the other genes' values.
    value = inputs.value
    output = exact_attention(torch.zeros_like(inputs.query_key), value)
    others = (value.sum(dim=2, keepdim=True) - value) / (value.shape[2] - 1)
    assert relative_error(others, output) < 1e-5


def test_every_setting_is_there_once():
    settings = every_setting()
    assert len(set(settings)) == len(settings) == 4 * 3 * len(HASHINGS) * 2


def test_packaged_cells_fill_the_gene_space():
    tokenizer = ScReformerTokenizer()
    cells = read_cells(tokenizer, 2)
    assert cells.shape == (2, tokenizer.num_genes)
    assert ((cells > 0).sum(dim=1) > 500).all()


def test_a_fresh_model_is_the_same_every_time_and_a_checkpoint_is_loaded(model, tmp_path, monkeypatch):
    ScReformerTokenizer().save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    loaded, tokenizer = load_model(str(tmp_path))
    assert torch.equal(loaded.embeddings.gene_embeddings.weight, model.embeddings.gene_embeddings.weight)
    assert tokenizer.num_bins == 6
    preset = hashing.ScReformerConfig.preset
    monkeypatch.setattr(
        hashing.ScReformerConfig, "preset", lambda _, **overrides: preset("tiny", **{**overrides, "num_genes": 50})
    )
    first, second = (load_model(None)[0].embeddings.gene_embeddings.weight for _ in range(2))
    assert torch.equal(first, second)


def test_the_command_line_leaves_a_file_a_table_and_a_figure(tmp_path, model, random_cells, monkeypatch, capsys):
    kind = model.config.hashing
    monkeypatch.setattr(hashing, "load_model", lambda _: (model, None))
    monkeypatch.setattr(hashing, "read_cells", lambda _, num_cells: random_cells(num_cells))
    options = f"--rounds 1 2 --bucket-sizes 8 --hashings {kind} --layers 1 --repeats 1 --no-memory"
    main([*options.split(), "--output", str(tmp_path)])
    results = json.loads((tmp_path / "hashing.json").read_text())
    assert results["num_cells"] == 2
    assert len(results["settings"]) == 4
    assert results["command"].startswith(f"python -m screformer.benchmarks.hashing {options}")
    table = capsys.readouterr().out.strip()
    assert f"{kind}, shared (default)" in table
    assert table == (tmp_path / "hashing.md").read_text().strip()
    assert (tmp_path / "hashing.png").read_bytes().startswith(b"\x89PNG")


def test_memory_is_added_to_every_setting_of_the_same_windows(model, random_cells, monkeypatch):
    monkeypatch.setattr(hashing, "_peak_bytes", lambda shape, step: 100 * shape.num_hashes + len(step))
    settings = [Setting(1, 8, "sign"), Setting(2, 8, "sign"), Setting(2, 8, "cross_polytope", is_per_head=True)]
    rows = measure_settings(model, random_cells(), [0], settings, sharpness=1.0, repeats=1, with_memory=True)[
        "settings"
    ]
    assert [row["forward_peak_bytes"] for row in rows] == [107, 207, 207]


@pytest.mark.parametrize("name", ["num_cells", "repeats", "sharpness"])
def test_numbers_are_positive(tmp_path, name):
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        benchmark_hashing(tmp_path, **{name: 0})


def test_attention_inputs_are_named():
    assert AttentionInputs._fields == ("query_key", "value")
