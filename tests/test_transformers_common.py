"""transformers' own tests of every model, run on the three classes of this package.

The suite is that of the installed transformers, Apache-2.0, and nothing of it is in this repository: see
`transformers_suite.py`. Without it this module is skipped; `make test-transformers` fetches and runs it.
"""

import unittest
from unittest.mock import patch

import pytest
import torch
from transformers_suite import load_suite

from screformer import ScReformerConfig, ScReformerForCellClassification, ScReformerForMaskedLM, ScReformerModel
from screformer.configuration_screformer import CLASSIFIER_PATHS

MODELING, CONFIGURATION = load_suite()
pytestmark = pytest.mark.filterwarnings("default")  # the suite has warnings of its own

NUM_GENES = 64
SHAPE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}

# Tests of the suite that are of something this model cannot have. Ours of the same promises, where there is one, are in
# test_common_model_expectations.py and test_modeling_screformer.py.
NOT_APPLICABLE = {
    "test_attention_outputs": "LSH attention never builds the matrix of attentions; asking for it is an error",
    "test_resize_tokens_embeddings": "tokens are the expression bins, [PAD] and [MASK]: they cannot become more",
    "test_load_with_mismatched_shapes": "it sets vocab_size, which follows from num_bins, and gives cells of 8 genes "
    "without gene_ids",
    "test_can_load_ignoring_mismatched_shapes": "it looks for a linear layer directly in the head, whose own are in "
    "its paths",
}


class ScReformerTester:
    """Gives the suite a tiny configuration and some cells: their expressed genes in any order, one of them padded."""

    batch_size, seq_length = 3, 24
    num_hidden_layers, hidden_size = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
    is_training = True

    def get_config(self):
        sizes = {"bucket_size": 8, "num_hashes": 2, "classifier_hidden_sizes": [12, 8]}
        paths = {"classifier_paths": list(CLASSIFIER_PATHS)}
        return ScReformerConfig(num_genes=NUM_GENES, num_labels=3, **SHAPE, **sizes, **paths)

    def prepare_config_and_inputs_for_common(self):
        config, generator = self.get_config(), torch.Generator().manual_seed(0)
        orders = [torch.randperm(NUM_GENES, generator=generator) for _ in range(self.batch_size)]
        inputs = {
            "input_ids": torch.randint(1, config.num_bins, (self.batch_size, self.seq_length), generator=generator),
            "gene_ids": torch.stack(orders)[:, : self.seq_length],
            "attention_mask": torch.ones(self.batch_size, self.seq_length, dtype=torch.long),
        }
        inputs["input_ids"][-1, -4:], inputs["attention_mask"][-1, -4:] = config.pad_token_id, 0
        return config, inputs


class TestCommonModel(MODELING.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (ScReformerModel, ScReformerForMaskedLM, ScReformerForCellClassification)
    has_attentions = False
    # Every weight's start is tested, as of models that were added to transformers lately.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = ScReformerTester()
        # The suite knows by name which classes have which head, and with it labels and losses.
        names = {
            "MODEL_MAPPING_NAMES": ScReformerModel,
            "MODEL_FOR_MASKED_LM_MAPPING_NAMES": ScReformerForMaskedLM,
            "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": ScReformerForCellClassification,
        }
        for mapping, model_class in names.items():
            known = patch.dict(getattr(MODELING, mapping), {ScReformerConfig.model_type: model_class.__name__})
            known.start()
            self.addCleanup(known.stop)

    def test_config(self):
        sizes = {name: SHAPE[name] for name in ("hidden_size", "num_attention_heads")}
        tester = CONFIGURATION.ConfigTester(self, config_class=ScReformerConfig, num_genes=NUM_GENES, **sizes)
        tester.run_common_tests()


for name, reason in NOT_APPLICABLE.items():
    setattr(TestCommonModel, name, unittest.skip(f"not applicable: {reason}")(getattr(MODELING.ModelTesterMixin, name)))


@pytest.mark.parametrize("name", NOT_APPLICABLE)
def test_what_does_not_apply_is_in_the_suite(name):
    assert callable(getattr(MODELING.ModelTesterMixin, name, None))
