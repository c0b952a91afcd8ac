"""What a run reads: every cell once an epoch, in one order whether it was interrupted, on one process or several."""

import json
import logging
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from seeing_trainer import make_trainer
from small_corpus import TINY_MODEL, make_cells, make_corpus

from screformer.tokenization.corpus import open_corpus
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.pretrain import pretrain
from screformer.train.sampler import Shuffling

# Python 3.12 and later say this of every data loader with workers.
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"), cells=make_cells(45))


@pytest.fixture(scope="module")
def all_cells(corpus):
    """Return every cell as the text of its tokens in full space."""
    cells = []
    for row in CellDataset(open_corpus(corpus)):
        tokens = [0] * 40
        for gene, token in zip(row["gene_ids"].tolist(), row["input_ids"].tolist(), strict=True):
            tokens[gene] = token
        cells.append(str(tokens))
    assert len(set(cells)) == 45
    return sorted(cells)


def flatten(batches):
    return sorted(cell for batch in batches for cell in batch)


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_cell_is_seen_once_an_epoch_in_another_order(corpus, all_cells, tmp_path, strategy, num_workers):
    trainer = make_trainer(corpus, tmp_path, train_sampling_strategy=strategy, dataloader_num_workers=num_workers)
    trainer.train()
    assert trainer.state.global_step == 2 * 12
    first, second = trainer.seen[:12], trainer.seen[12:]
    assert flatten(first) == flatten(second) == all_cells
    assert first != second


def test_workers_do_not_change_the_order(corpus, tmp_path):
    alone, helped = (
        make_trainer(corpus, tmp_path / str(number), dataloader_num_workers=number, max_steps=12) for number in (0, 2)
    )
    alone.train()
    helped.train()
    assert alone.seen == helped.seen


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
@pytest.mark.parametrize("stop_at", [3, 9])
def test_a_run_stopped_within_an_epoch_reads_on_as_if_it_had_not_been(corpus, tmp_path, strategy, stop_at):
    # 12 batches an epoch, two a step: step 9 is in the second epoch.
    options = {"train_sampling_strategy": strategy, "gradient_accumulation_steps": 2}
    unbroken = make_trainer(corpus, tmp_path / "unbroken", **options)
    unbroken.train()
    saving = {**options, "save_strategy": "steps", "save_steps": 1}
    stopped = make_trainer(corpus, tmp_path / "stopped", stop_at=stop_at, **saving)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = make_trainer(corpus, tmp_path / "stopped", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"stopped/checkpoint-{stop_at}"))
    assert len(unbroken.seen) == 24
    assert stopped.seen == unbroken.seen[: 2 * stop_at]
    assert resumed.seen == unbroken.seen[2 * stop_at :]
    assert resumed.state.global_step == 12


def test_accumulated_batches_are_the_same_cells(corpus, tmp_path):
    single, accumulated = (
        make_trainer(corpus, tmp_path / str(steps), gradient_accumulation_steps=steps) for steps in (1, 3)
    )
    single.train()
    accumulated.train()
    assert single.seen == accumulated.seen
    assert (single.state.global_step, accumulated.state.global_step) == (24, 8)


def test_two_processes_share_the_cells(corpus, all_cells, tmp_path):
    num_batches = 6  # four cells a batch
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(TESTS / "seeing_trainer.py"), corpus, str(tmp_path)]
    command.append(json.dumps({"train_sampling_strategy": "group_by_length", "ddp_backend": "gloo"}))
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {
        "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(command, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
        for rank in "01"
    ]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    results = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in "01"]
    whole = make_trainer(corpus, tmp_path, train_sampling_strategy="group_by_length", per_device_train_batch_size=8)
    whole.train()
    together = [sorted(first + second) for first, second in zip(*(result["seen"] for result in results), strict=True)]
    # Of the last step's five cells none is left without a process.
    assert together == [sorted(batch) for batch in whole.seen]
    for epoch in range(2):
        parts = [result["seen"][epoch * num_batches : (epoch + 1) * num_batches] for result in results]
        assert flatten(parts[0] + parts[1]) == all_cells  # 45 cells, none twice
        assert {len(part) for part in parts} == {num_batches}
    assert results[0]["steps"] == results[1]["steps"] == 2 * num_batches
    assert results[0]["weights"] == results[1]["weights"]


def test_other_strategies_are_the_trainers_own(corpus, all_cells, tmp_path):
    trainer = make_trainer(corpus, tmp_path, train_sampling_strategy="sequential", max_steps=12)
    trainer.train()
    assert trainer.batch_sampler is None
    assert flatten(trainer.seen) == all_cells


def test_held_out_cells_come_by_length_where_training_groups_them(corpus, tmp_path):
    trainer = make_trainer(corpus, tmp_path, train_sampling_strategy="group_by_length")
    trainer.eval_dataset = cells = CellDataset(open_corpus(corpus))
    lengths = [int((row > 0).sum()) for batch in trainer.get_eval_dataloader() for row in batch["input_ids"]]
    assert lengths == sorted(cells.lengths.tolist(), reverse=True)
    plain = make_trainer(corpus, tmp_path)
    plain.eval_dataset = cells
    lengths = [int((row > 0).sum()) for batch in plain.get_eval_dataloader() for row in batch["input_ids"]]
    assert lengths == cells.lengths.tolist()


def test_the_share_of_padding_is_logged(corpus, tmp_path, caplog):
    data = PretrainingDataArguments(corpus=corpus)
    model = ModelArguments(config_overrides=TINY_MODEL, gene_space="expressed")
    training = PretrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=3,
        per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",
    )
    with caplog.at_level(logging.INFO, logger="screformer"):
        pretrain(model, data, training)
    (share,) = re.findall(r"([\d.]+)% of the tokens of training were padding", caplog.text)
    assert 0 < float(share) < 20


def test_the_shuffling_follows_the_arguments():
    arguments = PretrainingArguments(use_cpu=True, shuffle_block_size=2, shuffle_buffer_size=8, seed=5)
    assert arguments.shuffling == Shuffling(2, 8, 5)
    assert PretrainingArguments(use_cpu=True, data_seed=0).shuffling == Shuffling(seed=0)
    with pytest.raises(ValueError, match="block_size must be at least 1 and at most buffer_size, got 9 and 8"):
        PretrainingArguments(use_cpu=True, shuffle_block_size=9, shuffle_buffer_size=8)
