"""What is predicted is what PyTorch allocates, and the batch that is chosen is the largest that fits."""

import re

import pytest
import torch

from screformer import ScReformerConfig
from screformer.benchmarks.memory import Case, allocated_memory, prepare
from screformer.train.memory import (
    HOARDED,
    MOST_CELLS,
    USED_SHARE,
    available_memory,
    largest_batch_size,
    predict_memory,
)

TOLERANCE = 0.15  # the contract's
NUM_GENES, NUM_TOKENS = 3000, 1100  # several groups of heads, tiles and feed-forward blocks
HEADS = ("masked_lm", "cell_classification")
GIGABYTE = 10**9


def make_config(**overrides):
    return ScReformerConfig.preset("tiny", **{"num_genes": NUM_GENES, "num_labels": 5, **overrides})


def check(config, step, *, head="masked_lm", dtype="float32", num_tokens=NUM_TOKENS, batch_size=3):
    """Compare a step, with gradients and moments of an earlier one there, as accumulation has them."""
    case = Case("tiny", num_tokens, batch_size, step, head, dtype)

    def make():
        run = prepare(case, config)
        if case.is_training:
            run.step(8, 1)
            run.optimizer.step()
        return run

    allocated = allocated_memory(make, lambda run: run.step(num_tokens, batch_size))
    training = step == "training"
    sizes = {"num_tokens": num_tokens, "batch_size": batch_size}
    predicted = predict_memory(config, **sizes, training=training, dtype=dtype, head=head)
    assert predicted.total == pytest.approx(allocated, rel=TOLERANCE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("step", ["inference", "training"])
def test_prediction_is_what_is_allocated(step, head, dtype):
    check(make_config(), step, head=head, dtype=dtype)


@pytest.mark.parametrize("step", ["inference", "training"])
@pytest.mark.parametrize(("num_tokens", "batch_size"), [(NUM_GENES, 1), (NUM_GENES, 4), (NUM_TOKENS, 20), (40, 5)])
def test_prediction_holds_for_other_lengths_and_batches(step, num_tokens, batch_size):
    check(make_config(), step, num_tokens=num_tokens, batch_size=batch_size)


@pytest.mark.parametrize("step", ["inference", "training"])
@pytest.mark.parametrize(
    "overrides",
    [
        {"attention": "exact"},
        {"attention": "exact", "reversible": False},
        {"reversible": False},
        {"reversible": False, "hidden_dropout_prob": 0.1},
        {"hidden_dropout_prob": 0.1},
        {"hashing": "cross_polytope"},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 5},
        {"num_hashes": 1, "bucket_size": 16},
        {"hidden_size": 96, "num_attention_heads": 6, "intermediate_size": 400},
    ],
)
def test_prediction_holds_for_other_shapes(step, overrides):
    check(make_config(**overrides), step)


def test_parts_add_up_and_say_which_phase_needs_most():
    config = make_config()
    estimate = predict_memory(config, num_tokens=NUM_TOKENS, batch_size=7, training=True, head="masked_lm")
    fixed = estimate.weights + estimate.gradients + estimate.optimizer + estimate.working
    assert estimate.total == fixed + 7 * estimate.activations_per_cell
    assert estimate.optimizer == 2 * estimate.gradients
    assert estimate.phase == "attention, backward"
    inference = predict_memory(config, num_tokens=NUM_TOKENS, batch_size=7, training=False, head="masked_lm")
    assert (inference.gradients, inference.optimizer) == (0, 0)
    assert inference.weights == estimate.weights
    assert inference.total < estimate.total


def test_on_a_cpu_working_memory_does_not_grow_with_the_batch():
    def working(batch_size, device_type):
        return predict_memory(
            make_config(), num_tokens=NUM_GENES, batch_size=batch_size, training=True, device_type=device_type
        ).working

    assert working(64, "cpu") == working(8, "cpu")
    assert working(64, "cuda") > 4 * working(8, "cuda")


def test_on_a_gpu_a_pretraining_step_of_the_papers_batch_needs_a_third_of_the_papers_38_gb():
    estimate = predict_memory(
        ScReformerConfig.preset("base", num_genes=17_330),
        num_tokens=17_330,
        batch_size=64,
        training=True,
        dtype="bfloat16",
        head="masked_lm",
        device_type="cuda",
    )
    assert estimate.total < 12e9


def test_reversible_layers_make_depth_almost_free():
    def per_cell(reversible, layers):
        config = make_config(reversible=reversible, num_hidden_layers=layers)
        return predict_memory(config, num_tokens=NUM_TOKENS, batch_size=8, training=True).activations_per_cell

    assert per_cell(True, 12) < 1.2 * per_cell(True, 2)
    assert per_cell(False, 12) > 5 * per_cell(False, 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_tokens": 0}, "num_tokens got 0; a cell has 1 to num_genes=3000 tokens"),
        ({"num_tokens": 3001}, "num_tokens got 3001"),
        ({"batch_size": 0}, "batch_size got 0; it must be at least 1"),
        ({"dtype": "float16"}, "dtype got 'float16'; allowed are 'float32', 'bfloat16'"),
        ({"head": "regression"}, "head got 'regression'; allowed are None, 'masked_lm', 'cell_classification'"),
        ({"head": None, "training": True}, "head got None with training=True"),
    ],
)
def test_refuses_what_it_cannot_predict(wrong, message):
    options = {"num_tokens": 10, "batch_size": 1, "training": False, **wrong}
    with pytest.raises(ValueError, match=message):
        predict_memory(make_config(), **options)


