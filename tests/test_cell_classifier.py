"""The paths of the cell classifier: alone, together, in both gene spaces, and started as a logistic regression."""

from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map

from screformer.cell_classifier import EncodedCells, LinearPath, PooledPath
from screformer.configuration_screformer import CLASSIFIER_PATHS, ScReformerConfig
from screformer.modeling_screformer import ScReformerForCellClassification, ScReformerForMaskedLM

NUM_GENES, HIDDEN = 40, 8


def config(*paths: str, **options) -> ScReformerConfig:
    options = {"classifier_dropout": 0.0, "num_labels": 3, **options}
    return ScReformerConfig(
        num_genes=NUM_GENES,
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        bucket_size=8,
        hidden_dropout_prob=0.0,
        classifier_paths=list(paths) or None,
        **options,
    )


def model(*paths: str, **options) -> ScReformerForCellClassification:
    torch.manual_seed(0)
    return ScReformerForCellClassification(config(*paths, **options)).eval()


def cells(num_cells: int = 4) -> dict[str, torch.Tensor]:
    """Cells of different lengths in the expressed space."""
    generator = torch.Generator().manual_seed(1)
    gene_ids = torch.stack([torch.randperm(NUM_GENES, generator=generator)[:20] for _ in range(num_cells)])
    is_gene = torch.arange(20) < torch.tensor([20, 7, 12, 1])[:num_cells, None]
    bins = torch.randint(1, 6, (num_cells, 20), generator=generator)
    return {
        "input_ids": bins.masked_fill(~is_gene, 6),
        "gene_ids": gene_ids.masked_fill(~is_gene, 0),
        "attention_mask": is_gene.long(),
    }


