import logging

import numpy as np
import pytest
from small_corpus import TYPES, make_cells, make_corpus

from screformer.tokenization.corpus import open_corpus
from screformer.train.distillation_arguments import DistillationDataArguments
from screformer.train.taught_cells import choose_taught_cells

NAMES = [f"cell{number}" for number in range(48)]
DONOR_OF = np.array([f"human{number // 2 % 4 + 1}" for number in range(48)])
IS_TEST = DONOR_OF == "human4"


def parts(train, validation, test):
    return {
        "train": [NAMES[row] for row in train],
        "validation": [NAMES[row] for row in validation],
        "test": [NAMES[row] for row in test],
        "num_cells": {},
        "label_column": "cell_type",
        "group_column": "donor",
        "test_groups": ["human4"],
        "seed": 1,
    }


OTHERS = np.flatnonzero(~IS_TEST)
SPLIT = parts(OTHERS[6:], OTHERS[:6], np.flatnonzero(IS_TEST))


def unlabel(rows, cells=None):
    cells = make_cells() if cells is None else cells
    labels = cells.obs["cell_type"].astype(object)
    labels.iloc[rows] = np.nan
    cells.obs["cell_type"] = labels
    return cells


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(make_corpus(tmp_path_factory.mktemp("corpus")))


def choose(corpus, teacher_split, label_names=TYPES, **settings):
    data = DistillationDataArguments(corpus="corpus", **settings)
    if data.split == "teacher":
        data = data.with_split_of_teacher(teacher_split)
    return choose_taught_cells(corpus, data, teacher_split, label_names, teacher="finetuned", seed=2022)


def test_the_teachers_parts_are_the_students(corpus):
    cells = choose(corpus, SPLIT)
    rows, class_ids = cells.training_cells(TYPES)
    assert rows.tolist() == OTHERS[6:].tolist()
    assert class_ids.tolist() == (OTHERS[6:] % 2).tolist()
    assert cells.validation_cells(TYPES)[0].tolist() == OTHERS[:6].tolist()
    assert cells.labelled.rows[cells.labelled.split.test].tolist() == np.flatnonzero(IS_TEST).tolist()


def test_class_ids_are_the_teachers_whatever_the_alphabet_says(corpus):
    rows, class_ids = choose(corpus, SPLIT, label_names=["beta", "alpha"]).training_cells(["beta", "alpha"])
    assert class_ids.tolist() == (1 - rows % 2).tolist()


def test_refuses_a_corpus_without_the_teachers_cells(tmp_path):
    smaller = open_corpus(make_corpus(tmp_path, cells=make_cells(num_cells=46)))
    with pytest.raises(ValueError, match=r"2 of the 48 cells in the splits.json of teacher 'finetuned' are not in"):
        choose(smaller, SPLIT)


def test_refuses_settings_that_the_teachers_split_would_ignore(corpus):
    with pytest.raises(ValueError, match=r"test_groups=\['human1'\] would be ignored: .*--split new"):
        choose(corpus, SPLIT, group_column="donor", test_groups=["human1"])
    with pytest.raises(ValueError, match=r"label_column='donor' would be ignored"):
        choose(corpus, SPLIT, label_column="donor")
    with pytest.raises(ValueError, match="split must be 'teacher' or 'new', got 'old'"):
        DistillationDataArguments(corpus="corpus", split="old")


def test_a_new_split_never_learns_from_cells_that_tested_the_teacher(corpus, caplog):
    with caplog.at_level(logging.WARNING, logger="screformer"):
        cells = choose(corpus, SPLIT, split="new", group_column="donor", test_groups=["human1"])
    assert "12 cells that tested the teacher are taken out" in caplog.text
    learned = np.concatenate([cells.training_cells(TYPES)[0], cells.validation_cells(TYPES)[0]])
    assert set(DONOR_OF[learned]) == {"human2", "human3"}
    tests = cells.labelled.rows[cells.labelled.split.test]
    assert set(DONOR_OF[tests]) == {"human1", "human4"}
    assert len(tests) == 24


def test_a_new_split_with_nothing_left_is_refused(corpus):
    everything = parts([], [], range(48))
    with pytest.raises(ValueError, match="leaves 0 cells to train on and 0 to validate with, as 36 others tested"):
        choose(corpus, everything, split="new", group_column="donor", test_groups=["human1"])


def test_a_teacher_without_split_is_warned_of(corpus, caplog):
    choose(corpus, None, split="new")
    assert "teacher finetuned does not say which cells it was tested on" in caplog.text


