import os

# Before any Hugging Face import: tests never read the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import pytest
import torch
from transformers_suite import suite_marks

# Before Triton is imported: without a GPU its kernels are tested by its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

NUM_GENES = 60


def pytest_configure(config):
    """Make the marks of transformers' own tests known, where they run."""
    for name in suite_marks():
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


@pytest.fixture
def tiny_config():
    """Return a function: overrides -> a configuration of 2 layers, 60 genes, several buckets a cell."""
    from screformer import ScReformerConfig

    def make(**overrides):
        defaults = {
            "num_genes": NUM_GENES,
            "hidden_size": 16,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "intermediate_size": 32,
            "bucket_size": 8,
            "num_hashes": 2,
            "classifier_hidden_sizes": [12, 8],
            "num_labels": 3,
        }
        return ScReformerConfig(**{**defaults, **overrides})

    return make


@pytest.fixture
def random_cells():
    """Return a function: number of cells, seed -> bin ids (cells, 60), two thirds of them zero."""

    def make(num_cells=3, seed=0):
        generator = torch.Generator().manual_seed(seed)
        bins = torch.randint(1, 6, (num_cells, NUM_GENES), generator=generator)
        return bins * (torch.rand(num_cells, NUM_GENES, generator=generator) < 0.35)

    return make


def expressed(bins, padding=0):
    """Lay full cells out as their expressed genes, padded to the longest plus ``padding``."""
    from screformer import ScReformerConfig

    pad_token_id = ScReformerConfig().pad_token_id
    length = int((bins > 0).sum(1).max()) + padding
    shape = (len(bins), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "gene_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
    }
    for row, cell in enumerate(bins):
        genes = cell.nonzero()[:, 0]
        batch["input_ids"][row, : len(genes)] = cell[genes]
        batch["gene_ids"][row, : len(genes)] = genes
        batch["attention_mask"][row, : len(genes)] = 1
    return batch


@pytest.fixture(name="expressed")
def expressed_fixture():
    return expressed


@pytest.fixture
def restored_determinism(monkeypatch):
    """Undo, after the test, what full_determinism changes in the process."""
    names = ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC")
    for name in (*names, "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # noted, and put back
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.fixture(scope="session")
def small_quickstart(tmp_path_factory):
    """Return the folder of a quickstart on 180 of the packaged cells, two steps of training: whole, and untrained."""
    import anndata

    from screformer.tokenization import example_cells_path
    from screformer.train.quickstart import quickstart

    folder = tmp_path_factory.mktemp("small")
    adata = anndata.read_h5ad(example_cells_path())
    common = adata[adata.obs["cell_type"].isin(["alpha", "beta", "ductal"])]
    groups = common.obs.groupby(["donor", "cell_type"], observed=True)
    chosen = [name for _, group in groups for name in group.index[:15]]
    common[chosen].copy().write_h5ad(folder / "cells.h5ad")
    return quickstart(folder / "quickstart", cells=folder / "cells.h5ad", max_steps=2).folder
