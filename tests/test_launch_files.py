"""The files for launchers that come with the package say what their readers understand, and launch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from accelerate.utils.launch import prepare_multi_gpu_env
from small_corpus import TINY_MODEL, make_corpus
from torch.distributed.fsdp import StateDictType
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

import screformer.train
from screformer.train.arguments import PretrainingArguments

FOLDER = Path(screformer.train.__file__).parent
FSDP_FILE, DEEPSPEED_FILE = FOLDER / "accelerate_fsdp2.yaml", FOLDER / "deepspeed_zero2.json"


class TrainersConfig(HfTrainerDeepSpeedConfig, HfDeepSpeedConfig):
    """The Trainer's reader of DeepSpeed files, which without DeepSpeed lacks its base."""


def values_of(tree):
    for value in tree.values():
        yield from values_of(value) if isinstance(value, dict) else [value]


def test_the_trainer_fills_in_the_deepspeed_file_from_its_arguments(monkeypatch):
    # Reading the file takes nothing of DeepSpeed, which need not be there.
    monkeypatch.setattr("transformers.integrations.deepspeed.dep_version_check", lambda name: None)
    config = TrainersConfig(json.loads(DEEPSPEED_FILE.read_text()))
    assert config.is_zero2()
    training = PretrainingArguments(use_cpu=True, bf16=True, learning_rate=3e-4, per_device_train_batch_size=8)
    config.trainer_config_process(training)
    config.trainer_config_finalize(training, None, 100)
    assert "auto" not in list(values_of(config.config))
    assert config.config["optimizer"]["params"]["lr"] == 3e-4
    assert config.config["bf16"]["enabled"] is True
    assert config.config["fp16"]["enabled"] is False
    assert config.config["train_micro_batch_size_per_gpu"] == 8


def test_accelerate_reads_its_file_as_fsdp2_of_the_whole_model(monkeypatch):
    assert load_config_from_file(str(FSDP_FILE)).distributed_type == "FSDP"
    program = ["-m", "screformer.train.pretrain"]
    given = launch_command_parser().parse_args(["--config_file", str(FSDP_FILE), *program])
    arguments, _, _ = _validate_launch_command(given)
    assert arguments.use_fsdp
    for name, value in prepare_multi_gpu_env(arguments).items():
        if "FSDP" in name:
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.auto_wrap_policy is None
    assert plugin.state_dict_type == StateDictType.FULL_STATE_DICT
    assert plugin.reshard_after_forward is True


def launchers(port):
    python = [sys.executable, "-m"]
    accelerate = [*python, "accelerate.commands.launch", "--main_process_port", str(port)]
    return {
        "torchrun": [*python, "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)],
        # On processors accelerate runs DistributedDataParallel instead of FSDP, see training_processes.py.
        "accelerate": [*accelerate, "--config_file", str(FSDP_FILE)],
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchrun", "accelerate"])
def test_launchers_run_two_processes(tmp_path, name):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    corpus = make_corpus(tmp_path)
    command = [*launchers(port)[name], "-m", "screformer.train.pretrain", "--corpus", corpus, "--use_cpu"]
    command += ["--config_overrides", *TINY_MODEL, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/training.json").read_text())
    assert (record["state"], record["num_processes"]) == ("finished", 2)
