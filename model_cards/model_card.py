"""The README of a checkpoint, written from the files beside it: every number in it was read, none was typed."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from screformer.model_cards.card_inputs import CardInputs, DataSource, checked_results, records_of_pretraining
from screformer.model_cards.card_sections import (
    evaluation_section,
    limitations,
    training_procedure_section,
    versions_section,
)
from screformer.model_cards.checkpoint_records import Checkpoint, Json, num_values, read_checkpoint
from screformer.model_cards.comparison import METRIC_TITLES, MODEL, Results, compare
from screformer.model_cards.cost_section import cost_section, emissions_metadata
from screformer.model_cards.data_section import data_licence_sentence, overlap_section, training_data_section
from screformer.model_cards.downstream_section import downstream_verdict
from screformer.model_cards.markdown import bullets, format_value, plain, table
from screformer.model_cards.masked_genes import masked_gene_sentence
from screformer.model_cards.other_splits import check_splits, headline_of_splits, other_config, split_config
from screformer.train.result_files import written_aside

TEMPLATE = "template.md"
CLASSIFIER = "AutoModelForSequenceClassification"
TAGS = ["biology", "genomics", "single-cell", "scrna-seq", "human", "reformer", "screformer"]
PAPER = {
    "paper_title": (
        "Scaling transformers to high-dimensional sparse data: a Reformer-BERT approach for large-scale classification"
    ),
    "paper_authors": (
        "Li, Wanxuan and Li, Xinhua and Guo, Weihang and Gu, Boyuan and Du, Jianjun and Chi, Ning and Shao, Dan and "
        "Xiao, Kai and Mo, Ren"
    ),
    "paper_doi": "10.3389/frai.2025.1661318",
}


class Head(NamedTuple):
    """What a kind of checkpoint is for, and how it is opened."""

    auto_class: str
    summary: str
    intended_use: str
    read_outputs: str


HEADS = {
    "ScReformerForCellClassification": Head(
        CLASSIFIER,
        "A classifier of human cell types that reads the raw RNA counts of single cells.",
        "Suggesting cell type labels for human single-cell RNA-seq data like the training data, for a person who knows "
        "the tissue to review; and as a starting point for fine-tuning on other labels.",
        "probabilities = outputs.logits.softmax(-1)\n"
        "labels = [model.config.id2label[index] for index in probabilities.argmax(-1).tolist()]",
    ),
    "ScReformerForMaskedLM": Head(
        "AutoModelForMaskedLM",
        "A pretrained encoder of human single-cell RNA counts.",
        "A starting point for fine-tuning, for example on cell types. By itself it predicts the expression bins of "
        "masked genes and labels nothing.",
        "predicted_bins = outputs.logits.argmax(-1)  # (cells, genes)",
    ),
    "ScReformerModel": Head(
        "AutoModel",
        "An encoder of human single-cell RNA counts.",
        "A starting point for fine-tuning, and embeddings of cells. By itself it labels nothing.",
        "embeddings = outputs.cell_embedding  # (cells, hidden_size)",
    ),
}


def write_model_card(
    folder: str | Path,
    *,
    results: Results | None = None,
    model_name: str | None = None,
    repo_id: str | None = None,
    data_sources: Sequence[DataSource] = (),
    pretraining: str | Path | None = None,
    licence: str = "apache-2.0",
    other_splits: Sequence[Json] = (),
) -> Path:
    """Write ``README.md`` into a checkpoint folder and return its path. Needs no network.

    Parameters
    ----------
    folder
        Checkpoint with ``config.json``; ``tokenizer_config.json``, ``training.json``, ``metrics.json``,
        ``splits.json``, ``resources.json``, ``evaluation.json`` and ``downstream.json`` are read where they exist, and
        what they would say is reported missing where not. What is given here is kept in ``card.json``.
    results
        ``"model"``, ``"logistic_regression"``, ``"majority_class"`` (and others) -> metrics on the same test cells, as
        `classification_metrics` returns them; optional in a row: ``seconds``, ``inverse_strength``. Default: the
        model's own from ``evaluation.json``.
    model_name
        Title; default the folder's name.
    repo_id
        Hub id, or the path that the examples load; default the folder's name.
    data_sources
        Provenance and licence of the training cells.
    pretraining
        Folder of the run that this one started from; its settings and scores join the card.
    licence
        Of weights and code, as the Hub abbreviates it.
    other_splits
        Runs of the same settings on other splits, of `record_of_split`.

    Raises
    ------
    FileNotFoundError
        The folder has no ``config.json``.
    ValueError
        The architecture is not one of this package, `results` lack a metric or are of different test sets, or a split
        is given twice.
    """
    checkpoint = read_checkpoint(folder)
    _head(checkpoint)
    inputs = CardInputs(
        model_name=model_name,
        repo_id=repo_id,
        licence=licence,
        data_sources=tuple(data_sources),
        results=checked_results(results),
        pretraining=None if pretraining is None else records_of_pretraining(pretraining),
        other_splits=tuple(other_splits),
    )
    inputs.write(checkpoint.folder)
    return write_card_of(checkpoint.folder, inputs)


def write_card_of(folder: str | Path, inputs: CardInputs) -> Path:
    """Write ``README.md`` from what a folder holds and what else is known, and return its path."""
    path = Path(folder, "README.md")
    with written_aside(path) as aside:
        aside.write_text(card_text(folder, inputs), encoding="utf-8")
    return path


def card_text(folder: str | Path, inputs: CardInputs) -> str:
    """Return the card of a checkpoint folder; see `write_model_card`."""
    checkpoint = read_checkpoint(folder)
    check_splits(inputs.other_splits, checkpoint)
    head, results = _head(checkpoint), inputs.results_of(checkpoint)
    folder_name = checkpoint.folder.resolve().name
    name, source = inputs.model_name or folder_name, inputs.repo_id or folder_name
    num_genes = checkpoint.config.get("num_genes")
    template = Template(Path(__file__).with_name(TEMPLATE).read_text(encoding="utf-8"))
    body = template.substitute(
        PAPER,
        title=plain(name),
        summary=head.summary,
        verdict=_verdict(results, checkpoint, inputs.other_splits),
        shape=_shape(checkpoint),
        intended_use=head.intended_use,
        vocabulary_size=f" ({format_value(num_genes)} genes)" if num_genes else "",
        binning=_binning(checkpoint),
        auto_class=head.auto_class,
        source=json.dumps(source),
        read_outputs=head.read_outputs,
        command_line=_command_line(source) if head.auto_class == CLASSIFIER else "",
        training_data=training_data_section(checkpoint, inputs.data_sources, inputs.pretraining_of()),
        overlap=overlap_section(checkpoint, source),
        training_procedure=training_procedure_section(checkpoint, inputs.pretraining_of()),
        cost=cost_section(checkpoint),
        evaluation=evaluation_section(results, checkpoint, inputs.other_splits),
        limitations=bullets(map(plain, limitations(results, checkpoint, inputs.other_splits))),
        versions=versions_section(checkpoint),
        licence=inputs.licence,
        data_licence=data_licence_sentence(inputs.data_sources),
    )
    metadata = _metadata(name, inputs, head, results, checkpoint)
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def _head(checkpoint: Checkpoint) -> Head:
    name = (checkpoint.config.get("architectures") or ["none"])[0]
    if name not in HEADS:
        raise ValueError(f"config.json names the architecture {name!r}; a card is written for {', '.join(HEADS)}")
    return HEADS[name]


def _verdict(results: Results | None, checkpoint: Checkpoint, other_splits: Sequence[Json]) -> str:
    if results is None:
        nothing = "No evaluation on test cells is recorded for this checkpoint."
        told = masked_gene_sentence(checkpoint.metrics) if not checkpoint.cell_types else None
        return downstream_verdict(checkpoint) or f"> **{told or nothing}**"
    comparison = compare(results)
    if comparison is None:
        return "> **No comparison with logistic regression is recorded**, so this card claims no advantage over it."
    together = headline_of_splits(results, checkpoint, other_splits)
    return f"> **{comparison.headline}.**" + (f"\n>\n> {together}" if together else "")


def _shape(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    facts = {
        "Genes": config.get("num_genes"),
        "Expression bins": config.get("num_bins"),
        "Hidden size": config.get("hidden_size"),
        "Layers": config.get("num_hidden_layers"),
        "Attention heads": config.get("num_attention_heads"),
        "Attention": config.get("attention"),
        "Bucket size": config.get("bucket_size"),
        "Hash rounds": config.get("num_hashes"),
        "Gene space": config.get("gene_space"),
        "Values in the weight files": num_values(checkpoint.folder),
        "Cell types": len(checkpoint.cell_types) or None,
    }
    known = {name: fact for name, fact in facts.items() if fact is not None}
    return table(("Property", "Value"), ((name, format_value(fact)) for name, fact in known.items()))


def _binning(checkpoint: Checkpoint) -> str:
    settings = checkpoint.tokenizer
    if not {"binning", "target_sum", "num_bins"} <= settings.keys():
        return "The tokenizer normalises and bins the counts itself; its settings are not recorded here."
    return (
        f"The tokenizer normalises each cell to {settings['target_sum']:,g} counts and bins them itself "
        f"(rule `{settings['binning']}`, {settings['num_bins']} bins, bin 0 = not expressed)."
    )


def _command_line(source: str) -> str:
    return f"""
