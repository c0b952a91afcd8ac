"""Values of genes: they add up, are those of shap, and are exact where the model is linear."""

import numpy as np
import pytest
import torch

from screformer import ScReformerConfig, ScReformerForCellClassification
from screformer.annotation.attributions import METHODS, Sampling, attribute, check_sampling, mean_embedding
from screformer.annotation.background_effect import made_to_sum, standard_error
from screformer.annotation.explained_score import ClassScore, ExplainedCell

NUM_GENES, LABELS = 60, ["T cell", "B cell", "monocyte"]


def make_model(*, seed=0, **overrides):
    torch.manual_seed(seed)
    names = dict(enumerate(LABELS))
    settings = {"num_genes": NUM_GENES, "bucket_size": 8, "num_hashes": 2, "id2label": names, "hidden_size": 8}
    settings |= {"intermediate_size": 16, "num_hidden_layers": 1, "classifier_hidden_sizes": [16, 8]}
    config = ScReformerConfig.preset("tiny", **settings | overrides)
    model = ScReformerForCellClassification(config).eval().requires_grad_(False)
    # Sharper than a new model, so that values are far from 0 and the function from a line.
    model.classifier.convolution_path.output.weight.mul_(20)
    return model


def make_bins(num_cells, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.integers(1, 6, (num_cells, NUM_GENES)) * (generator.random((num_cells, NUM_GENES)) < 0.5)).astype(
        np.uint8
    )


def explained(model, bins, *, name="T cell", kind="logit", gene_space="full"):
    score = ClassScore.parse(model.config, name, kind)
    return ExplainedCell(model, score, bins, gene_space=gene_space, batch_size=500)


def mean_score(cell, background):
    return cell.at_bins(background[:, cell.positions]).mean()


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
@pytest.mark.parametrize("kind", ["logit", "log_odds"])
@pytest.mark.parametrize("reversible", [True, False])
def test_values_sum_to_the_score_less_that_of_the_background(gene_space, kind, reversible):
    model, (bins,), background = make_model(reversible=reversible), make_bins(1), make_bins(20, seed=1)
    cell = explained(model, bins, kind=kind, gene_space=gene_space)
    effect = cell.score - mean_score(cell, background)
    values = attribute(cell, background, Sampling(num_points=1000, max_sum_error=None))
    assert len(values) == (NUM_GENES if gene_space == "full" else (bins > 0).sum())
    assert abs(values.sum() - effect) < 0.05 * np.abs(values).sum()


def test_the_score_is_that_of_the_model_in_its_own_layout():
    model, bins = make_model(), make_bins(1)
    (at,) = np.nonzero(bins[0])
    genes, levels = torch.from_numpy(at)[None], torch.from_numpy(bins[0][at].astype(np.int64))[None]
    with torch.no_grad():
        expressed, full = model(levels, gene_ids=genes).logits, model(torch.from_numpy(bins.astype(np.int64))).logits
    assert explained(model, bins[0], gene_space="expressed").score == pytest.approx(float(expressed[0, 0]), abs=1e-5)
    odds = expressed[0].softmax(0)[0]
    cell = explained(model, bins[0], gene_space="expressed", kind="log_odds")
    assert cell.score == pytest.approx(float((odds / (1 - odds)).log()), abs=1e-5)
    assert explained(model, bins[0]).score == pytest.approx(float(full[0, 0]), abs=1e-5)


def test_values_are_those_of_shap_within_its_noise():
    pytest.importorskip("shap")
    model, (bins,), background = make_model(), make_bins(1), make_bins(20, seed=1)
    cell = explained(model, bins)
    ours = attribute(cell, background, Sampling(num_points=500, max_sum_error=None))
    halves = [attribute(cell, background, Sampling("shap", 500, seed)) for seed in (0, 1)]
    noise = np.linalg.norm(halves[0] - halves[1]) / 2**0.5
    assert np.linalg.norm(ours - np.mean(halves, axis=0)) < 1.5 * noise
    assert noise < 0.15 * np.linalg.norm(ours)


def test_with_as_many_points_ours_is_less_noisy_than_shap():
    """Of a classifier as `finetune-small` makes it: a regression, and a network that has learned a little beside it."""
    pytest.importorskip("shap")
    model, (bins,), background = make_model(classifier_paths=["convolution", "linear"]), make_bins(1), make_bins(100, 1)
    model.start_linear_path(torch.randn(3, NUM_GENES, generator=torch.Generator().manual_seed(0)), torch.zeros(3))
    model.classifier.convolution_path.output.weight.mul_(0.02)
    cell = explained(model, bins)
    effect = cell.score - mean_score(cell, background)

    def gap(method):
        sums = [attribute(cell, background, Sampling(method, 16, seed, None)).sum() for seed in range(8)]
        return np.sqrt(np.mean((np.array(sums) - effect) ** 2))

    assert gap("expected_gradients") < gap("shap") / 2


