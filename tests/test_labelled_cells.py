"""Few-shot training: so many cells of each label, the same for the model and for what it is compared with."""

import numpy as np
import pytest
from small_corpus import make_cells, make_corpus

from screformer.tokenization.corpus import open_corpus
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments
from screformer.train.labelled_cells import draw_at_most, draw_of_each_label, split_labelled_cells, write_split
from screformer.train.result_files import read_json


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    cells = make_cells(48)
    cells.obs.loc[cells.obs_names[:3], "cell_type"] = ["rare", "", "rare"]
    return open_corpus(make_corpus(tmp_path_factory.mktemp("corpus"), cells=cells))


def few(corpus, number, seed=0, **options):
    options = {"group_column": "donor", "test_groups": ["human4"], "validation_fraction": 0.0, **options}
    data = FineTuningDataArguments(corpus=str(corpus.folder), cells_per_label=number, **options)
    return split_labelled_cells(corpus, data, seed), data


def test_at_most_so_many_of_each_label_train(corpus):
    cells, _ = few(corpus, 3)
    labels, numbers = np.unique(cells.labels[cells.split.train], return_counts=True)
    assert dict(zip(labels.tolist(), numbers.tolist(), strict=True)) == {"alpha": 3, "beta": 3, "rare": 2}
    assert (cells.groups[cells.split.train] != "human4").all()
    assert len(cells.split.test) == 12
    assert not len(cells.split.validation)


def test_more_cells_hold_the_fewer_and_another_seed_draws_others(corpus):
    three, five, other = (few(corpus, number, seed)[0].split.train for number, seed in ((3, 0), (5, 0), (3, 1)))
    assert set(three) < set(five)
    assert set(three) != set(other)


def test_validation_and_test_cells_are_those_of_a_run_on_all_cells(corpus):
    some, _ = few(corpus, 2, validation_fraction=0.3)
    every, _ = few(corpus, None, validation_fraction=0.3)
    np.testing.assert_array_equal(some.split.test, every.split.test)
    np.testing.assert_array_equal(some.split.validation, every.split.validation)
    assert set(some.split.train) < set(every.split.train)


def test_without_validation_the_draw_is_from_all_other_cells_in_order(corpus):
    # What benchmarks.fine_tuning_tasks relies on to give the regression the same cells.
    cells, _ = few(corpus, 4, seed=7)
    rest = np.flatnonzero(cells.groups != "human4")
    np.testing.assert_array_equal(cells.split.train, draw_of_each_label(rest, cells.labels, 4, 7))


def test_of_many_cells_some_of_each_label_are_drawn_and_few_are_taken_as_they_are():
    labels = np.array(["common"] * 97 + ["rare"] * 3)
    train = np.arange(2, 100)
    assert draw_at_most(train, labels, 98, of_each=2, seed=0) is train
    for seed in range(5):
        drawn = draw_at_most(train, labels, 20, of_each=2, seed=seed)
        random = np.random.default_rng(seed).permutation(train)[:20]
        assert set(random.tolist()) <= set(drawn.tolist()) <= set(train.tolist())
        assert (labels[drawn] == "rare").sum() >= 2
        assert len(drawn) <= 24


def test_the_split_file_names_the_cells_that_train(corpus, tmp_path):
    cells, data = few(corpus, 3)
    write_split(corpus, cells, data, FineTuningArguments(output_dir=str(tmp_path), use_cpu=True))
    split = read_json(tmp_path / "splits.json")
    assert split["num_cells"] == {"train": 8, "validation": 0, "test": 12}
    assert len(split["train"]) == 8


def test_none_of_each_label_is_refused():
    with pytest.raises(ValueError, match="cells_per_label must be at least 1, got 0"):
        FineTuningDataArguments(corpus="corpus", cells_per_label=0)
