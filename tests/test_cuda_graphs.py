"""Inference by CUDA graphs: replayed on a GPU, called on a CPU and where nothing can be recorded."""

import logging

import pytest
import torch

from screformer.configuration_screformer import ScReformerConfig
from screformer.modeling_screformer import ScReformerModel
from screformer.train import cuda_graphs
from screformer.train.cuda_graphs import MOST_SHAPES, GraphedForward, Recording

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return ScReformerModel(ScReformerConfig.preset("tiny", num_genes=60)).to(DEVICE).eval()


def cells(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 6, (number, 60), generator=generator).to(DEVICE)}


@torch.inference_mode()
def test_it_gives_what_the_model_gives(model):
    forward = GraphedForward(model, "cell_embedding")
    kept = [(number, seed, forward(cells(number, seed))) for number, seed in ((2, 0), (3, 1), (2, 2), (2, 3))]
    for number, seed, found in kept:  # also when later ones were computed
        torch.testing.assert_close(found, model(**cells(number, seed)).cell_embedding)
    assert len(forward._recordings) == (2 if DEVICE == "cuda" else 0)


class StandIn:
    """What a graph does: the same computation again, on and into the same tensors."""

    def __init__(self, compute, output):
        self.compute, self.output, self.replays = compute, output, 0

    def replay(self):
        self.replays += 1
        self.output.copy_(self.compute())


@pytest.fixture
def recorded(monkeypatch):
    """Record without a GPU; return the shapes that were recorded."""
    shapes = []

    def record(compute, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))
        output = compute()
        return Recording(StandIn(compute, output), inputs, output)

    monkeypatch.setattr(cuda_graphs, "record", record)
    monkeypatch.setattr(cuda_graphs, "is_on_gpu", lambda batch: True)
    return shapes


@torch.inference_mode()
def test_each_shape_is_recorded_once_and_its_results_are_kept(model, recorded):
    forward = GraphedForward(model, "cell_embedding")
    first, second = forward(cells(2, 0)), forward(cells(2, 1))
    torch.testing.assert_close(first, model(**cells(2, 0)).cell_embedding)
    torch.testing.assert_close(second, model(**cells(2, 1)).cell_embedding)
    for number in range(3, 3 + MOST_SHAPES):
        forward(cells(number))
    assert recorded == [(number, 60) for number in range(2, 2 + MOST_SHAPES)]
    torch.testing.assert_close(forward(cells(9)), model(**cells(9)).cell_embedding)
    assert [each.graph.replays for each in forward._recordings.values()] == [2, 1, 1, 1]


@torch.inference_mode()
def test_what_cannot_be_recorded_is_computed_and_said_once(model, monkeypatch, caplog):
    def fails(compute, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(cuda_graphs, "record", fails)
    monkeypatch.setattr(cuda_graphs, "is_on_gpu", lambda batch: True)
    forward = GraphedForward(model, "cell_embedding")
    with caplog.at_level(logging.WARNING):
        for seed in range(3):
            torch.testing.assert_close(forward(cells(2, seed)), model(**cells(2, seed)).cell_embedding)
    assert [record.message for record in caplog.records] == [
        "inference runs without CUDA graphs: operation not permitted when stream is capturing"
    ]


@torch.inference_mode()
def test_while_a_graph_is_recorded_no_number_is_looked_at(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.Tensor, "__int__", lambda self: pytest.fail("waits for the device"))
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: pytest.fail("waits for the device"))
    assert model._check_inputs(cells(2)["input_ids"], None, None, None) == (2, 60)
    gene_ids = torch.arange(60).expand(2, -1).to(DEVICE)
    assert model._vocabulary_order(gene_ids, None) is not None
