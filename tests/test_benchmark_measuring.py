import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from screformer.benchmarks import measuring
from screformer.benchmarks.measuring import (
    CannotRunError,
    Shape,
    Workload,
    fit_exponent,
    make_call,
    memory_in_new_process,
    peak_memory,
    time_in_turn,
)
from screformer.benchmarks.rivals import exact_attention, performer_attention

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux's /proc")
LIMITS = {"memory_limit": 8.0, "time_limit": 120.0}


def test_a_known_exponent_is_found_again():
    lengths = [1000, 2000, 5000, 64_000]
    assert fit_exponent(lengths, [3e-7 * length**1.7 for length in lengths]) == pytest.approx(1.7, abs=1e-9)
    assert fit_exponent(lengths, [0.5] * 4) == pytest.approx(0, abs=1e-9)
    assert fit_exponent([1000, 1000], [1.0, 2.0]) is None
    assert fit_exponent([], []) is None


@needs_linux
def test_the_peak_memory_of_a_known_tensor_is_its_size():
    num_bytes = 80_000_000

    def call():
        torch.ones(num_bytes // 4)  # freed again before the call ends

    assert peak_memory(call) == pytest.approx(num_bytes, rel=0.1)
    assert peak_memory(lambda: None) < 0.1 * num_bytes


@needs_linux
def test_memory_in_a_new_process_counts_the_output_and_not_the_inputs():
    shape = Shape(64, batch_size=2048)  # short sequences: nearly all memory is inputs and output
    use = memory_in_new_process(exact_attention, shape, "forward", **LIMITS)
    output_bytes = 4 * shape.length * shape.batch_size * shape.hidden_size
    # PyTorch lays the output out so that merging its heads needs no copy; the inputs would be another two.
    assert use.peak_bytes == pytest.approx(output_bytes, rel=0.1)
    assert use.parameter_gradient_bytes == 0
    assert use.seconds > 0


@needs_linux
@pytest.mark.skipif(find_spec("performer_pytorch") is None, reason="needs performer-pytorch")
def test_a_call_above_the_memory_limit_is_stopped_with_the_limit_in_the_reason():
    with pytest.raises(CannotRunError, match=r"needs more than 0\.001 GB"):
        memory_in_new_process(performer_attention, Shape(4096), "forward", memory_limit=0.001, time_limit=120.0)


def test_a_process_that_takes_too_long_is_ended():
    with pytest.raises(CannotRunError, match=r"no result within 0\.01 s"):
        memory_in_new_process(exact_attention, Shape(64), "forward", memory_limit=8.0, time_limit=0.01)


@pytest.mark.parametrize(
    ("return_code", "error_text", "reason"),
    [
        (-9, "", "ended by signal 9"),
        (1, "Traceback\nImportError: install this", "ImportError: install this"),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory: you tried", "needs more than 8 GB"),
        (1, "", "failed without a message"),
    ],
)
def test_the_reason_of_a_failed_process_is_one_line(monkeypatch, return_code, error_text, reason):
    done = subprocess.CompletedProcess([], return_code, stdout="", stderr=error_text)
    monkeypatch.setattr(measuring.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(CannotRunError, match=reason):
        memory_in_new_process(exact_attention, Shape(64), "forward", **LIMITS)


def test_systems_without_clear_refs_are_named(monkeypatch):
    monkeypatch.setattr(measuring.Path, "exists", lambda _: False)
    with pytest.raises(OSError, match="needs Linux"):
        peak_memory(lambda: None)


def test_calls_are_timed_in_turn_after_one_round_to_warm_up():
    order = []
    seconds = time_in_turn({name: lambda name=name: order.append(name) for name in "ab"}, repeats=2)
    assert order == ["a", "b"] * 3
    assert [len(seconds[name]) for name in "ab"] == [2, 2]


def test_the_training_step_makes_the_gradients_of_inputs_and_parameters():
    module = torch.nn.Linear(3, 2, bias=False)
    states, gradient = torch.randn(5, 3), torch.randn(5, 2)
    workload = Workload(lambda: module(states), (states,), gradient, module)
    make_call(workload, "forward")()
    assert states.grad is None
    assert not module.training
    call = make_call(workload, "training")
    call(), call()  # gradients do not add up
    assert module.training
    torch.testing.assert_close(module.weight.grad, gradient.T @ states)
    torch.testing.assert_close(states.grad, gradient @ module.weight)
