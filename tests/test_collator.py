import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from oracles.slow_collator import slow_masks
from screformer.train.cell_dataset import CellBatch
from screformer.train.collator import CellCollator

NUM_GENES, PAD, MASK = 300, 6, 7
TYPES = {"alpha": 0, "beta": 1}


def make_rows(num_cells=6, seed=0, shortest=20, longest=80):
    generator = np.random.default_rng(seed)
    rows = []
    for number in range(num_cells):
        count = int(generator.integers(shortest, longest))
        genes = np.sort(generator.choice(NUM_GENES, count, replace=False))
        rows.append(
            {
                "gene_ids": genes.astype(np.uint16),
                "input_ids": generator.integers(1, PAD, count).astype(np.uint8),
                "cell_type": ["alpha", "beta"][number % 2],
            }
        )
    return rows


def make_collator(**options):
    return CellCollator(PAD, MASK, NUM_GENES, **options)


def unpack(batch, row):
    """Return {gene: (token, label)} of one cell's expressed genes, in either gene space."""
    is_gene = batch["attention_mask"][row].bool() if "attention_mask" in batch else batch["input_ids"][row] != 0
    genes = batch["gene_ids"][row][is_gene] if "gene_ids" in batch else is_gene.nonzero()[:, 0]
    tokens = batch["input_ids"][row][is_gene]
    labels = batch["labels"][row][is_gene] if "labels" in batch else torch.full_like(tokens, -100)
    return dict(zip(genes.tolist(), zip(tokens.tolist(), labels.tolist(), strict=True), strict=True))


def test_full_space_has_every_gene_in_order_with_bin_0_where_not_expressed():
    rows = make_rows()
    batch = make_collator()(rows)
    assert set(batch) == {"input_ids"}
    assert batch["input_ids"].shape == (6, NUM_GENES)
    assert batch["input_ids"].dtype == torch.int64
    for row, cell in zip(rows, batch["input_ids"], strict=True):
        expected = np.zeros(NUM_GENES)
        expected[row["gene_ids"]] = row["input_ids"]
        np.testing.assert_array_equal(cell.numpy(), expected)


def test_expressed_space_pads_to_the_longest_cell():
    rows = make_rows()
    batch = make_collator(gene_space="expressed")(rows)
    longest = max(len(row["gene_ids"]) for row in rows)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (6, longest),
        "gene_ids": (6, longest),
        "attention_mask": (6, longest),
    }
    for number, row in enumerate(rows):
        count = len(row["gene_ids"])
        np.testing.assert_array_equal(batch["gene_ids"][number, :count], row["gene_ids"])
        np.testing.assert_array_equal(batch["input_ids"][number, :count], row["input_ids"])
        assert batch["attention_mask"][number].tolist() == [1] * count + [0] * (longest - count)
        assert (batch["input_ids"][number, count:] == PAD).all()
        assert (batch["gene_ids"][number, count:] == 0).all()


def test_python_lists_and_arrays_give_the_same_batch():
    rows = make_rows()
    as_lists = [{**row, "gene_ids": row["gene_ids"].tolist(), "input_ids": row["input_ids"].tolist()} for row in rows]
    collator = make_collator(gene_space="expressed", masked_fraction=0.15, deterministic=True)
    for name, tensor in collator(rows).items():
        assert torch.equal(tensor, collator(as_lists)[name])


def as_batch(rows):
    """Return rows as `CellDataset` gives a batch of them."""
    tokens = [np.concatenate([row[name] for row in rows]) for name in ("input_ids", "gene_ids")]
    counts = np.array([len(row["gene_ids"]) for row in rows])
    return CellBatch(*tokens, counts, {"cell_type": [row["cell_type"] for row in rows]})


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"masked_fraction": 0.15},
        {"masked_fraction": 0.5, "gene_dropout": 0.5},
        {"gene_dropout": 0.3, "label_column": "cell_type", "label2id": {"alpha": 0, "beta": 1}},
    ],
)
def test_a_flat_batch_gives_the_tensors_of_its_rows(gene_space, options):
    by_rows, by_batch = (make_collator(gene_space=gene_space, **options) for _ in range(2))
    for seed in range(3):
        rows = make_rows(seed=seed)
        expected, found = by_rows(rows), by_batch(as_batch(rows))
        assert set(expected) == set(found)
        assert all(torch.equal(expected[name], found[name]) for name in expected)