def by_gene(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bins laid out over all genes, by a loop."""
    full = torch.zeros(len(batch["input_ids"]), NUM_GENES, dtype=torch.long)
    for row, (bins, genes, mask) in enumerate(zip(*batch.values(), strict=True)):
        for token, gene, is_gene in zip(bins.tolist(), genes.tolist(), mask.tolist(), strict=True):
            if is_gene:
                full[row, gene] = token
    return full


def test_the_default_is_the_papers_convolution_alone() -> None:
    head = model().classifier
    assert (head.pooled_path, head.linear_path) == (None, None)
    assert head.convolution_path.convolution.weight.shape == (1, HIDDEN, 1)


@pytest.mark.parametrize("together", [("convolution", "pooled"), ("pooled", "linear"), CLASSIFIER_PATHS])
def test_logits_are_the_sum_of_the_paths(together: tuple[str, ...]) -> None:
    whole, batch = model(*together), cells()
    with torch.no_grad():
        if whole.classifier.linear_path is not None:
            whole.classifier.linear_path.output.weight.normal_()
    parts = []
    for path in together:
        part = model(path)
        part.load_state_dict(whole.state_dict(), strict=False)
        parts.append(part(**batch).logits)
    assert all(part.abs().max() > 0.01 for part in parts)
    torch.testing.assert_close(whole(**batch).logits, sum(parts))


@pytest.mark.parametrize("kind", [PooledPath, LinearPath])
def test_pooled_and_linear_paths_read_both_gene_spaces_alike(kind: type) -> None:
    """Of the same vectors a gene: zeros of the full space count for nothing."""
    torch.manual_seed(0)
    path, batch = kind(config("pooled")), cells()
    full = by_gene(batch)
    vectors, bins = torch.randn(4, NUM_GENES, HIDDEN), torch.nn.Embedding(8, HIDDEN)
    none = (bins.weight[0],) if kind is LinearPath else ()
    in_full = EncodedCells(vectors, bins(full), None, None, full > 0)
    place = batch["gene_ids"].unsqueeze(-1).expand(-1, -1, HIDDEN)
    is_gene = batch["attention_mask"].bool()
    expressed = EncodedCells(vectors.gather(1, place), bins(batch["input_ids"]), batch["gene_ids"], is_gene, is_gene)
    torch.testing.assert_close(path(in_full, *none), path(expressed, *none))


def test_a_pooled_cell_is_the_mean_and_maximum_of_its_expressed_genes() -> None:
    path, batch = PooledPath(config("pooled")), cells()
    is_gene = batch["attention_mask"].bool()
    vectors = torch.randn(4, 20, HIDDEN)
    logits = path(EncodedCells(vectors, vectors, batch["gene_ids"], is_gene, is_gene))
    for row in range(4):
        genes = path.norm(vectors[row][is_gene[row]])
        pooled = torch.cat([genes.mean(0), genes.max(0).values])
        torch.testing.assert_close(logits[row], path.output(torch.relu(path.dense(pooled))))


def test_a_cell_without_expressed_genes_is_read_as_zeros() -> None:
    path = PooledPath(config("pooled"))
    nothing = torch.zeros(1, NUM_GENES, dtype=torch.bool)
    logits = path(EncodedCells(torch.randn(1, NUM_GENES, HIDDEN), torch.zeros(1), None, None, nothing))
    torch.testing.assert_close(logits, path.output(torch.relu(path.dense.bias))[None])


def test_a_new_linear_path_says_nothing_and_a_started_one_is_a_regression_on_bins() -> None:
    ours, batch = model("linear"), cells()
    assert not ours(**batch).logits.any()
    weight, bias = torch.randn(3, NUM_GENES), torch.randn(3)
    ours.start_linear_path(weight, bias)
    expected = (by_gene(batch) / 5).float() @ weight.T + bias
    torch.testing.assert_close(ours(**batch).logits, expected, rtol=1e-4, atol=1e-4)
    full = ours(by_gene(batch)).logits
    torch.testing.assert_close(full, expected, rtol=1e-4, atol=1e-4)
    ours.start_linear_path()
    assert not ours(**batch).logits.any()


def test_gradients_reach_the_embeddings_through_the_linear_path() -> None:
    ours, batch = model("linear"), cells()
    ours.start_linear_path(torch.randn(3, NUM_GENES))
    embedded = ours.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = ours(gene_ids=batch["gene_ids"], attention_mask=batch["attention_mask"], inputs_embeds=embedded).logits
    torch.testing.assert_close(logits, ours(**batch).logits)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), embedded)
    assert (gradient.abs().sum(-1) > 0).equal(batch["attention_mask"].bool())


def test_a_checkpoint_keeps_its_paths_and_any_other_opens_in_them(tmp_path: Path) -> None:
    whole, batch = model(*CLASSIFIER_PATHS), cells()
    whole.start_linear_path(torch.randn(3, NUM_GENES))
    whole.save_pretrained(tmp_path / "whole")
    loaded = ScReformerForCellClassification.from_pretrained(tmp_path / "whole").eval()
    torch.testing.assert_close(loaded(**batch).logits, whole(**batch).logits)
    ScReformerForMaskedLM(config()).save_pretrained(tmp_path / "pretrained")
    opened = ScReformerForCellClassification.from_pretrained(
        tmp_path / "pretrained", classifier_paths=["pooled", "linear"], num_labels=3
    ).eval()
    assert opened(**batch).logits.isfinite().all()
    assert not opened.classifier.linear_path.output.weight.any()


def test_starting_a_path_that_is_not_there_names_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"classifier_paths got \['convolution'\]; add 'linear'"):
        model().start_linear_path()


@pytest.mark.parametrize("paths", [["conv"], [], ["linear", "linear"]])
def test_wrong_paths_are_refused(paths: list[str]) -> None:
    with pytest.raises(Exception, match=r"classifier_paths got .* one or more of 'convolution', 'pooled', 'linear'"):
        ScReformerConfig(classifier_paths=paths)


def test_layers_before_a_relu_start_with_he_weights_and_the_linear_path_with_none() -> None:
    torch.manual_seed(0)
    head = ScReformerForCellClassification(
        ScReformerConfig.preset("tiny", num_genes=2000, num_labels=3, classifier_paths=list(CLASSIFIER_PATHS))
    ).classifier
    for layer, gain in (
        (head.convolution_path.dense_1, 2**0.5),
        (head.convolution_path.dense_2, 2**0.5),
        (head.pooled_path.dense, 2**0.5),
        (head.pooled_path.output, 1.0),
    ):
        spread = layer.weight.detach().std() * layer.in_features**0.5
        assert spread == pytest.approx(gain, rel=0.15)
    assert not head.linear_path.output.weight.any()


def test_a_quantized_pooled_path_is_not_rounded_to_integers() -> None:
    trained, batch = model("pooled"), cells()
    expected, dense = trained(**batch).logits, trained.classifier.pooled_path.dense
    exact = torch.nn.Linear(dense.in_features, dense.out_features).requires_grad_(False)
    exact.load_state_dict(dense.state_dict())

    class Quantized(torch.nn.Module):
        weight = torch.zeros(1, dtype=torch.int8)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return exact(hidden)

    trained.classifier.pooled_path.dense = Quantized()
    torch.testing.assert_close(trained(**batch).logits, expected)


def test_no_device_map_parts_the_reversible_layers() -> None:
    trained = model("convolution")
    size = sum(tensor.numel() * tensor.element_size() for tensor in trained.state_dict().values())
    parts = infer_auto_device_map(
        trained, max_memory={"cpu": int(0.7 * size)}, no_split_module_classes=trained._no_split_modules
    )
    assert set(parts) <= {"", "screformer", "classifier"}
