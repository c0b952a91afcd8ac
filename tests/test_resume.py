"""A run that is killed again and again ends as one that never was: the same history, the same weights, bit for bit."""

import json
import random
import signal

import pytest
import torch
from small_corpus import TINY_MODEL, make_cells, make_corpus
from training_processes import Change, read_run, run

from screformer.train.checkpoints import last_whole_checkpoint, mean_training_loss, remove_broken_checkpoints

STEPS_AN_EPOCH = 6
MOMENTS = ("begin", "end", "saving", "saved")
PRETRAINING = {"gradient_accumulation_steps": 2, "learning_rate": 0.01, "early_stopping_patience": 0}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), cells=make_cells(45))


def arguments(corpus, output, **options):
    given = {
        "corpus": corpus, "output_dir": output, "gene_space": "expressed", "num_train_epochs": 3, "disable_tqdm": True,
        "per_device_train_batch_size": 4, "full_determinism": True, "gene_dropout": 0.3, "logging_steps": 3,
        "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, **options,
    }  # fmt: skip
    flags = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    # Dropout on: random numbers go on where they were, too.
    return [*flags, "--use_cpu", "--config_overrides", *TINY_MODEL, "hidden_dropout_prob=0.1"]


def choose_moments(seed, last_step):
    """Return a few (moment, step) in order: at any step, or while its checkpoint is written or just was."""
    chance = random.Random(seed)
    # Apart, because every second step has a checkpoint, after which its moments do not come again.
    steps = chance.sample(range(1, last_step, 3), 3)
    moments = [(chance.choice(MOMENTS), step) for step in sorted(steps)]
    return [(moment, step + step % 2 if moment in ("saving", "saved") else step) for moment, step in moments]


def assert_equal_runs(found, expected):
    history, metrics, weights = found
    expected_history, expected_metrics, expected_weights = expected
    assert history == expected_history
    assert metrics == expected_metrics
    assert set(weights) == set(expected_weights)
    assert all(torch.equal(tensor, expected_weights[name]) for name, tensor in weights.items())


def run_with_deaths(task, given, moments):
    for moment in moments:
        assert run(task, given, change=Change(killed_at=moment)) == [-signal.SIGKILL], moment
    assert run(task, given) == [0]


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """Return an unbroken pretraining."""
    folder = tmp_path_factory.mktemp("unbroken")
    assert run("pretrain", arguments(corpus, folder / "run", **PRETRAINING)) == [0]
    return read_run(folder / "run")


@pytest.mark.parametrize(
    ("seed", "num_workers"), [(0, 2), *(pytest.param(seed, 0, marks=pytest.mark.slow) for seed in range(1, 6))]
)
def test_a_pretraining_that_is_killed_thrice_ends_as_if_it_had_not_been(corpus, unbroken, tmp_path, seed, num_workers):
    # Workers fetch ahead of their use, and may be more or fewer when a run goes on.
    given = arguments(corpus, tmp_path / "run", dataloader_num_workers=num_workers, **PRETRAINING)
    run_with_deaths("pretrain", given, choose_moments(seed, 3 * STEPS_AN_EPOCH))
    assert_equal_runs(read_run(tmp_path / "run"), unbroken)
    names = [path.name for path in (tmp_path / "run").rglob("*")]
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin")) or name.startswith("checkpoint-")]


def test_the_best_checkpoint_and_the_patience_outlive_a_fine_tuning(corpus, tmp_path):
    options = {"early_stopping_patience": 2, "learning_rate": 0.0, "gradient_accumulation_steps": 1}
    given = [arguments(corpus, tmp_path / name, **options) for name in ("unbroken", "run")]
    assert run("finetune", given[0]) == [0]
    # The second evaluation without improvement ends the run: it was killed between the two.
    run_with_deaths("finetune", given[1], [("begin", 5)])
    expected = read_run(tmp_path / "unbroken")
    assert (expected[1]["steps"], expected[1]["best_step"]) == (6, 2)
    assert_equal_runs(read_run(tmp_path / "run"), expected)


def write_checkpoint(folder, step, state):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_a_checkpoint_without_its_end_is_none(tmp_path, caplog):
    assert last_whole_checkpoint(tmp_path / "absent") is None
    whole = [write_checkpoint(tmp_path, step, json.dumps({"global_step": step})) for step in (8, 10)]
    broken = [write_checkpoint(tmp_path, 12, None), write_checkpoint(tmp_path, 14, '{"global_st')]
    (tmp_path / "checkpoint-notes").mkdir()
    assert last_whole_checkpoint(tmp_path) == str(whole[1])
    remove_broken_checkpoints(tmp_path)
    assert [path.exists() for path in (*whole, *broken)] == [True, True, False, False]
    assert (tmp_path / "checkpoint-notes").exists()
    assert caplog.text.count("was not written to its end") == 2


def test_the_training_loss_is_that_of_all_steps():
    history = [{"loss": 3.0, "step": 2}, {"eval_loss": 9.0, "step": 2}, {"loss": 1.0, "step": 5}]
    assert mean_training_loss(history) == pytest.approx((2 * 3.0 + 3 * 1.0) / 5)
    assert mean_training_loss([]) is None
