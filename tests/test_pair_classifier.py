import gzip

import numpy as np
import pytest
import torch

from screformer.benchmarks import pair_classifier
from screformer.benchmarks.pair_classifier import LabelledPairs, classify_pairs, read_labelled_pairs
from screformer.tokenization.gene_vocabulary import GeneVocabulary

NUM_GENES = 300
GENES_OF = {"train": (0, 200), "valid": (200, 250), "test": (250, 300)}


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(pair_classifier, "MAX_STEPS", 160)
    monkeypatch.setattr(pair_classifier, "HIDDEN_SIZE", 32)
    monkeypatch.setattr(pair_classifier, "BATCH_SIZE", 256)


@pytest.fixture
def vocabulary():
    return GeneVocabulary(
        [f"ENSG{number:011d}" for number in range(NUM_GENES)],
        symbols=[f"GENE{number}" for number in range(NUM_GENES)],
        aliases=[["OLD0"] if number == 0 else [] for number in range(NUM_GENES)],
    )


@pytest.fixture
def planted():
    """Genes in five groups; those of one group interact. Features: the group, noisy, among noise."""
    generator = np.random.default_rng(0)
    group = generator.integers(5, size=NUM_GENES)
    features = generator.normal(size=(NUM_GENES, 12)).astype(np.float32)
    features[:, :5] += 3 * np.eye(5, dtype=np.float32)[group]
    pairs = {}
    for split, (first, stop) in GENES_OF.items():
        genes = generator.integers(first, stop, size=(6000 if split == "train" else 1500, 2))
        labels = (group[genes[:, 0]] == group[genes[:, 1]]).astype(np.float32)
        balanced = (labels == 1) | (generator.random(len(labels)) < 0.25)
        pairs[split] = LabelledPairs(genes[balanced], labels[balanced], len(genes), 0.5)
    return features, pairs


def write(folder, rows, header="gene_a\tgene_b\tlabel\tsplit"):
    path = folder / "pairs.tsv.gz"
    path.write_bytes(gzip.compress("\n".join([header, *("\t".join(row.split()) for row in rows)]).encode()))
    return path


ROWS = [
    "GENE0 GENE1 1 train", "GENE0 GENE2 0 train", "GENE10 GENE11 1 valid", "GENE10 NOSUCHGENE 0 valid",
    "GENE12 GENE10 0 valid", "GENE20 GENE21 1 test", "ENSG00000000022 GENE20 0 test", "GENE3 GENE20 1 train",
]  # fmt: skip


def test_pairs_are_read_by_split_and_genes_of_later_splits_left_out(tmp_path, vocabulary):
    pairs = read_labelled_pairs(write(tmp_path, ROWS), vocabulary)
    assert pairs["train"].genes.tolist() == [[0, 1], [0, 2]]
    assert pairs["valid"].genes.tolist() == [[10, 11], [12, 10]]
    assert pairs["test"].labels.tolist() == [1, 0]
    assert (pairs["train"].num_read, pairs["valid"].num_read) == (3, 3)
    assert pairs["valid"].share_positive_read == pytest.approx(1 / 3)


def test_pairs_among_known_genes_are_kept(tmp_path, vocabulary):
    is_known = np.ones(NUM_GENES, dtype=bool)
    is_known[2] = False
    kept = read_labelled_pairs(write(tmp_path, ROWS), vocabulary)["train"].among(is_known)
    assert kept.genes.tolist() == [[0, 1]]
    assert kept.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("rows", "header", "message"),
    [
        (ROWS, "a\tb\tlabel\tsplit", r"must have the columns \('gene_a', .*it has \['a', 'b', 'label', 'split'\]"),
        (["GENE0 GENE1 2 train"], None, r"labels 0 and 1 and splits .* has \['2'\]"),
        (["GENE0 GENE1 1 dev"], None, r"has \['1'\] and \['dev'\]"),
        (ROWS[1:], None, r"the split 'train' of pairs\.tsv\.gz needs pairs of both labels"),
    ],
)
def test_other_tables_are_refused(tmp_path, vocabulary, rows, header, message):
    options = {} if header is None else {"header": header}
    with pytest.raises(ValueError, match=message):
        read_labelled_pairs(write(tmp_path, rows, **options), vocabulary)


def test_a_table_that_is_not_there_is_named(tmp_path, vocabulary):
    with pytest.raises(FileNotFoundError, match=r"pairs: there is no file .*absent\.tsv"):
        read_labelled_pairs(tmp_path / "absent.tsv", vocabulary)


def test_planted_interactions_are_found_for_genes_never_met(planted):
    features, pairs = planted
    scores = classify_pairs(features, pairs, seed=1)
    assert min(scores.valid, scores.test) > 0.8
    assert scores == classify_pairs(features, pairs, seed=1)


def test_features_without_meaning_tell_nothing(planted):
    features, pairs = planted
    noise = np.random.default_rng(5).normal(size=features.shape).astype(np.float32)
    assert abs(classify_pairs(noise, pairs).test - 0.5) < 0.1


def test_the_order_of_a_pair_and_the_global_generator_stay_out_of_it(planted):
    features, pairs = planted
    turned = {split: some._replace(genes=some.genes[:, ::-1].copy()) for split, some in pairs.items()}
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert classify_pairs(features, pairs) == classify_pairs(features, turned)
    assert torch.equal(before, torch.get_rng_state())


def test_the_test_pairs_choose_nothing(planted):
    features, pairs = planted
    other = {**pairs, "test": pairs["test"]._replace(labels=1 - pairs["test"].labels)}
    first, second = classify_pairs(features, pairs), classify_pairs(features, other)
    assert first[0] == second[0]
    assert first[2:] == second[2:]
    assert first.test == pytest.approx(1 - second.test)


def test_training_stops_when_the_validation_pairs_say_so(planted, monkeypatch):
    features, pairs = planted
    monkeypatch.setattr(pair_classifier, "MAX_STEPS", 10**9)  # years, if nothing stopped it
    monkeypatch.setattr(pair_classifier, "STEPS_A_CHECK", 5)
    monkeypatch.setattr(pair_classifier, "PATIENCE", 1)
    assert classify_pairs(features, pairs).step > 0


def test_genes_without_features_are_refused(planted):
    features, pairs = planted
    features[pairs["test"].genes[0, 0]] = np.nan
    with pytest.raises(ValueError, match=r"every gene of the pairs needs finite ones; leave the others out"):
        classify_pairs(features, pairs)
