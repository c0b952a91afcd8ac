import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from small_corpus import TINY_MODEL, TYPES, make_corpus
from small_teacher import make_teacher
from transformers import set_seed

from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.corpus import open_corpus
from screformer.train.arguments import ModelArguments
from screformer.train.starting_model import starting_model

STUDENT = [*TINY_MODEL, "classifier_dropout=0"]
# One step over all 28 training cells, by plain gradient descent, whose step is the gradient.
OPTIONS = (
    "--max_steps 1 --use_cpu --disable_tqdm true --optim sgd --learning_rate 0.1 --lr_scheduler_type constant "
    "--compare_scratch"
)


def distill_in_processes(world_size, arguments, output):
    """Run the command in so many processes, and return the student's weights."""
    command = [sys.executable, "-m", "screformer.train.distill", *OPTIONS.split(), *arguments]
    command += ["--output_dir", str(output), "--per_device_train_batch_size", str(28 // world_size)]
    environments = [{**os.environ, "OMP_NUM_THREADS": "1"} for _ in range(world_size)]
    if world_size > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command += ["--ddp_backend", "gloo"]
        for rank, environment in enumerate(environments):
            environment |= {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    processes = [
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for environment in environments
    ]
    messages = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), messages
    assert list(json.loads((output / "distillation.json").read_text())["models"]) == [
        "teacher", "student", "without teacher",
    ]  # fmt: skip
    return load_file(output / "model.safetensors")


@pytest.mark.slow
def test_two_processes_take_the_step_of_one(tmp_path):
    corpus = make_corpus(tmp_path)
    names = [f"cell{number}" for number in range(48)]
    split = {"train": names[:28], "validation": names[28:36], "test": names[36:]}
    teacher = make_teacher(tmp_path / "teacher", split=split)
    arguments = ["--teacher", teacher, "--corpus", corpus, "--config_overrides", *STUDENT]
    single, shared = (distill_in_processes(number, arguments, tmp_path / str(number)) for number in (1, 2))
    set_seed(2022)
    start = starting_model(
        ScReformerForCellClassification,
        open_corpus(corpus).tokenizer(),
        ModelArguments(preset="tiny", config_overrides=STUDENT),
        label_names=TYPES,
    ).state_dict()
    moves = {name: tensor - start[name] for name, tensor in single.items() if tensor.is_floating_point()}
    largest = max(move.abs().max() for move in moves.values())
    assert largest > 1e-4
    for name in moves:
        assert torch.allclose(single[name], shared[name], atol=1e-4 * float(largest)), name
