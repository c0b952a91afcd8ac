import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_corpus import make_corpus
from small_teacher import make_teacher

from screformer.modeling_screformer import ScReformerForMaskedLM
from screformer.tokenization.corpus import open_corpus
from screformer.train import teacher_logits as teacher_logits_module
from screformer.train.cell_dataset import CellDataset
from screformer.train.collator import CellCollator
from screformer.train.teacher_logits import TeacherLogits, describe_teacher, load_teacher

ROWS = np.array([40, 3, 7, 8, 9, 11, 12, 20, 21, 30, 31, 33, 2])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(make_corpus(tmp_path_factory.mktemp("corpus")))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return make_teacher(tmp_path_factory.mktemp("model") / "teacher")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(teacher_logits_module, "CELLS_PER_PART", 4)


def open_logits(folder, corpus, teacher, rows=ROWS, gene_space=None):
    model = load_teacher(teacher, corpus)
    return model, TeacherLogits(folder, corpus, rows, describe_teacher(model, teacher, gene_space))


@pytest.mark.parametrize("gene_space", [None, "full", "expressed"])
def test_cached_logits_equal_fresh_ones(corpus, teacher, tmp_path, gene_space):
    model, logits = open_logits(tmp_path, corpus, teacher, gene_space=gene_space)
    model.train()  # dropout must be off all the same
    assert logits.fill(model, batch_size=3, progress=False) == logits.num_parts == 4
    collator = CellCollator.from_config(model.config, gene_space=gene_space or model.config.gene_space)
    model.eval()
    cells = CellDataset(corpus)
    fresh = torch.cat([model(**collator([cells[row]])).logits for row in ROWS.tolist()]).numpy()
    assert fresh.std(axis=0).min() > 0.01  # else any cell's would do
    # Batches of another size sum in another order.
    assert np.allclose(logits.of(ROWS), fresh, atol=1e-4)
    assert np.array_equal(logits.of(ROWS[::-1]), logits.of(ROWS)[::-1])


def test_an_interrupted_teacher_goes_on_with_the_next_part(corpus, teacher, tmp_path, monkeypatch):
    model, whole = open_logits(tmp_path / "whole", corpus, teacher)
    whole.fill(model, batch_size=4, progress=False)
    _, logits = open_logits(tmp_path / "broken", corpus, teacher)
    write = TeacherLogits._write

    def fail(self, number, values):
        if number == 2:
            raise KeyboardInterrupt
        write(self, number, values)

    monkeypatch.setattr(TeacherLogits, "_write", fail)
    with pytest.raises(KeyboardInterrupt):
        logits.fill(model, batch_size=4, progress=False)
    monkeypatch.undo()
    monkeypatch.setattr(teacher_logits_module, "CELLS_PER_PART", 4)
    _, again = open_logits(tmp_path / "broken", corpus, teacher)
    with pytest.raises(ValueError, match=r"part-0000[23].arrow is missing, or not this teacher's; call fill"):
        again.of(ROWS)
    assert again.fill(model, batch_size=4, progress=False) == 2
    assert again.fill(model, batch_size=4, progress=False) == 0
    assert np.array_equal(again.of(ROWS), whole.of(ROWS))


def test_a_damaged_part_is_computed_anew(corpus, teacher, tmp_path):
    model, logits = open_logits(tmp_path, corpus, teacher)
    logits.fill(model, batch_size=4, progress=False)
    before = logits.of(ROWS).copy()
    part = tmp_path / "part-00001.arrow"
    part.write_bytes(part.read_bytes()[:100])
    _, again = open_logits(tmp_path, corpus, teacher)
    assert again.fill(model, batch_size=4, progress=False) == 1
    assert np.array_equal(again.of(ROWS), before)


def test_logits_of_other_weights_cells_or_layout_are_not_taken(corpus, tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    model, logits = open_logits(tmp_path / "cache", corpus, teacher)
    logits.fill(model, batch_size=4, progress=False)
    before = logits.of(ROWS).copy()
    for rows, gene_space in ((ROWS[:-1], None), (ROWS, "expressed")):
        _, other = open_logits(tmp_path / "cache", corpus, teacher, rows=rows, gene_space=gene_space)
        assert not any(other._is_done(number) for number in range(other.num_parts))
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    weights["classifier.convolution_path.output.bias"] += 1
    save_file(weights, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
    model, changed = open_logits(tmp_path / "cache", corpus, teacher)
    assert changed.fill(model, batch_size=4, progress=False) == 4
    assert np.allclose(changed.of(ROWS), before + 1, atol=1e-5)


def test_a_teacher_that_moved_is_the_same(corpus, tmp_path):
    teacher = make_teacher(tmp_path / "teacher")
    model, logits = open_logits(tmp_path / "cache", corpus, teacher)
    logits.fill(model, batch_size=4, progress=False)
    (tmp_path / "teacher").rename(tmp_path / "moved")
    model, again = open_logits(tmp_path / "cache", corpus, str(tmp_path / "moved"))
    assert again.fill(model, batch_size=4, progress=False) == 0


def test_processes_share_the_parts(corpus, teacher, tmp_path):
    model, logits = open_logits(tmp_path, corpus, teacher)
    assert [logits.fill(model, batch_size=4, rank=rank, world_size=3, progress=False) for rank in range(3)] == [2, 1, 1]
    assert logits.of(ROWS).shape == (13, 2)


def test_a_copy_in_a_workers_process_reads_the_files_again(corpus, teacher, tmp_path):
    model, logits = open_logits(tmp_path, corpus, teacher)
    logits.fill(model, batch_size=4, progress=False)
    expected = logits.of(ROWS)
    assert np.array_equal(pickle.loads(pickle.dumps(logits)).of(ROWS), expected)


def test_weights_in_several_files_are_hashed_as_they_are_loaded(corpus, tmp_path):
    facts = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        teacher = make_teacher(tmp_path / name, seed=seed)
        model = load_teacher(teacher, corpus)
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")
        (tmp_path / name / "model.safetensors").unlink(missing_ok=True)
        facts.append(describe_teacher(model, teacher, None)["weights_sha256"])
    assert facts[0] == facts[1] != facts[2]


def test_refuses_a_teacher_that_does_not_classify(corpus, teacher, tmp_path):
    ScReformerForMaskedLM.from_pretrained(teacher).save_pretrained(tmp_path / "pretrained")
    with pytest.raises(ValueError, match=r"is a ScReformerForMaskedLM with 2 labels; a classifier of at least two"):
        load_teacher(str(tmp_path / "pretrained"), corpus)


def test_refuses_a_teacher_with_another_tokenizer(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"was trained with tokenizer .*, but the corpus was made with"):
        load_teacher(make_teacher(tmp_path / "foreign", num_bins=8), corpus)