def make_linear_model():
    """Return a model whose logits are linear in the bins, and their weights (labels, genes)."""
    model = make_model(classifier_paths=["convolution", "linear"])
    model.classifier.silence_deep_paths()
    weight = torch.randn(3, NUM_GENES, generator=torch.Generator().manual_seed(0))
    model.start_linear_path(weight, torch.zeros(3))
    return model, weight


@pytest.mark.parametrize("num_points", [1, 3, 16])
def test_a_linear_model_is_explained_exactly_by_any_number_of_points(num_points):
    model, weight = make_linear_model()
    (bins,), background = make_bins(1), make_bins(30, seed=1)
    cell = explained(model, bins)
    expected = weight[0].numpy() * (bins - background.mean(axis=0)) / 5
    for method in ("expected_gradients", "integrated_gradients"):
        np.testing.assert_allclose(attribute(cell, background, Sampling(method, num_points)), expected, atol=1e-4)


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
@pytest.mark.parametrize(("name", "kind"), [("both=T cell|B cell", "logit"), ("T cell", "log_odds")])
def test_scores_of_several_linear_logits_are_explained_exactly_too(name, kind, gene_space):
    model, weight = make_linear_model()
    (bins,), background = make_bins(1), make_bins(30, seed=1)
    cell = explained(model, bins, name=name, kind=kind, gene_space=gene_space)
    there = background[:, cell.positions]
    # By many points on the way from each cell of the background: logits are linear, slopes are not.
    expected = np.zeros(len(cell.positions))
    for share in (np.arange(400) + 0.5) / 400:
        for start in there:
            path = torch.from_numpy(start + share * (cell.levels - start.astype(float))).float()
            logits = (weight[:, cell.positions] @ path / 5).requires_grad_()
            (slopes,) = torch.autograd.grad(cell.class_score(logits[None]).sum(), logits)
            step = (cell.levels - start.astype(float)) / 5 / len(there) / 400
            expected += (slopes[:, None] * weight[:, cell.positions]).sum(dim=0).numpy() * step
    for num_points in (1, 4):
        values = attribute(cell, background, Sampling(num_points=num_points))
        np.testing.assert_allclose(values, expected, atol=2e-3)
        assert values.sum() == pytest.approx(cell.score - mean_score(cell, background), abs=1e-3)


def test_sums_are_as_near_as_was_asked_for_and_genes_no_farther():
    model, many, background = make_model(), make_bins(6), make_bins(200, seed=1)
    gaps, distances, passes = {}, {}, {}
    for number, bins in enumerate(many):
        cell = explained(model, bins, gene_space="expressed")
        called, at_bins = [], cell.at_bins
        cell.at_bins = lambda levels, called=called, at_bins=at_bins: called.append(len(levels)) or at_bins(levels)
        effect = cell.score - at_bins(background[:, cell.positions]).mean()
        truth = attribute(cell, background, Sampling(num_points=800, seed=1, max_sum_error=None))
        for most in (None, 0.05, 0.01, 0.0):
            called.clear()
            values = attribute(cell, background, Sampling(max_sum_error=most), number=number)
            passes.setdefault(most, []).append(sum(called))
            gaps.setdefault(most, []).append(abs(values.sum() - effect) / abs(effect))
            distances.setdefault(most, []).append(np.linalg.norm(values - truth) / np.linalg.norm(truth))
    assert np.median(gaps[None]) > 0.02  # or it would show nothing
    assert np.median(gaps[0.05]) < 0.05
    assert np.median(gaps[0.01]) < 0.01
    assert max(gaps[0.0]) < 1e-4
    assert np.mean(distances[0.01]) < 1.05 * np.mean(distances[None])
    assert sum(passes[None]) == 0
    assert passes[0.0] == [200] * 6
    assert np.sum(passes[0.05]) < np.sum(passes[0.01])


def test_a_nearly_linear_model_takes_no_forward_pass_for_its_sums(monkeypatch):
    """Of a classifier as `finetune-small` makes it: a regression, and a network that has learned a little beside it."""
    model, _ = make_linear_model()
    learned = model.classifier.convolution_path.output.weight
    learned.copy_(0.001 * torch.randn(learned.shape, generator=torch.Generator().manual_seed(1)))
    (bins,), background = make_bins(1), make_bins(30, seed=1)
    cell = explained(model, bins)
    at_bins = cell.at_bins
    monkeypatch.setattr(cell, "at_bins", None)
    effect = cell.score - at_bins(background[:, cell.positions]).mean()
    assert attribute(cell, background, Sampling()).sum() == pytest.approx(effect, rel=0.01)