# Python 3.12 and later say this of every data loader with workers.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("gene_space", ["full", "expressed"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_in_use_never_changes(gene_space, num_workers):
    batches = [make_rows(num_cells, seed) for seed, num_cells in enumerate((6, 2, 7, 1, 6, 6, 3, 7))]
    options = {"gene_space": gene_space, "masked_fraction": 0.15, "deterministic": True}
    loader = DataLoader(
        batches, batch_size=None, num_workers=num_workers, collate_fn=make_collator(**options), in_order=True
    )
    kept = list(loader)
    for rows, batch in zip(batches, kept, strict=True):
        fresh = make_collator(**options)(rows)
        assert all(torch.equal(batch[name], fresh[name]) for name in fresh)
    kept[0]["input_ids"].fill_(-1)  # nor does one that its user changes change the next
    again = make_collator(**options)
    again(batches[0])["input_ids"].fill_(-1)
    assert torch.equal(again(batches[0])["input_ids"], make_collator(**options)(batches[0])["input_ids"])


@pytest.mark.parametrize("masked_fraction", [0.15, 0.5])
def test_masks_are_those_of_the_hash_written_out(masked_fraction):
    collator = make_collator(masked_fraction=masked_fraction, deterministic=True, seed=11)
    rows = make_rows(num_cells=4)
    batch = collator(rows)
    for number, row in enumerate(rows):
        cell = dict(zip(row["gene_ids"].tolist(), row["input_ids"].tolist(), strict=True))
        masked, replaced = slow_masks(cell, seed=11, masked_fraction=masked_fraction, replace_probability=0.9)
        found = unpack(batch, number)
        assert {gene for gene, (_, label) in found.items() if label != -100} == masked
        assert {gene for gene, (token, _) in found.items() if token == MASK} == replaced


def test_a_copy_of_a_collator_does_not_carry_its_buffer():
    collator = make_collator()
    collator(make_rows())
    assert len(pickle.dumps(collator)) < 1000


@pytest.mark.parametrize("gene_space", ["full", "expressed"])
def test_masks_15_percent_of_the_expressed_genes_and_nothing_else(gene_space):
    rows = make_rows(num_cells=40)
    batch = make_collator(gene_space=gene_space, masked_fraction=0.15)(rows)
    for number, row in enumerate(rows):
        cell = unpack(batch, number)
        bins = dict(zip(row["gene_ids"].tolist(), row["input_ids"].tolist(), strict=True))
        assert set(cell) == set(bins)
        masked = {gene for gene, (_, label) in cell.items() if label != -100}
        assert len(masked) == round(0.15 * len(bins))
        for gene, (token, label) in cell.items():
            assert label == (bins[gene] if gene in masked else -100)
            assert token == bins[gene] or (gene in masked and token == MASK)
    is_expressed = batch["attention_mask"].bool() if gene_space == "expressed" else batch["input_ids"] != 0
    assert (batch["labels"][~is_expressed] == -100).all()


def test_replaces_nine_masked_genes_of_ten():
    rows = make_rows(num_cells=200, shortest=100, longest=200)
    batch = make_collator(masked_fraction=0.15)(rows)
    is_masked = batch["labels"] != -100
    share = (batch["input_ids"][is_masked] == MASK).float().mean()
    # Four standard deviations of a binomial share.
    assert abs(share - 0.9) < 4 * np.sqrt(0.9 * 0.1 / int(is_masked.sum()))


def test_every_gene_is_as_likely_to_be_masked():
    rows = make_rows(num_cells=1, shortest=100, longest=101) * 400
    collator = make_collator(masked_fraction=0.2)
    chosen = sum(collator([row])["labels"][0] != -100 for row in rows)
    counts = chosen[torch.from_numpy(rows[0]["gene_ids"].astype(np.int64))].double()
    assert counts.sum() == 400 * 20
    assert counts.min() > 80 - 5 * 8
    assert counts.max() < 80 + 5 * 8


def test_at_least_one_gene_is_masked_in_the_smallest_cell():
    batch = make_collator(masked_fraction=0.15)([{"gene_ids": [5], "input_ids": [2]}])
    assert batch["labels"][0].tolist().count(2) == 1
    assert int((batch["labels"] != -100).sum()) == 1