@pytest.mark.parametrize("training", [False, True])
def test_the_largest_batch_fits_and_one_cell_more_does_not(training):
    config = make_config()
    options = {"num_tokens": NUM_TOKENS, "training": training}
    available = 200_000_000
    choice = largest_batch_size(config, available=available, **options)
    assert 1 < choice.batch_size < MOST_CELLS

    def needed(batch_size):
        estimate = predict_memory(config, batch_size=batch_size, **options)
        return estimate.total - estimate.weights + HOARDED * estimate.working  # weights are loaded

    assert needed(choice.batch_size) == choice.needed <= USED_SHARE * available < needed(choice.batch_size + 1)


def test_plenty_of_memory_gives_the_most_that_is_asked_for():
    options = {"num_tokens": 10, "training": False, "available": GIGABYTE}
    assert largest_batch_size(make_config(), **options).batch_size == MOST_CELLS
    assert largest_batch_size(make_config(), most=5, **options).batch_size == 5


def test_weights_that_are_not_loaded_yet_count():
    options = {"num_tokens": NUM_TOKENS, "training": False, "available": GIGABYTE}
    loaded, unloaded = (largest_batch_size(make_config(), is_loaded=value, **options) for value in (True, False))
    assert loaded.batch_size == unloaded.batch_size == MOST_CELLS
    assert unloaded.needed - loaded.needed == loaded.estimate.weights


def test_a_choice_says_why():
    choice = largest_batch_size(make_config(), num_tokens=10, training=False, available=GIGABYTE, most=4)
    assert re.fullmatch(r"4 cells at once: they need \d\.\d MB, and 80% of the 1.00 GB free may be used", str(choice))


def test_says_what_helps_where_not_even_one_cell_fits():
    config = ScReformerConfig(reversible=False, attention="exact")
    with pytest.raises(ValueError, match="not even one cell of 17,330 tokens fits on cpu") as error:
        largest_batch_size(config, num_tokens=config.num_genes, training=True, available=GIGABYTE)
    message = str(error.value)
    assert "80% of the 1.00 GB free are 800.0 MB" in message
    for remedy in ('gene_space="expressed"', 'attention="lsh"', "reversible=True", "a smaller preset"):
        assert remedy in message
    with pytest.raises(ValueError, match="inference needs") as error:
        largest_batch_size(make_config(), num_tokens=NUM_TOKENS, training=False, available=10_000)
    assert "reversible" not in str(error.value)
    assert "expressed" not in str(error.value)


@pytest.fixture
def system(tmp_path):
    """Return a function: path -> content, written below a root that stands for that of a file system."""

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return write


MEMINFO = "MemTotal:       9000 kB\nMemFree:         500 kB\nMemAvailable:   4000 kB\n"
V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/memory"


def test_without_limits_free_memory_is_the_machines(system):
    root = system({"proc/meminfo": MEMINFO})
    assert available_memory(root=root) == 4000 * 1024
    root = system({"proc/self/cgroup": "0::/user\n", f"{V2}/user/memory.max": "max\n"})
    system({f"{V2}/user/memory.current": "5\n", f"{V2}/user/memory.stat": "inactive_file 1\n"})
    assert available_memory(root=root) == 4000 * 1024


def test_a_control_groups_limit_counts_with_its_file_cache_free(system):
    group = f"{V2}/jobs/one"
    root = system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "0::/jobs/one\n",
            f"{group}/memory.max": "max\n",
            f"{group}/memory.current": "700\n",
            f"{group}/memory.stat": "anon 500\ninactive_file 200\n",
            f"{V2}/jobs/memory.max": "10000\n",
            f"{V2}/jobs/memory.current": "7000\n",
            f"{V2}/jobs/memory.stat": "anon 5000\ninactive_file 1500\n",
        }
    )
    assert available_memory(root=root) == 10_000 - 7000 + 1500


def test_control_groups_of_the_first_version_are_read_too_also_from_within_a_container(system):
    root = system(
        {
            "proc/meminfo": MEMINFO,
            "proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/docker/abc\n0::/\n",
            f"{V1}/memory.limit_in_bytes": "9000\n",
            f"{V1}/memory.usage_in_bytes": "2000\n",
            f"{V1}/memory.stat": "inactive_file 1\ntotal_inactive_file 500\n",
        }
    )
    assert available_memory(root=root) == 9000 - 2000 + 500


def test_more_used_than_allowed_is_nothing_free(system):
    root = system({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", f"{V2}/memory.max": "10\n"})
    system({f"{V2}/memory.current": "90\n", f"{V2}/memory.stat": "inactive_file 1\n"})
    assert available_memory(root=root) == 0


def test_refuses_where_free_memory_is_not_known(system, tmp_path):
    with pytest.raises(ValueError, match=r"from /proc/meminfo, which is not here\. Give the batch size as a number"):
        available_memory(root=tmp_path)
    with pytest.raises(ValueError, match="does not say MemAvailable"):
        available_memory(root=system({"proc/meminfo": "MemFree: 1 kB\n"}))
    with pytest.raises(ValueError, match="device got 'meta'; free memory is known of 'cpu' and 'cuda'"):
        available_memory("meta")


def test_on_cuda_what_pytorch_keeps_for_new_tensors_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    assert available_memory("cuda") == 1200
