"""The laws of test_modeling_screformer.py at the paper's shape, on real cells: slow, run by `make test-slow`.

With 17,927 genes, 10 heads, 4 rounds and 6 layers, a cell has four million bucket decisions. If rounding depended on
the batch, some of them would fall on the other side, and outputs would differ by far more than rounding.
"""

import anndata
import pytest
import torch

from screformer import ScReformerConfig, ScReformerModel, ScReformerTokenizer
from screformer.tokenization import example_cells_path

pytestmark = pytest.mark.slow
ATOL = 1e-5


@pytest.fixture(scope="module")
def tokenizer():
    return ScReformerTokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return ScReformerModel(ScReformerConfig(num_genes=tokenizer.num_genes)).eval()


@pytest.fixture(scope="module")
def cells():
    return anndata.read_h5ad(example_cells_path())[[0, 700, 1400]].to_memory()


@torch.no_grad()
def test_full_cells_are_the_same_alone_and_together(model, tokenizer, cells):
    batch = tokenizer(cells, gene_space="full", return_tensors="pt")
    together = model(**batch).last_hidden_state
    alone = model(batch["input_ids"][1:2]).last_hidden_state
    torch.testing.assert_close(together[1:2], alone, atol=ATOL, rtol=0)


@torch.no_grad()
def test_expressed_cells_are_the_same_in_any_batch_padding_and_gene_order(model, tokenizer, cells):
    batch = tokenizer(cells, gene_space="expressed", return_tensors="pt")
    padded = {name: torch.nn.functional.pad(tensor, (0, 333)) for name, tensor in batch.items()}
    padded["input_ids"][:, -333:] = tokenizer.pad_token_id
    together = model(**padded).last_hidden_state
    for row in range(len(cells)):
        length = int(batch["attention_mask"][row].sum())
        order = torch.randperm(length, generator=torch.Generator().manual_seed(row))
        alone = model(batch["input_ids"][row, order][None], batch["gene_ids"][row, order][None]).last_hidden_state[0]
        torch.testing.assert_close(together[row, order], alone, atol=ATOL, rtol=0)
