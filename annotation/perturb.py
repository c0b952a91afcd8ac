"""In-silico perturbation: genes are deleted or raised in cells, and what a classifier then says is compared."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from screformer.annotation.callable_module import CallableModule
from screformer.annotation.cell_source import CellSource
from screformer.annotation.perturbation_report import RECORD_FILE, write_report
from screformer.annotation.perturbation_results import make_table
from screformer.annotation.perturbation_run import NumberStore, PerturbationOptions, PerturbationRun
from screformer.annotation.perturbed_cells import Change
from screformer.annotation.trained_model import TrainedModel, load_classifier
from screformer.modeling_screformer import ScReformerForCellClassification
from screformer.tokenization.count_matrix import open_count_matrix
from screformer.tokenization.gene_vocabulary import GeneVocabulary
from screformer.tokenization.passport_problems import check_allowed
from screformer.train.batch_size import BatchSize
from screformer.train.collator import GeneSpace

if TYPE_CHECKING:
    from anndata import AnnData

MAX_NEAR = 3  # names in a message
Classifier = str | Path | TrainedModel[ScReformerForCellClassification]


@dataclass(frozen=True)
class PerturbationResult:
    """What `perturb` found.

    Attributes
    ----------
    record
        What perturbation.json holds: settings, model, input, cells, and in ``results`` a record a gene.
    table
        What perturbation.parquet holds: a row a gene and class.
    output
        The folder; None if nothing was written.
    """

    record: dict[str, Any]  # Any: JSON
    table: pd.DataFrame
    output: Path | None

    def __str__(self) -> str:
        """Give a line a gene, and where the results are."""
        own = self.record["settings"]["own_class"]
        followed = "the cells' own labels" if own is None else own
        lines = [f"{self.record['cells']['num_cells']:,} cells; changes of the probability of {followed}:"]
        for result in self.record["results"]:
            shift = result["own_probability"]
            if shift["mean"] is None:
                lines.append(f"{result['gene']}: the change changes no cell")
                continue
            tested = "no p" if shift["p"] is None else f"p {shift['p']:.3g}, q {shift['q']:.3g}"
            lines.append(
                f"{result['gene']}: {shift['mean']:+.2g} ({tested}); cosine distance "
                f"{result['cosine_distance']['mean']:.2g}; {result['labels_changed']['mean']:.1%} of "
                f"{result['num_changed_cells']:,} changed cells have another label"
            )
        return "\n".join([*lines, *([] if self.output is None else [f"{self.output}: {RECORD_FILE}"])])


def perturb(
    cells: str | Path | AnnData,
    model: Classifier,
    *,
    genes: Sequence[str],
    change: Change = "zero",
    bins: int = 2,
    together: bool = False,
    num_null: int = 50,
    output: str | Path | None = None,
    cells_of: str | None = None,
    label_column: str | None = None,
    max_cells: int = 1000,
    seed: int = 2022,
    layer: str | None = None,
    gene_column: str | None = None,
    allow: Sequence[str] = (),
    batch_size: BatchSize = 32,
    gene_space: GeneSpace | None = None,
    overwrite: bool = False,
    progress: bool = True,
    device: str | None = None,
) -> PerturbationResult:
    """Change genes in cells, and return how far that moves the cells' embeddings, probabilities and labels.

    What is changed are a cell's tokens: the bins of its other genes stay. Deleted, a gene is as one without counts: it
    leaves the cell (``"expressed"``) or gets bin 0 (``"full"``). The embedding is the mean over the expressed genes, so
    that a deleted gene leaves that mean too; the null has the same. Cells in which a change is none (the gene is not
    expressed, or in the highest bin already) are counted and not run; all shifts are means over the other cells.

    The null of a gene is the same change of `num_null` other genes of the same expression, see
    `perturbation_null.match_genes`; p-values count those that shift as much or more, in either direction, and q-values
    are Benjamini-Hochberg's over the genes.

    A folder `output` gets ``perturbation.json`` (settings, model, date, what each gene does beside its null),
    ``perturbation.parquet`` (a row a gene and class), ``perturbation.md`` and ``perturbation.png``. What is measured
    is kept in it until they are written: a run that is stopped goes on where it was, but for a gene.

    Parameters
    ----------
    cells
        Raw counts: a file of any format of `open_count_matrix`, or an AnnData object.
    model
        Folder or Hub id of a fine-tuned checkpoint, or one from `load_classifier`.
    genes
        Symbols, Ensembl ids or aliases of genes that the model knows.
    change
        ``"zero"`` deletes, ``"raise"`` raises by `bins`, up to the highest; a gene without counts gets bin `bins`.
    bins
        For ``"raise"``.
    together
        Change all of `genes` at once instead of each by itself. The null are sets of as many genes, matched one by one.
    num_null
        Other genes to change for each gene; 0: no null.
    output
        Folder for the results; None: they are only returned.
    cells_of
        Only cells of this type: by `label_column`, else those that the model calls so, at any level of its tree. Of a
        class of the model the probability is followed; otherwise of each cell that of the label it has unchanged.
    label_column
        Column of `obs` with the types.
    max_cells
        The most cells; they are drawn from more, and take about 8 bytes for each expressed gene.
    seed
        Draws the cells and, among equally near genes, the null.
    layer, gene_column, allow, batch_size, gene_space, progress, device
        As for `annotate_file`.
    overwrite
        Replace earlier results in `output`.

    Raises
    ------
    OSError
        `cells` or the checkpoint is not there, or results are (FileExistsError).
    ValueError
        A gene is not known, no cell is of the type, the file has problems that are not allowed, or an option is out of
        its range. Nothing is left of the output then.

    Examples
    --------
    .. code-block:: python

        result = screformer.annotation.perturb("cells.h5ad", "quickstart/checkpoint", genes=["INS", "GCG"])
        result.table.sort_values("probability_q")
    """
    options = PerturbationOptions(change, bins, together, num_null, cells_of, label_column, max_cells, seed)
    allowed = check_allowed(allow)
    with _result_folder(output, overwrite=overwrite) as folder:
        trained = load_classifier(model, device=device)
        vocabulary = trained.tokenizer.gene_vocabulary
        targets = find_genes(vocabulary, genes)
        run = PerturbationRun(trained, options, batch_size=batch_size, gene_space=gene_space, progress=progress)
        with (
            open_count_matrix(
                cells, layer=layer, gene_column=gene_column, vocabulary=vocabulary, allow=allowed
            ) as matrix,
            ExitStack() as kept,
        ):
            source = CellSource(matrix, trained.tokenizer, allow=allowed, progress=progress)
            record = run(matrix, source, targets, NumberStore(folder, kept))
            table = make_table(record)
            if folder is not None:
                write_report(folder, record, table)
    return PerturbationResult(record, table, folder)


def find_genes(vocabulary: GeneVocabulary, names: Sequence[str]) -> list[int]:
    """Return the position of each gene, without repetitions.

    Raises
    ------
    ValueError
        There is none, or one is unknown or may mean several genes; unknown ones come with near symbols.
    """
    if not names:
        raise ValueError("genes: at least one is needed (--gene), a symbol, Ensembl id or alias")
    mapping = vocabulary.map_names(names)
    problems = [f"{name!r} may mean several genes: give its Ensembl id" for name in mapping.report.ambiguous]
    for name in mapping.report.unknown:
        near = _near_symbols(vocabulary, name)
        problems.append(f"{name!r} is unknown" + (f" (near: {', '.join(near)})" if near else ""))
    if problems:
        raise ValueError(f"genes: not in the model's vocabulary {vocabulary.name!r}: {'; '.join(problems)}")
    return list(dict.fromkeys(mapping.positions.tolist()))


def _near_symbols(vocabulary: GeneVocabulary, name: str) -> list[str]:
    """Return symbols that begin as the name, or else look like it."""
    longer = [symbol for symbol in vocabulary.symbols if symbol.upper().startswith(name.upper())]
    return longer[:MAX_NEAR] or difflib.get_close_matches(name.upper(), vocabulary.symbols, n=MAX_NEAR)


@contextmanager
def _result_folder(output: str | Path | None, *, overwrite: bool) -> Iterator[Path | None]:
    """Give the folder; remove it if it was not there and nothing is in it."""
    if output is None:
        yield None
        return
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: the name of a folder is needed, {folder} is a file")
    if (folder / RECORD_FILE).exists() and not overwrite:
        raise FileExistsError(
            f"output: {folder} has a {RECORD_FILE}; choose another folder, or replace it with overwrite=True "
            "(--overwrite)"
        )
    is_new = not folder.exists()
    try:
        yield folder
    finally:
        if is_new and folder.exists() and not any(folder.iterdir()):
            folder.rmdir()


sys.modules[__name__].__class__ = CallableModule
