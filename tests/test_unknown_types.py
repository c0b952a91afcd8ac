"""Cells of types that training lacks: small p-values for them, not for others, and the same for a cell anywhere."""

import logging
import time

import numpy as np
import pytest
from huggingface_hub.errors import EntryNotFoundError
from safetensors.numpy import save_file
from small_corpus import TINY_MODEL, make_cells, make_corpus, make_tokenizer

from screformer.annotation import unknown_types
from screformer.annotation.unknown_types import UNKNOWN_TYPES_FILE, UnknownTypeDetector, fit_unknown_types
from screformer.model_cards.checkpoint_records import num_values
from screformer.tokenization import open_corpus
from screformer.tokenization.tokenization_screformer import TokenizedCells
from screformer.train.arguments import FineTuningArguments, FineTuningDataArguments, ModelArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.expression_levels import as_levels
from screformer.train.finetune import finetune

THREE_TYPES = ["alpha", "beta", "gamma"]


def tokens_of(cells) -> TokenizedCells:
    """Tokenize small cells."""
    tokenizer = make_tokenizer()
    mapping = tokenizer.gene_vocabulary.map_names(list(cells.var_names))
    return tokenizer.tokenize_counts(cells.X, mapping)


def levels_of(cells):
    tokens = tokens_of(cells)
    return as_levels(tokens.indptr, tokens.gene_ids, tokens.input_ids, cells.n_vars, 6)


def rows_of(tokens: TokenizedCells) -> list[dict[str, np.ndarray]]:
    bounds = zip(tokens.indptr[:-1], tokens.indptr[1:], strict=True)
    return [{"input_ids": tokens.input_ids[a:b], "gene_ids": tokens.gene_ids[a:b]} for a, b in bounds]


def fit(cells, **options) -> UnknownTypeDetector:
    options = {"groups": cells.obs["donor"].to_list(), "num_bins": 6, **options}
    return fit_unknown_types(levels_of(cells), cells.obs["cell_type"].to_list(), **options)


@pytest.fixture(scope="module")
def detector() -> UnknownTypeDetector:
    return fit(make_cells(320))


@pytest.fixture(scope="module")
def new_cells():
    """Cells of three types, one of them unknown, from the same distribution as the training cells."""
    return make_cells(2400, seed=1, types=THREE_TYPES)


def test_known_types_are_not_called_unknown_more_often_than_asked_and_others_are(detector, new_cells) -> None:
    scores = detector.score(tokens_of(new_cells))
    is_unknown = (new_cells.obs["cell_type"] == "gamma").to_numpy()
    assert scores.dtype == np.float32
    assert scores.min() >= np.float32(1 / (1 + len(detector.known_sums)))
    assert scores.max() <= 1
    assert (scores[is_unknown] < 0.02).mean() > 0.95
    for level in (0.05, 0.2, 0.5):
        # 1600 cells against 320 known ones: the standard error of the share is that of 267 draws.
        error = np.sqrt(level * (1 - level) / 267)
        share = (scores[~is_unknown] < level).mean()
        # On the safe side, because known cells are scored by fits to fewer cells than new ones are.
        assert level / 10 < share < level + 3 * error


def test_a_score_depends_on_nothing_but_the_cell(detector, new_cells) -> None:
    tokens = tokens_of(new_cells[:1200])
    scores, rows = detector.score(tokens), rows_of(tokens)
    order = np.random.default_rng(0).permutation(len(rows))
    np.testing.assert_array_equal(detector.score([rows[place] for place in order]), scores[order])
    one_by_one = [detector.score([row])[0] for row in rows[:20]]
    np.testing.assert_array_equal(one_by_one, scores[:20])


def test_the_order_of_genes_does_not_matter(detector, new_cells) -> None:
    rows = rows_of(tokens_of(new_cells[:50]))
    turned = [{name: values[::-1] for name, values in row.items()} for row in rows]
    # Sums of weights in another order may differ by a rounding, which moves no cell past another.
    np.testing.assert_allclose(detector.score(turned), detector.score(rows), atol=1 / len(detector.known_sums))