Whole files, from the command line:

```bash
screformer annotate cells.h5ad --model {shlex.quote(source)} -o annotated.h5ad
```
"""


def _metadata(
    name: str, inputs: CardInputs, head: Head, results: Results | None, checkpoint: Checkpoint
) -> ModelCardData:
    return ModelCardData(
        license=inputs.licence,
        library_name="transformers",
        tags=[*TAGS, *(["cell-type-annotation"] if head.auto_class == CLASSIFIER else [])],
        metrics=["accuracy", "f1"] if results is not None else None,
        model_name=name,
        co2_eq_emissions=emissions_metadata(checkpoint),
        eval_results=None if results is None else _eval_results(results, checkpoint, inputs),
    )


def _eval_results(results: Results, checkpoint: Checkpoint, inputs: CardInputs) -> list[EvalResult]:
    data_name = inputs.data_sources[0].name if inputs.data_sources else "unnamed test cells"
    splits = {split_config(checkpoint.splits): results}
    splits |= {other_config(other): other["results"] for other in inputs.other_splits}
    metric_types = {"accuracy": "accuracy", "macro_f1": "f1", "balanced_accuracy": "balanced_accuracy"}
    return [
        EvalResult(
            task_type="tabular-classification",
            task_name="Cell type annotation",
            dataset_type=re.sub(r"[^a-z0-9]+", "-", data_name.lower()).strip("-"),
            dataset_name=data_name,
            dataset_config=config,
            dataset_split=str(rows[MODEL].get("part", "test")),
            metric_type=metric_types[metric],
            metric_name=title,
            metric_value=round(float(rows[MODEL][metric]), 4),
        )
        for config, rows in splits.items()
        for metric, title in METRIC_TITLES.items()
    ]
