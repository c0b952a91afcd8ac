"""A classifier with random weights and a split beside it: all that reading a teacher needs, in no time."""

import json

import torch
from small_corpus import TINY_MODEL, TYPES, make_tokenizer

from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.train.arguments import ModelArguments
from screformer.train.starting_model import starting_model


def make_teacher(folder, *, label_names=TYPES, split=None, seed=0, num_bins=6, **overrides):
    """Save a teacher in `folder` and return that path as text; `split` has the cells of each part."""
    torch.manual_seed(seed)
    overrides = {"hidden_dropout_prob": 0.3, **overrides}
    arguments = ModelArguments(config_overrides=[*TINY_MODEL, *(f"{key}={value}" for key, value in overrides.items())])
    tokenizer = make_tokenizer(num_bins)
    model = starting_model(ScReformerForCellClassification, tokenizer, arguments, label_names=list(label_names))
    with torch.no_grad():  # so that cells differ in their logits
        model.classifier.convolution_path.output.weight.mul_(50)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if split is not None:
        record = {"label_column": "cell_type", "group_column": None, "test_groups": [], "seed": 1, **split}
        (folder / "splits.json").write_text(json.dumps(record))
    return str(folder)