def test_refuses_labels_that_the_teacher_does_not_know(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"have the labels \['beta'\], which teacher 'finetuned' does not know"):
        choose(corpus, SPLIT, label_names=["alpha", "delta"])
    # Of test cells nothing is looked at.
    cells = make_cells()
    cells.obs["cell_type"] = np.where(IS_TEST, "mast", cells.obs["cell_type"])
    choose(open_corpus(make_corpus(tmp_path, cells=cells)), SPLIT)


def test_cells_without_a_label_join_training_but_not_those_of_held_out_donors(tmp_path):
    without = [*OTHERS[-4:], *np.flatnonzero(IS_TEST)[:3]]
    corpus = open_corpus(make_corpus(tmp_path, cells=unlabel(without)))
    split = parts(OTHERS[6:-4], OTHERS[:6], np.flatnonzero(IS_TEST)[3:])
    assert len(choose(corpus, split).unlabelled_train) == 0
    cells = choose(corpus, split, use_unlabelled=True)
    assert cells.unlabelled_train.tolist() == OTHERS[-4:].tolist()
    rows, class_ids = cells.training_cells(TYPES)
    assert rows.tolist() == OTHERS[6:].tolist()
    assert class_ids[-4:].tolist() == [-1] * 4
    assert len(cells.unlabelled_validation) == 0


def test_cells_without_label_and_donor_are_of_no_use(tmp_path):
    cells = unlabel(OTHERS[-4:])
    donors = cells.obs["donor"].astype(object)
    donors.iloc[OTHERS[-2:]] = np.nan
    cells.obs["donor"] = donors
    corpus = open_corpus(make_corpus(tmp_path, cells=cells))
    split = parts(OTHERS[6:-4], OTHERS[:6], np.flatnonzero(IS_TEST))
    assert choose(corpus, split, use_unlabelled=True).unlabelled_train.tolist() == OTHERS[-4:-2].tolist()


def test_the_remedy_for_labels_above_the_classes_is_allowed(tmp_path):
    cells = make_cells()
    labels = cells.obs["cell_type"].astype(object)
    labels.iloc[OTHERS[-4:]] = "islet"
    cells.obs["cell_type"] = labels
    corpus = open_corpus(make_corpus(tmp_path, cells=cells))
    with pytest.raises(
        ValueError, match=r"above its classes in its label tree.*\(--split new --exclude_labels 'islet'\)"
    ):
        choose(corpus, SPLIT)
    by_donor = {"group_column": "donor", "test_groups": ["human4"]}
    learned = choose(corpus, SPLIT, split="new", exclude_labels=["islet"], **by_donor)
    assert len(learned.labelled.rows) == len(cells) - 4


def test_a_donor_that_only_validates_gives_no_cells_to_training(tmp_path):
    without = np.flatnonzero(DONOR_OF == "human3")[:2]
    corpus = open_corpus(make_corpus(tmp_path, cells=unlabel(without)))
    human3 = np.flatnonzero(DONOR_OF == "human3")[2:]
    training = np.flatnonzero(np.isin(DONOR_OF, ["human1", "human2"]))
    cells = choose(corpus, parts(training, human3, np.flatnonzero(IS_TEST)), use_unlabelled=True)
    assert len(cells.unlabelled_train) == 0


def test_a_corpus_without_labels_holds_some_cells_out_to_select_by(tmp_path):
    corpus = open_corpus(make_corpus(tmp_path, obs_columns=("donor",)))
    cells = choose(corpus, SPLIT, split="new", use_unlabelled=True, validation_fraction=0.25)
    assert (len(cells.unlabelled_train), len(cells.unlabelled_validation)) == (27, 9)  # 12 tested the teacher
    learned = np.concatenate([cells.unlabelled_train, cells.unlabelled_validation])
    assert sorted(learned.tolist()) == OTHERS.tolist()
    assert set(cells.training_cells(TYPES)[1].tolist()) == {-1}
    with pytest.raises(ValueError, match=r"label_column: the corpus .* has no column 'cell_type'"):
        choose(corpus, SPLIT, split="new")


def test_cells_of_the_teachers_split_need_their_labels(tmp_path):
    corpus = open_corpus(make_corpus(tmp_path, cells=unlabel([OTHERS[0]])))
    with pytest.raises(ValueError, match="1 cells of the teacher's split have no label"):
        choose(corpus, SPLIT)