def test_it_is_the_same_for_tokens_rows_and_a_corpus(detector, tmp_path) -> None:
    cells = make_cells(60, seed=2, types=THREE_TYPES)
    corpus = open_corpus(make_corpus(tmp_path, cells=cells))
    expected = detector.score(tokens_of(cells))
    np.testing.assert_array_equal(detector.score(CellDataset(corpus)), expected)
    np.testing.assert_array_equal(detector.score(corpus.dataset.with_format("numpy")), expected)


def test_a_cell_without_genes_has_no_score(detector, new_cells) -> None:
    rows = rows_of(tokens_of(new_cells[:2]))
    empty = {"input_ids": np.empty(0, np.uint8), "gene_ids": np.empty(0, np.uint16)}
    scores = detector.score([rows[0], empty, rows[1], empty])
    assert np.isnan(scores).tolist() == [False, True, False, True]
    np.testing.assert_array_equal(scores[[0, 2]], detector.score(rows))
    assert detector.score([]).shape == (0,)


def test_a_gene_of_its_own_and_a_type_that_none_claims_are_each_enough(detector) -> None:
    alpha = make_cells(200, seed=3, types=["alpha"])
    usual = np.median(detector.score(tokens_of(alpha)))
    marked, bare = alpha.copy(), alpha.copy()
    marked.X, bare.X = marked.X.toarray(), bare.X.toarray()
    marked.X[:, 30] = 2000
    bare.X[:, :6] = 1
    for cells in (marked, bare):
        assert np.median(detector.score(tokens_of(cells))) < 0.05 < usual


def test_what_is_saved_is_what_is_loaded(detector, new_cells, tmp_path) -> None:
    path = detector.save(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [UNKNOWN_TYPES_FILE] == [path.name]
    loaded = UnknownTypeDetector.from_pretrained(tmp_path)
    assert (loaded.labels, loaded.num_bins, loaded.num_genes) == (("alpha", "beta"), 6, 40)
    tokens = tokens_of(new_cells[:100])
    np.testing.assert_array_equal(loaded.score(tokens), detector.score(tokens))


def test_the_same_cells_give_the_same_detector(tmp_path) -> None:
    cells = make_cells(120)
    files = {fit(cells).save(tmp_path / name).read_bytes() for name in ("first", "second", "third")}
    assert len(files) == 1


def test_types_that_no_other_donor_has_do_not_count_as_strange() -> None:
    cells = make_cells(160, types=THREE_TYPES)
    of_one = ((cells.obs["cell_type"] != "gamma") | (cells.obs["donor"] == "human1")).to_numpy()
    cells = cells[of_one].copy()
    detector = fit(cells)
    assert detector.labels == ("alpha", "beta", "gamma")
    assert len(detector.known_sums) == (cells.obs["cell_type"] != "gamma").sum()


def test_where_no_donor_can_be_held_out_cells_are() -> None:
    cells = make_cells(120)
    donors = np.where(cells.obs["cell_type"] == "alpha", "human1", "human2")
    assert len(fit(cells, groups=donors).known_sums) == 120
    assert len(fit(cells, groups=None).known_sums) == 120


def test_finetune_leaves_a_detector_of_its_training_cells(tmp_path) -> None:
    corpus = make_corpus(tmp_path, cells=make_cells(240, types=THREE_TYPES))
    data = FineTuningDataArguments(
        corpus=corpus, group_column="donor", test_groups=["human4"], exclude_labels=["gamma"]
    )

    def train(name: str, **options) -> UnknownTypeDetector | None:
        training = FineTuningArguments(
            output_dir=str(tmp_path / name), use_cpu=True, disable_tqdm=True, max_steps=1, **options
        )
        finetune(ModelArguments(config_overrides=TINY_MODEL), data, training)
        return UnknownTypeDetector.from_pretrained(tmp_path / name)

    detector = train("with")
    opened = open_corpus(corpus)
    scores = detector.score(CellDataset(opened))
    is_unknown = np.array(opened.dataset["cell_type"]) == "gamma"
    assert detector.labels == ("alpha", "beta")
    assert np.median(scores[is_unknown]) < 0.05 < np.median(scores[~is_unknown])
    assert train("without", unknown_types=False) is None
    # The detector's numbers are none of the model's, and go when its run does.
    assert num_values(tmp_path / "with") == num_values(tmp_path / "without")
    assert train("with", unknown_types=False, overwrite=True) is None


def test_too_few_cells_are_a_warning_and_no_detector(tmp_path, caplog) -> None:
    corpus = make_corpus(tmp_path, cells=make_cells(32))
    data = FineTuningDataArguments(corpus=corpus, group_column="donor", test_groups=["human4"], cells_per_label=5)
    training = FineTuningArguments(output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, max_steps=1)
    with caplog.at_level(logging.WARNING):
        finetune(ModelArguments(config_overrides=TINY_MODEL), data, training)
    assert "no detector of unknown types: labels: " in caplog.text
    assert UnknownTypeDetector.from_pretrained(tmp_path / "run") is None


def test_of_many_cells_some_are_taken_and_rare_types_are_among_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unknown_types, "MAX_CELLS", 40)
    monkeypatch.setattr(unknown_types, "CELLS_OF_EACH_TYPE", 10)
    taken = []
    monkeypatch.setattr(
        unknown_types, "fit_unknown_types", lambda levels, labels, **_: taken.extend(labels) or fit(make_cells())
    )
    cells = make_cells(200)
    cells.obs["cell_type"] = ["rare" if number % 25 == 0 else kind for number, kind in enumerate(cells.obs.cell_type)]
    corpus = make_corpus(tmp_path, cells=cells)
    data = FineTuningDataArguments(corpus=corpus, group_column="donor", test_groups=["human4"], validation_fraction=0.1)
    training = FineTuningArguments(output_dir=str(tmp_path / "run"), use_cpu=True, disable_tqdm=True, max_steps=1)
    finetune(ModelArguments(config_overrides=TINY_MODEL), data, training)
    assert 40 <= len(taken) <= 70
    assert taken.count("rare") >= 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1], "gene_ids": [40]}, "genes up to 40 .* knows 40 genes"),
        ({"input_ids": [6], "gene_ids": [0]}, "bins from 6 to 6; .* bins from 1 to 5"),
        ({"input_ids": [0], "gene_ids": [0]}, "give expressed genes only"),
    ],
)
def test_tokens_of_another_tokenizer_are_refused(detector, row, message) -> None:
    with pytest.raises(ValueError, match=message):
        detector.score([row])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [(slice(None, None, 2), "at least two types"), (slice(0, 12), "20 are needed. Label more cells")],
)
def test_what_cannot_be_fitted_is_refused(chosen, message) -> None:
    with pytest.raises(ValueError, match=message):
        fit(make_cells(40)[chosen].copy())