def test_what_values_miss_goes_to_the_uncertain_ones():
    given = np.array([1.0, 2.0, 3.0])
    np.testing.assert_allclose(made_to_sum(given, 10.0, np.array([0.0, 3.0, 1.0])), [1.0, 5.0, 4.0])
    np.testing.assert_allclose(made_to_sum(given, 9.0, np.zeros(3)), [2.0, 3.0, 4.0])
    assert standard_error(np.ones(1)) == np.inf
    assert standard_error(np.arange(4.0)) == pytest.approx(np.arange(4.0).std(ddof=1) / 2)
    assert standard_error(np.arange(4.0), 4) == 0.0


def test_integrated_gradients_add_up_from_the_mean_embedding():
    model, (bins,), background = make_model(), make_bins(1), make_bins(20, seed=1)
    cell = explained(model, bins)
    with torch.no_grad():
        start = float(cell.at_embeddings(mean_embedding(cell, background)[None])[0])
    values = attribute(cell, background, Sampling("integrated_gradients", 128))
    assert values.sum() == pytest.approx(cell.score - start, rel=0.02)


def test_deep_explainer_runs_beside_a_reversible_model_and_leaves_no_hooks():
    pytest.importorskip("shap")
    model, (bins,), background = make_model(), make_bins(1), make_bins(20, seed=1)
    cell = explained(model, bins)
    values = attribute(cell, background, Sampling("deep", 10))
    assert values.shape == (NUM_GENES,)
    assert np.isfinite(values).all()
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_values_and_another_other_ones(method):
    if method in ("shap", "deep"):
        pytest.importorskip("shap")
    model, (bins,), background = make_model(), make_bins(1), make_bins(20, seed=1)
    cell = explained(model, bins)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, again, other = (attribute(cell, background, Sampling(method, 5, seed)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, again)
    assert np.array_equal(first, other) == (method == "integrated_gradients")
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])  # noqa: NPY002


def test_values_do_not_depend_on_how_many_points_are_worked_on_together():
    model, (bins,), background = make_model(), make_bins(1), make_bins(20, seed=1)
    score = ClassScore.parse(model.config, "T cell")
    found = [
        attribute(
            ExplainedCell(model, score, bins, gene_space="full", batch_size=size), background, Sampling(num_points=10)
        )
        for size in (1, 3, 100)
    ]
    np.testing.assert_allclose(found[0], found[1], atol=1e-4)
    np.testing.assert_allclose(found[0], found[2], atol=1e-4)


def test_a_class_is_a_label_one_above_labels_or_several():
    parents = {"lymphoid": None, "T cell": "lymphoid", "B cell": "lymphoid", "monocyte": None}
    config = make_model(label_parents=parents).config
    assert ClassScore.parse(config, "monocyte").members == (2,)
    assert ClassScore.parse(config, "lymphoid") == ClassScore("lymphoid", (0, 1))
    assert ClassScore.parse(config, "not B=T cell|monocyte", "log_odds") == ClassScore("not B", (0, 2), "log_odds")
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    assert float(ClassScore.parse(config, "lymphoid")(logits)) == pytest.approx(np.log(np.exp(1) + np.exp(2)))
    with pytest.raises(ValueError, match=r"class 'NK': \['NK'\] are none of the model's labels; it has lymphoid"):
        ClassScore.parse(config, "NK")
    with pytest.raises(ValueError, match="holds every label of the model"):
        ClassScore.parse(config, "all=lymphoid|monocyte")


def test_cells_of_a_class_may_have_any_label_within_it():
    parents = {
        "blood": None, "lymphoid": "blood", "T": "lymphoid", "T cell": "T", "B cell": "lymphoid", "monocyte": "blood"
    }  # fmt: skip
    config = make_model(label_parents=parents).config

    def labels(text):
        return set(ClassScore.parse(config, text).labels(config))

    assert labels("lymphoid") == {"lymphoid", "T", "T cell", "B cell"}
    assert labels("T cell") == {"T cell"}  # what is a T may be another kind
    assert labels("not B=T|monocyte") == {"not B", "T", "T cell", "monocyte"}
    assert labels("some=lymphoid") == {"some", "lymphoid", "T", "T cell", "B cell"}
    with pytest.raises(ValueError, match="score got 'probability'; allowed are 'logit', 'log_odds'"):
        ClassScore.parse(config, "monocyte", "probability")


def test_what_cannot_be_sampled_is_refused():
    with pytest.raises(ValueError, match="method got 'lime'; allowed are expected_gradients, shap"):
        check_sampling(Sampling("lime"), 5)
    with pytest.raises(ValueError, match="points got 0; at least 1"):
        check_sampling(Sampling(num_points=0), 5)
    with pytest.raises(ValueError, match=r"sum error got 1\.5; it is a share of the sum from 0"):
        check_sampling(Sampling(max_sum_error=1.5), 5)
    with pytest.raises(ValueError, match="the background has no cells"):
        check_sampling(Sampling(), 0)