def test_the_same_seed_gives_the_same_stream_and_another_seed_another():
    rows = make_rows()
    first, again = make_collator(masked_fraction=0.15, seed=3), make_collator(masked_fraction=0.15, seed=3)
    other = make_collator(masked_fraction=0.15, seed=4)
    for _ in range(3):
        batch = first(rows)
        assert torch.equal(batch["labels"], again(rows)["labels"])
        assert not torch.equal(batch["labels"], other(rows)["labels"])


def test_training_masks_change_from_batch_to_batch():
    collator, rows = make_collator(masked_fraction=0.15), make_rows()
    assert not torch.equal(collator(rows)["labels"], collator(rows)["labels"])


@pytest.mark.parametrize("options", [{"masked_fraction": 0.15}, {"masked_fraction": 0.15, "gene_dropout": 0.4}])
def test_masks_of_an_epoch_do_not_depend_on_how_its_cells_are_shared_out(options):
    rows = make_rows(num_cells=12)
    whole = make_collator(**options)(replace(as_batch(rows), epoch=1))
    # Other batches, in another order, by collators that have collated something else before.
    for first, last in ((8, 12), (0, 3), (3, 8)):
        collator = make_collator(**options)
        collator(replace(as_batch(rows), epoch=0))
        batch = collator(replace(as_batch(rows[first:last]), epoch=1))
        for number in range(last - first):
            assert unpack(batch, number) == unpack(whole, first + number)


