"""Fine-tune a published scReformer on labelled cells with transformers alone; anndata reads the file.

The package screformer is not needed: tokenizer and model run the code that travels with the checkpoint. Read it first.

    python finetune_with_transformers.py me/pancreas-tiny cells.h5ad --label-column cell_type --output my_model
"""

import argparse

import anndata
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("checkpoint", help="Hub id or folder, of any head.")
parser.add_argument("cells", help="h5ad with raw counts.")
parser.add_argument("--label-column", default="cell_type", help="Of obs (default: %(default)s).")
parser.add_argument("--group-column", help="Such as donor: whole groups are held out, else single cells.")
parser.add_argument("--output", default="my_model", help="Folder (default: %(default)s).")
parser.add_argument("--epochs", type=float, default=3, help="(default: %(default)s)")
parser.add_argument("--learning-rate", type=float, default=1e-3, help="(default: %(default)s)")
parser.add_argument("--push-to", help="Hub id to upload the result to, as a private repository.")
given = parser.parse_args()
set_seed(0)

cells = anndata.read_h5ad(given.cells)
cells = cells[cells.obs[given.label_column].notna()].copy()
labels = cells.obs[given.label_column].astype(str).to_numpy()
names = sorted(set(labels))
groups = np.arange(cells.n_obs) if given.group_column is None else cells.obs[given.group_column].to_numpy()
unique = np.random.default_rng(0).permutation(np.unique(groups))
is_held_out = np.isin(groups, unique[: max(1, len(unique) // 5)])

tokenizer = AutoTokenizer.from_pretrained(given.checkpoint, trust_remote_code=True)
model = AutoModelForSequenceClassification.from_pretrained(
    given.checkpoint,
    trust_remote_code=True,
    id2label=dict(enumerate(names)),
    label2id={name: number for number, name in enumerate(names)},
    ignore_mismatched_sizes=True,  # a classifier's own head, if it has other labels, begins anew
)
tokens = tokenizer(cells, gene_space=model.config.gene_space)
rows = [
    {name: values[number] for name, values in tokens.items()} | {"labels": names.index(label)}
    for number, label in enumerate(labels)
]
trainer = Trainer(
    model,
    TrainingArguments(
        given.output,
        num_train_epochs=given.epochs,
        learning_rate=given.learning_rate,
        per_device_train_batch_size=16,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        hub_model_id=given.push_to,
        hub_private_repo=True,
    ),
    train_dataset=[row for row, out in zip(rows, is_held_out, strict=True) if not out],
    eval_dataset=[row for row, out in zip(rows, is_held_out, strict=True) if out],
    data_collator=DataCollatorWithPadding(tokenizer),
    processing_class=tokenizer,
    compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
)
trainer.train()
print(f"accuracy on {is_held_out.sum()} cells that were held out: {trainer.evaluate()['eval_accuracy']:.3f}")
trainer.save_model(given.output)  # weights, configuration, tokenizer, code
if given.push_to:
    model.push_to_hub(given.push_to, private=True)
    tokenizer.push_to_hub(given.push_to)