def test_a_checkpoint_without_one_gives_none(tmp_path, monkeypatch) -> None:
    assert UnknownTypeDetector.from_pretrained(tmp_path) is None

    def missing(*_):
        raise EntryNotFoundError("no such file")

    monkeypatch.setattr(unknown_types, "hf_hub_download", missing)
    assert UnknownTypeDetector.from_pretrained("someone/cells") is None


def test_one_of_the_hub_is_downloaded(detector, tmp_path, monkeypatch) -> None:
    path = detector.save(tmp_path)
    asked = []
    monkeypatch.setattr(unknown_types, "hf_hub_download", lambda *names: asked.append(names) or str(path))
    assert UnknownTypeDetector.from_pretrained("someone/cells").labels == detector.labels
    assert asked == [("someone/cells", UNKNOWN_TYPES_FILE)]


def test_a_damaged_file_and_one_of_another_kind_are_refused(detector, tmp_path) -> None:
    path = detector.save(tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"damaged .*[Rr]estore the file"):
        UnknownTypeDetector.from_pretrained(tmp_path)
    save_file({"weights": np.zeros(3)}, path, metadata={"unknown_types": '{"format": "another"}'})
    with pytest.raises(ValueError, match=r"the format 'another' and the tensors \['weights'\].*[Rr]estore"):
        UnknownTypeDetector.from_pretrained(tmp_path)


@pytest.mark.slow
def test_it_takes_little_time_beside_the_model(detector, new_cells) -> None:
    tokens = tokens_of(new_cells)
    start = time.perf_counter()
    detector.score(tokens)
    assert (time.perf_counter() - start) / new_cells.n_obs < 1e-3  # a tiny model takes several milliseconds a cell
