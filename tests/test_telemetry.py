"""What a run counts of itself: cells, tokens, time and memory, whatever interrupts it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_corpus import TINY_MODEL, make_corpus
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from screformer.tokenization.corpus import open_corpus
from screformer.train import pretrain as pretrain_module
from screformer.train import process_memory, telemetry, training_run
from screformer.train.arguments import ModelArguments, PretrainingArguments, PretrainingDataArguments
from screformer.train.cell_dataset import CellDataset
from screformer.train.pretrain import main, pretrain
from screformer.train.resources import describe_resources, resource_table
from screformer.train.telemetry import (
    FewStepsWarner,
    HistoryWriter,
    TrainingBar,
    TrainingTelemetry,
    Usage,
    peak_device_memory,
)
from screformer.train.training_run import early_stopping

MODEL = ModelArguments(config_overrides=TINY_MODEL, gene_space="expressed")
NUM_TRAINING_CELLS = 43  # of 48, a tenth held out


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def settings(output, **overrides):
    defaults = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
                "logging_steps": 2, "disable_tqdm": True}  # fmt: skip
    return PretrainingArguments(output_dir=str(output), use_cpu=True, **{**defaults, **overrides})


def read(folder, name):
    return json.loads((Path(folder) / name).read_text())


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "pretrained"
    return pretrain(MODEL, PretrainingDataArguments(corpus=corpus), settings(output))


def num_training_tokens(corpus):
    rows = pretrain_module._split_cells(open_corpus(corpus), PretrainingDataArguments(corpus=corpus), 2022)[0]
    assert len(rows) == NUM_TRAINING_CELLS
    return int(CellDataset(open_corpus(corpus), rows).lengths.sum())


def test_every_cell_and_token_of_every_epoch_is_counted_and_no_padding(finished, corpus):
    resources = read(finished.output_dir, "resources.json")
    assert resources["cells"] == 3 * NUM_TRAINING_CELLS
    assert resources["tokens"] == 3 * num_training_tokens(corpus)
    assert resources["cells_per_second"] == pytest.approx(resources["cells"] / resources["seconds_in_steps"])
    assert resources["tokens_per_second"] == pytest.approx(resources["tokens"] / resources["seconds_in_steps"])
    # Three evaluations and three checkpoints took the rest.
    assert 0 < resources["seconds_in_steps"] < resources["seconds"]
    assert resources["seconds"] == finished.metrics["training_seconds"]
    assert (resources["epochs"], resources["sessions"]) == (3, 1)


def test_in_the_full_gene_space_every_gene_is_a_token(corpus, tmp_path):
    model = ModelArguments(config_overrides=TINY_MODEL, gene_space="full")
    result = pretrain(model, PretrainingDataArguments(corpus=corpus), settings(tmp_path, num_train_epochs=1))
    assert read(result.output_dir, "resources.json")["tokens"] == 40 * NUM_TRAINING_CELLS


def test_speed_and_memory_stand_beside_every_training_loss(finished):
    history = read(finished.output_dir, "log_history.json")
    names = {"cells_per_second", "tokens_per_second", "peak_memory_gb"}
    steps = [entry for entry in history if "loss" in entry]
    assert len(steps) >= 8
    assert all(names <= entry.keys() and min(entry[name] for name in names) > 0 for entry in steps)
    assert all("peak_gpu_memory_gb" not in entry for entry in steps)
    assert not any(names & entry.keys() for entry in history if "eval_loss" in entry)


class Interrupt(TrainerCallback):
    def on_epoch_begin(self, args, state, control, **kwargs):
        if state.epoch >= 2:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(corpus, tmp_path, monkeypatch):
    """Return the folder of a run that was stopped after two of three epochs."""
    with monkeypatch.context() as patch:
        patch.setattr(pretrain_module, "early_stopping", lambda training: [*early_stopping(training), Interrupt()])
        with pytest.raises(KeyboardInterrupt):
            pretrain(MODEL, PretrainingDataArguments(corpus=corpus), settings(tmp_path))
    return tmp_path


def trainer_state(folder):
    (path,) = folder.glob("checkpoint-*/trainer_state.json")
    return path


def test_an_interrupted_run_leaves_its_history_and_curves(interrupted):
    history = read(interrupted, "log_history.json")
    assert [entry["epoch"] for entry in history if "eval_loss" in entry] == [1, 2]
    assert {"loss", "learning_rate", "cells_per_second"} <= history[0].keys()
    assert (interrupted / "training_curves.png").stat().st_size > 0
    assert not (interrupted / "resources.json").exists()


def test_a_resumed_run_adds_its_time_and_cells_to_those_before(interrupted, corpus):
    before = json.loads(trainer_state(interrupted).read_text())["stateful_callbacks"]["TrainingTelemetry"]
    earlier = Usage(**before["attributes"]["earlier"])
    assert (earlier.num_cells, earlier.num_sessions) == (2 * NUM_TRAINING_CELLS, 1)
    earlier.seconds += 1000  # as if it had taken so long
    earlier.seconds_in_steps += 100
    edit_state(interrupted, earlier=vars(earlier))
    result = pretrain(MODEL, PretrainingDataArguments(corpus=corpus), settings(interrupted))
    resources = read(interrupted, "resources.json")
    assert resources["cells"] == 3 * NUM_TRAINING_CELLS
    assert resources["tokens"] == 3 * num_training_tokens(corpus)
    assert resources["sessions"] == 2
    assert earlier.seconds < resources["seconds"] < earlier.seconds + 100
    assert earlier.seconds_in_steps < resources["seconds_in_steps"] < earlier.seconds_in_steps + 100
    assert result.metrics["training_seconds"] == resources["seconds"]
    # What is logged is the speed of now, not of all sessions.
    history = read(interrupted, "log_history.json")
    assert [entry["epoch"] for entry in history if "eval_loss" in entry] == [1, 2, 3]
    assert history[-3]["cells_per_second"] > 2 * resources["cells_per_second"]


def edit_state(folder, earlier=None):
    """Set what a checkpoint says of earlier sessions; None: it is of a release that did not count."""
    path = trainer_state(folder)
    state = json.loads(path.read_text())
    if earlier is None:
        del state["stateful_callbacks"]["TrainingTelemetry"]
    else:
        state["stateful_callbacks"]["TrainingTelemetry"]["attributes"]["earlier"] = earlier
    path.write_text(json.dumps(state))


def test_a_checkpoint_of_a_release_that_did_not_count_is_resumed(interrupted, corpus):
    edit_state(interrupted)
    pretrain(MODEL, PretrainingDataArguments(corpus=corpus), settings(interrupted))
    assert read(interrupted, "resources.json")["cells"] == NUM_TRAINING_CELLS


class Clock:
    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(telemetry, "time", clock)
    return clock


def cells_of(*lengths):
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {"input_ids": mask.long(), "attention_mask": mask.long()}


def test_speed_is_that_of_the_steps_and_time_is_all_of_it(clock):
    counter, control = TrainingTelemetry(), TrainerControl()
    arguments = SimpleNamespace(device=torch.device("cpu"), eval_on_start=False)

    def call(name, **flags):
        vars(control).update({"should_log": False, "should_evaluate": False, "should_save": False, **flags})
        getattr(counter, name)(arguments, TrainerState(), control)

    call("on_train_begin")
    counter.count(cells_of(3, 5))
    clock.now = 2
    call("on_step_end", should_log=True)
    assert counter.numbers_to_log()["cells_per_second"] == 1
    counter.count(cells_of(2, 2, 2, 6))
    clock.now = 4
    call("on_step_end", should_log=True, should_evaluate=True, should_save=True)
    assert counter.numbers_to_log() | {"peak_memory_gb": 0} == {
        "cells_per_second": 2, "tokens_per_second": 6, "peak_memory_gb": 0
    }  # fmt: skip
    clock.now = 14  # the evaluation
    call("on_evaluate", should_save=True)
    clock.now = 34  # the checkpoint
    saved = counter.state()["attributes"]["earlier"]
    call("on_save")
    counter.count(cells_of(1))
    clock.now = 36
    call("on_train_end")
    clock.now = 99  # the last evaluation is not of the training
    call("on_evaluate")
    usage = counter.usage()
    assert (usage.seconds, usage.seconds_in_steps, usage.num_cells, usage.num_tokens) == (36, 6, 7, 21)
    assert (usage.cells_per_second, usage.num_sessions) == (7 / 6, 1)
    assert (saved["seconds"], saved["seconds_in_steps"], saved["num_cells"]) == (34, 4, 6)
    assert Usage().cells_per_second is None


def test_several_processes_are_summed_and_the_largest_peak_is_taken(monkeypatch):
    counter = TrainingTelemetry()
    counter.count(cells_of(3, 4))
    other = [5, 100, 10**15, 3]
    monkeypatch.setattr(telemetry, "gather", lambda own: torch.cat([own, torch.tensor([other])]))
    counter._meet(torch.device("cpu"))
    usage = counter.usage()
    assert (usage.num_cells, usage.num_tokens) == (7, 107)
    assert (usage.peak_process_bytes, usage.peak_device_bytes) == (10**15, 3)


def test_the_memory_of_a_gpu_is_asked_for_only_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 123)
    assert peak_device_memory(torch.device("cuda")) == 123
    assert peak_device_memory(torch.device("cpu")) == 0


def test_the_peak_of_a_process_is_measured_and_can_begin_anew():
    before = process_memory.peak_process_memory()
    held = np.ones(200_000_000, dtype=np.uint8)
    peak = process_memory.peak_process_memory()
    assert peak >= before
    del held
    if not process_memory.forget_peak():
        pytest.skip("this system does not let a process forget its peak")
    assert process_memory.peak_process_memory() < peak - 100_000_000


def test_without_proc_the_system_is_asked_for_the_peak(monkeypatch, tmp_path):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(process_memory, "PROCESS", tmp_path / "absent")
    known = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    assert process_memory.peak_process_memory() == pytest.approx(known, rel=0.1)
    assert not process_memory.forget_peak()
    monkeypatch.setitem(sys.modules, "resource", None)  # as on Windows
    assert process_memory.peak_process_memory() == 0


def test_curves_are_drawn_seldom_and_the_history_is_written_always(clock, monkeypatch, tmp_path):
    drawn = []

    def draw(history, path, **options):
        drawn.append(len(history))
        clock.now += 1

    monkeypatch.setattr(telemetry, "plot_training_curves", draw)
    writer, state = HistoryWriter(tmp_path, title="Pretraining", scores=()), TrainerState(is_world_process_zero=True)
    writer.on_evaluate(None, state, None)  # before the training
    assert not list(tmp_path.iterdir())
    writer.on_train_begin(None, state, None)
    for number, now in enumerate((10, 20, 40), start=1):
        clock.now = now
        state.log_history.append({"eval_loss": float("nan"), "epoch": number})
        writer.on_evaluate(None, state, None)
        assert len(read(tmp_path, "log_history.json")) == number
    assert read(tmp_path, "log_history.json")[0] == {"eval_loss": None, "epoch": 1}
    assert drawn == [1, 3]
    writer.on_train_end(None, state, None)
    state.log_history.append({"eval_loss": 1.0, "epoch": 3})
    writer.on_evaluate(None, state, None)
    assert len(read(tmp_path, "log_history.json")) == 3


def test_the_bar_shows_speed_and_a_line_only_for_an_evaluation(corpus, tmp_path, capfd):
    pretrain(MODEL, PretrainingDataArguments(corpus=corpus), settings(tmp_path, logging_steps=1, disable_tqdm=False))
    shown = capfd.readouterr()
    assert "cells/s=" in shown.err
    assert "tokens/s=" in shown.err
    lines = [line for line in (shown.out + shown.err).replace("\r", "\n").splitlines() if "held-out loss" in line]
    assert len(lines) == 3
    assert "epoch 3: held-out loss" in lines[-1]
    assert "gene majority accuracy" in lines[-1]
    assert "grad_norm" not in shown.out + shown.err


def test_a_bar_that_has_no_training_shows_nothing():
    TrainingBar().on_log(None, None, None, {"loss": 1.0})


def test_tensorboard_gets_losses_speed_and_memory(corpus, tmp_path):
    flags = ["--corpus", corpus, "--config_overrides", *TINY_MODEL, "--gene_space", "expressed", "--num_train_epochs",
             "1", "--output_dir", str(tmp_path), "--use_cpu", "--disable_tqdm", "True", "--logging_steps", "1",
             "--per_device_train_batch_size", "16", "--report_to", "tensorboard"]  # fmt: skip
    main(flags)
    (folder,) = (tmp_path / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/cells_per_second", "train/peak_memory_gb", "train/learning_rate"} <= tags
    assert {"eval/loss", "eval/masked_accuracy", "eval/gene_majority_accuracy"} <= tags
    assert [event.step for event in events.Scalars("train/cells_per_second")] == [1, 2, 3]
    (tmp_path / "runs" / "notes.txt").write_text("mine")
    training_run._remove_run(tmp_path)
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    results = {"log_history.json", "training_curves.png", "resources.json", "resources.md", "masked_genes.png"}
    assert not left & (results | {"metrics.json", "training.json"})
    assert not [name for name in left if "tfevents" in name]
    assert "notes.txt" in left


@pytest.mark.parametrize(
    ("name", "remedy"), [("tensorboard", r"pip install 'screformer\[tensorboard\]'"), ("trackio", "install trackio")]
)
def test_a_reporter_that_is_not_installed_is_named_with_its_remedy(corpus, tmp_path, monkeypatch, name, remedy):
    monkeypatch.setattr(telemetry, "get_available_reporting_integrations", lambda: ["wandb"])
    output = tmp_path / "run"
    with pytest.raises(SystemExit, match=rf"error: report_to=\['{name}'\]: .* is not installed; .*{remedy}"):
        main(["--corpus", corpus, "--output_dir", str(output), "--use_cpu", "--report_to", name])
    assert not output.exists()


def test_the_table_is_the_papers_first_with_its_own_column_named(finished):
    resources = read(finished.output_dir, "resources.json")
    text = (finished.output_dir / "resources.md").read_text()
    assert text == resource_table(resources)
    assert resources["cells_per_step"] == {"per_device": 4, "accumulation": 2, "devices": 1, "total": 8}
    assert resources["device"]["type"] == "cpu"
    assert resources["device"]["name"] in text
    assert resources["precision"] == "float32"
    assert resources["peak_memory_gb"]["process"] > 0.05
    assert resources["peak_memory_gb"]["gpu"] is None
    assert "| | This run | The paper's (table 1) |" in text
    assert "| 4 x 2 x 1 = 8 | 64 a device |" in text
    assert "| Peak memory of a GPU, GB | - | 38 |" in text
    assert "| Cells trained on | 129 | 750,000,000 |" in text
    assert "on its A100s" in text
    # PAPER.md's reading of the table: 326 cells a second and GPU.
    assert round(resources["paper"]["cells_per_second_and_device"]) == 326


def fake_trainer(**options):
    device = torch.device("cpu")
    arguments = {"device": device, "world_size": 2, "n_gpu": 0, "per_device_train_batch_size": 6,
                 "gradient_accumulation_steps": 60, "bf16": True, "fp16": False}  # fmt: skip
    return SimpleNamespace(
        args=SimpleNamespace(**{**arguments, **options}),
        telemetry=SimpleNamespace(usage=lambda: Usage(num_sessions=1)),
        model=torch.nn.Linear(3, 2),
        state=SimpleNamespace(epoch=0, global_step=0),
    )


def test_fine_tuning_has_the_papers_row_and_other_tasks_have_none():
    tuning = describe_resources(fake_trainer(), task="fine-tuning")
    assert round(tuning["paper"]["cells_per_second_and_device"]) == 51
    assert tuning["cells_per_step"]["total"] == 6 * 60 * 2
    assert (tuning["precision"], tuning["parameters"]) == ("bf16 with float32 weights", 8)
    other = describe_resources(fake_trainer(fp16=True, bf16=False), task="distillation")
    assert other["paper"] is None
    text = resource_table(other)
    assert "# What distillation took" in text
    assert "A100" not in text
    assert "| Cells a second | - |" in text  # nothing was trained, and nothing is made up
    assert other["precision"] == "fp16 with float32 weights"


def test_a_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A graphics card")
    trainer = fake_trainer(device=torch.device("cuda"), world_size=1, n_gpu=1)
    trainer.telemetry = SimpleNamespace(usage=lambda: Usage(peak_device_bytes=38 * 10**9, num_sessions=1))
    resources = describe_resources(trainer, task="pretraining")
    assert resources["device"] == {"type": "cuda", "name": "A graphics card", "number": 1}
    assert resources["peak_memory_gb"]["gpu"] == 38
    assert "| Device | 1 x A graphics card | 4 x NVIDIA A100 |" in resource_table(resources)


@pytest.mark.slow
def test_two_processes_count_and_score_like_one(corpus, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--corpus", corpus, "--config_overrides", *TINY_MODEL, "--gene_space", "expressed", "--use_cpu",
             "--held_out_fraction", "0.3", "--masked_fraction", "0.4", "--num_train_epochs", "2", "--disable_tqdm",
             "True", "--learning_rate", "0", "--per_device_eval_batch_size", "4"]  # fmt: skip
    command = [sys.executable, "-m", "screformer.train.pretrain", *flags, "--ddp_backend", "gloo"]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [*command, "--output_dir", str(tmp_path / "two")],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    messages = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], messages
    main([*flags, "--output_dir", str(tmp_path / "one")])
    one, two = (read(tmp_path / name, "metrics.json") for name in ("one", "two"))
    names = [name for name in one if name.startswith("held_out_") and name not in ("held_out_by_bin", "held_out_loss")]
    assert len(names) == 9
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-5)
    assert [row["num_masked_genes"] for row in two["held_out_by_bin"]] == [
        row["num_masked_genes"] for row in one["held_out_by_bin"]
    ]
    resources = read(tmp_path / "two", "resources.json")
    assert resources["cells"] == read(tmp_path / "one", "resources.json")["cells"]
    assert resources["tokens"] == read(tmp_path / "one", "resources.json")["tokens"]
    assert resources["cells_per_step"]["devices"] == 2


@pytest.mark.parametrize(("steps", "asked", "is_told"), [(15, -1, True), (15, 15, False), (92, -1, False)])
def test_hardly_any_steps_are_told_unless_they_were_asked_for(steps, asked, is_told, caplog, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), max_steps=asked, use_cpu=True)
    state = TrainerState(max_steps=steps)
    with caplog.at_level("WARNING", logger="screformer"):
        FewStepsWarner().on_train_begin(arguments, state, TrainerControl())
    assert ("the training has 15 optimizer steps, of 1 x 8 cells each" in caplog.text) == is_told
