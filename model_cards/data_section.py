"""What a card says of the cells: their origin, what their files were, how they were split, and who has seen them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from screformer.model_cards.card_inputs import DataSource
from screformer.model_cards.checkpoint_records import Checkpoint, Json
from screformer.model_cards.markdown import flat_rows, format_share, format_value, join_names, plain, table


def training_data_section(
    checkpoint: Checkpoint, data_sources: Sequence[DataSource], pretraining: Checkpoint | None = None
) -> str:
    """Return provenance and licence, what the corpora recorded of themselves, and the split."""
    paragraphs = []
    if data_sources:
        columns = ("Data", "Citation", "Obtained from", "Licence")
        paragraphs.append(table(columns, (tuple(map(plain, source)) for source in data_sources)))
    else:
        paragraphs.append("The provenance and the licence of the training cells are not recorded.")
    corpus = checkpoint.training.get("corpus", {})
    facts = list(flat_rows({name: value for name, value in corpus.items() if name != "sources"}))
    if facts:
        paragraphs.append(table(("Corpus", "Value"), facts))
    if corpus.get("sources"):
        paragraphs += ["Each file as it was found:", _passports(corpus["sources"])]
    before = [] if pretraining is None else pretraining.training.get("corpus", {}).get("sources", [])
    if before and _checksums(before) != _checksums(corpus.get("sources", [])):
        paragraphs += ["Pretraining read other files:", _passports(before)]
    sizes = checkpoint.splits.get("num_cells")
    if sizes:
        rows = ((plain(part), format_value(size)) for part, size in sizes.items())
        paragraphs += [split_rule(checkpoint.splits), table(("Part", "Cells"), rows)]
    return "\n\n".join(paragraphs)


def _checksums(sources: Sequence[Json]) -> set[str]:
    return {source["sha256"] for source in sources}


def _passports(sources: Sequence[Json]) -> str:
    """Return what was found in each file when it was read, before anything was made of it."""
    shown = {column: [show(source) for source in sources] for column, show in PASSPORT.items()}
    known = {column: values for column, values in shown.items() if any(value != "-" for value in values)}
    return table(list(known), zip(*known.values(), strict=True))


def _fact(name: str) -> Callable[[Json], str]:
    return lambda source: "-" if source.get(name) in (None, "", [], {}) else format_value(source[name])


def _names_of_genes(source: Json) -> str:
    told = (_fact("gene_ids")(source), _fact("gene_source")(source))
    return ", ".join(one for one in told if one != "-") or "-"


def _reasons(source: Json) -> str:
    reasons = [f"{plain(reason)}: {format_value(number)}" for reason, number in source.get("dropped", {}).items()]
    return ", ".join(reasons) or "-"


PASSPORT: dict[str, Callable[[Json], str]] = {
    "File": _fact("name"),
    "Format": _fact("format"),
    "Organism": _fact("organism"),
    "Cells": _fact("num_cells"),
    "Cells kept": _fact("num_kept"),
    "Left out": _reasons,
    "Counts in": _fact("count_source"),
    "Genes": _fact("num_genes"),
    "Genes named by": _names_of_genes,
    "Counts on known genes": lambda source: format_share(source.get("gene_coverage")),
    "Median genes a cell": _fact("median_genes_per_cell"),
    "Median counts a cell": _fact("median_counts_per_cell"),
    "Let pass": _fact("allowed"),
    "SHA-256": _fact("sha256"),
}


def split_rule(splits: Json) -> str:
    """Return by what rule the test cells were chosen."""
    if splits.get("group_column"):
        column, groups = plain(splits["group_column"]), join_names(splits["test_groups"])
        return f"Split by {column}: the test cells are those of {groups}, none of which trained."
    return "Split at random, stratified by label: cells of one donor are in every part."


def overlap_section(checkpoint: Checkpoint, source: str) -> str:
    """Return how a reader finds out whether the model has seen cells of theirs."""
    if not checkpoint.seen_cells:
        return "Which cells it has seen is not recorded: a test on public cells may be a test on training cells."
    folder = source.rpartition("/")[2]
    fetch = f"hf download {shlex.quote(source)} --local-dir {shlex.quote(folder)}\n" if folder != source else ""
    which = "every cell that it has read" if checkpoint.seen_cells.get("is_complete", True) else (
        "the cells that its last training has read"
    )  # fmt: skip
    return (
        f"Hashes of the counts of {which} are beside the weights. Before you test it on public cells, see "
        f"how many of them are among these:\n\n```bash\n{fetch}"
        f"screformer inspect cells.h5ad --against {shlex.quote(folder)}\n```"
    )


def data_licence_sentence(data_sources: Sequence[DataSource]) -> str:
    """Return what is known of the terms of the training data."""
    if not data_sources:
        return "The terms of the training data are not recorded."
    return "The training data have their own terms, named above."