def test_masks_change_with_the_epoch_and_the_seed():
    rows = as_batch(make_rows())
    labels = [
        make_collator(masked_fraction=0.15, seed=seed)(replace(rows, epoch=epoch))["labels"]
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    labels.append(make_collator(masked_fraction=0.15, deterministic=True)(rows)["labels"])
    assert not any(torch.equal(labels[i], labels[j]) for i in range(7) for j in range(i))


def test_deterministic_masks_do_not_depend_on_the_epoch():
    rows, collator = as_batch(make_rows()), make_collator(masked_fraction=0.15, deterministic=True)
    assert torch.equal(collator(rows)["labels"], collator(replace(rows, epoch=4))["labels"])


@pytest.mark.parametrize("options", [{"masked_fraction": 0.15}, {"label_column": "cell_type", "label2id": TYPES}])
def test_cells_that_do_not_count_have_no_labels(options):
    rows = as_batch(make_rows())
    counted, some, none = (
        make_collator(**options)(replace(rows, epoch=0, num_counted=number))["labels"] for number in (6, 4, 0)
    )
    assert torch.equal(some[:4], counted[:4])
    assert (some[4:] == -100).all()
    assert (none == -100).all()
    assert (counted[4:] != -100).any()


def test_deterministic_masks_depend_on_the_cell_alone():
    rows = make_rows(num_cells=12)
    for gene_space in ("full", "expressed"):
        collator = make_collator(masked_fraction=0.15, deterministic=True, seed=1, gene_space=gene_space)
        together = collator(rows)
        shuffled = collator(rows[::-1])
        for number, row in enumerate(rows):
            alone = unpack(collator([row]), 0)
            assert alone == unpack(together, number) == unpack(shuffled, 11 - number)
            turned = {name: row[name][::-1].copy() for name in ("gene_ids", "input_ids")}
            assert alone == unpack(collator([turned]), 0)


def test_both_gene_spaces_mask_the_same_genes():
    rows = make_rows()
    full = make_collator(masked_fraction=0.15, deterministic=True)(rows)
    expressed = make_collator(masked_fraction=0.15, deterministic=True, gene_space="expressed")(rows)
    assert all(unpack(full, number) == unpack(expressed, number) for number in range(len(rows)))


@pytest.mark.parametrize("options", [{"masked_fraction": 0.15}, {"gene_dropout": 0.3}, {"deterministic": True}])
def test_global_generators_stay_untouched(options):
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global generator is the point
    make_collator(**options)(make_rows())
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_gene_dropout_removes_its_share_of_genes_and_never_a_whole_cell():
    rows = make_rows(num_cells=200)
    batch = make_collator(gene_dropout=0.3, gene_space="expressed")(rows)
    kept, total = int(batch["attention_mask"].sum()), sum(len(row["gene_ids"]) for row in rows)
    assert abs(kept / total - 0.7) < 4 * np.sqrt(0.3 * 0.7 / total) + 200 * 0.3 / total
    single = [{"gene_ids": [9], "input_ids": [3]}] * 50
    assert (make_collator(gene_dropout=0.99)(single)["input_ids"].sum(1) == 3).all()


def test_gene_dropout_leaves_bin_0_in_full_space_and_never_a_label():
    rows = make_rows(num_cells=20)
    batch = make_collator(gene_dropout=0.5, masked_fraction=0.15)(rows)
    for number, row in enumerate(rows):
        bins = np.zeros(NUM_GENES, dtype=np.int64)
        bins[row["gene_ids"]] = row["input_ids"]
        tokens, labels = batch["input_ids"][number].numpy(), batch["labels"][number].numpy()
        assert ((tokens == bins) | (tokens == 0) | (tokens == MASK)).all()
        assert (tokens == 0).sum() > (bins == 0).sum()
        is_masked = labels != -100
        assert (labels[is_masked] == bins[is_masked]).all()
        assert (tokens[is_masked] != 0).all()
        assert is_masked.sum() == max(1, round(0.15 * int((tokens != 0).sum())))


def test_labels_are_class_ids():
    rows = make_rows()
    batch = make_collator(label_column="cell_type", label2id={"alpha": 4, "beta": 1})(rows)
    assert batch["labels"].tolist() == [4, 1, 4, 1, 4, 1]
    numbered = [{**row, "label": number} for number, row in enumerate(rows)]
    assert make_collator(label_column="label")(numbered)["labels"].tolist() == list(range(6))


# Python 3.12 and later say this of every data loader with workers.
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_workers_draw_their_own_masks_and_repeat_them_with_the_loader_seed():
    # Eight times the same cell: equal masks could only come from equal random streams.
    rows = make_rows(num_cells=1, shortest=79) * 8

    def load(seed):
        loader = DataLoader(
            rows,
            batch_size=2,
            num_workers=2,
            collate_fn=make_collator(masked_fraction=0.15, seed=5),
            generator=torch.Generator().manual_seed(seed),
        )
        return [batch["labels"] for batch in loader]

    first = load(0)
    assert all(not torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    assert all(torch.equal(one, two) for one, two in zip(first, load(0), strict=True))
    assert not torch.equal(first[0], load(1)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gene_space": "half"}, "gene_space must be 'full' or 'expressed', got 'half'"),
        ({"masked_fraction": 1.5}, "masked_fraction must be at least 0 and at most 1, got 1.5"),
        ({"replace_probability": -0.1}, "replace_probability must be at least 0"),
        ({"gene_dropout": 1.0}, "gene_dropout must be at least 0 and below 1"),
        ({"masked_fraction": 0.15, "label_column": "cell_type"}, "both ask for labels"),
    ],
)
def test_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_collator(**options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"gene_ids": [], "input_ids": []}, "row 1 of the batch has no expressed gene"),
        ({"gene_ids": [1, 2], "input_ids": [3]}, "row 1 of the batch has 1 input_ids and 2 gene_ids"),
        (
            {"gene_ids": [300], "input_ids": [3]},
            "gene_ids of expressed genes must lie between 0 and num_genes - 1 = 299",
        ),
        (
            {"gene_ids": [1], "input_ids": [6]},
            "input_ids of expressed genes must lie between 1 and pad_token_id - 1 = 5",
        ),
        ({"gene_ids": [1], "input_ids": [0]}, "input_ids of expressed genes must lie between 1"),
    ],
)
def test_refuses_cells_of_another_tokenizer(row, message):
    with pytest.raises(ValueError, match=message):
        make_collator()([make_rows(1)[0], row])


def test_refuses_labels_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"label2id has no \['beta'\]; it knows \['alpha'\]"):
        make_collator(label_column="cell_type", label2id={"alpha": 0})(make_rows())
    with pytest.raises(ValueError, match="label_column='lineage' is not in the row"):
        make_collator(label_column="lineage")(make_rows())


def test_takes_ids_and_gene_space_from_a_config(tiny_config):
    collator = CellCollator.from_config(tiny_config(gene_space="expressed"), masked_fraction=0.15)
    assert (collator.pad_token_id, collator.mask_token_id, collator.num_genes) == (6, 7, 60)
    assert collator.gene_space == "expressed"
    assert CellCollator.from_config(tiny_config(), gene_space="expressed").gene_space == "expressed"
