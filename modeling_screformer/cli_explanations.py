"""Commands that say why: genes that make a type, genes that are changed, genes that look at each other."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_messages import run, say
from .cli_options import Allow, BatchSize, Cells, GeneColumn, Layer, Model, Overwrite, Space


def explain(
    model: Model,
    cells: Annotated[str, typer.Option(help="Raw counts of cells that the model was not trained on.")],
    class_: Annotated[
        list[str],
        typer.Option("--class", help="Label of the model, one above its labels, or NAME=LABEL|LABEL. Once for each."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    label_column: Annotated[
        str | None, typer.Option(help="Column of obs with the types. Default: what the model names the cells.")
    ] = None,
    background: Annotated[
        str | None, typer.Option(help="Cells to compare with, such as the training's. Default: others of --cells.")
    ] = None,
    num_cells: Annotated[int, typer.Option(help="The most cells of each class.")] = 1000,
    num_background: Annotated[int, typer.Option(help="The most cells to compare with.")] = 500,
    method: Annotated[
        Literal["expected_gradients", "shap", "integrated_gradients", "deep"],
        typer.Option(help="shap: its GradientExplainer; deep: its DeepExplainer, whose values do not add up here."),
    ] = "expected_gradients",
    points: Annotated[int, typer.Option(help="Points of a cell at which gradients are taken.")] = 16,
    sum_error: Annotated[
        float,
        typer.Option(
            min=0,
            help="Standard error that a cell's values may have in their sum, as a share of it: forward passes on the "
            "background see to that, where points do not. 1: leave it as points give it, which is faster.",
        ),
    ] = 0.01,
    score: Annotated[
        Literal["logit", "log_odds"],
        typer.Option(help="Explain the logit of the class, or its log odds."),
    ] = "logit",
    gene: Annotated[list[str] | None, typer.Option(help="Report the place of this gene. Once for each.")] = None,
    markers: Annotated[
        Path | None, typer.Option(help="Known marker genes: a text file with one a line, or a csv like CellMatch.")
    ] = None,
    marker_type: Annotated[
        list[str] | None, typer.Option(help="Cell type in a csv of markers, or CLASS=TYPE|TYPE. Once for each.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of cells and points that are drawn.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Points that are worked on together (default: by the genes of a cell).")
    ] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    allow: Allow = None,
    gene_space: Space = None,
    overwrite: Overwrite = False,
) -> None:
    """Which genes make cells one of their type, to the model: values a gene and cell, checked, with figures.

    Says how long it will take and how much memory before it starts. Run again, it goes on where it was stopped.

    \b
    Example:
      screformer explain --model quickstart/checkpoint --cells quickstart/new_cells.h5ad --class beta -o explained
    """
    from .annotation.attributions import Sampling
    from .annotation.class_explanation import ExplainOptions
    from .annotation.explain import explain_file

    options = ExplainOptions(
        class_,
        sampling=Sampling(method, points, seed, sum_error if sum_error < 1 else None),
        score=score,
        num_cells=num_cells,
        num_background=num_background,
        gene_space=gene_space,
        seed=seed,
        batch_size=batch_size,
        genes=gene or (),
        markers=markers,
        marker_types=marker_type or (),
    )
    explanation = run(
        lambda: explain_file(
            cells,
            model,
            output,
            options,
            label_column=label_column,
            background=background,
            layer=layer,
            gene_column=gene_column,
            allow=allow or (),
            overwrite=overwrite,
            announce=say,
            command=f"screformer explain {' '.join(f'--class {name!r}' for name in class_)}",
        )
    )
    say(str(explanation))


def perturb(
    cells: Cells,
    model: Model,
    gene: Annotated[
        list[str], typer.Option(help="Symbol, Ensembl id or alias of a gene to change. Give it once for each.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    change: Annotated[
        Literal["zero", "raise"], typer.Option(help="Delete a gene, or raise its expression bin.")
    ] = "zero",
    bins: Annotated[int, typer.Option(min=1, help="By how many bins to raise, up to the highest.")] = 2,
    together: Annotated[
        bool, typer.Option("--together", help="Change all genes at once instead of each by itself.")
    ] = False,
    null: Annotated[
        int, typer.Option(min=0, help="Other genes, of the same expression, to change for each; 0: no p-values.")
    ] = 50,
    cells_of: Annotated[str | None, typer.Option(help="Take only cells of this type, as the model names them.")] = None,
    label_column: Annotated[
        str | None, typer.Option(help="Column of obs that says which cells --cells-of takes, instead of the model.")
    ] = None,
    max_cells: Annotated[int, typer.Option(min=1, help="The most cells; they are drawn from more.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Draws the cells and, among equals, the null.")] = 2022,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    allow: Allow = None,
    batch_size: BatchSize = "32",
    gene_space: Space = None,
    overwrite: Overwrite = False,
) -> None:
    """Delete or raise genes in cells: shifts of embedding, probabilities and labels, beside genes of like expression.

    A run that is stopped goes on with the same command.

    \b
    Examples:
      screformer perturb cells.h5ad --model quickstart/checkpoint --gene INS --gene GCG -o perturbed
      screformer perturb cells.h5ad --model quickstart/checkpoint --gene GCG --change raise --cells-of beta -o raised
    """
    from .annotation.perturb import perturb as perturb_genes
    from .train.batch_size import read_batch_size

    result = run(
        lambda: perturb_genes(
            cells,
            model,
            genes=gene,
            change=change,
            bins=bins,
            together=together,
            num_null=null,
            output=output,
            cells_of=cells_of,
            label_column=label_column,
            max_cells=max_cells,
            seed=seed,
            layer=layer,
            gene_column=gene_column,
            allow=allow or (),
            batch_size=read_batch_size(batch_size),
            gene_space=gene_space,
            overwrite=overwrite,
        )
    )
    say(str(result))


def interactions(
    cells: Cells,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write into.")],
    label_column: Annotated[
        str | None, typer.Option(help="Column of obs with the cell types. Default: the model's own labels.")
    ] = None,
    gene: Annotated[list[str] | None, typer.Option(help="Only pairs among these genes. Give it once for each.")] = None,
    max_genes: Annotated[int, typer.Option(help="Without --gene: so many, those that the most cells express.")] = 2000,
    min_mass: Annotated[float, typer.Option(help="Leave out pairs with a lower mean attention.")] = 1e-6,
    attention_layer: Annotated[
        list[int] | None, typer.Option(help="Layer of the model, from 0. Give it once for each. Default: all.")
    ] = None,
    max_cells: Annotated[int | None, typer.Option(help="The most cells of a type, drawn at random.")] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    allow: Allow = None,
    batch_size: BatchSize = "32",
    gene_space: Space = None,
    overwrite: Overwrite = False,
) -> None:
    """Which genes attend to which in the cells of each type: all pairs (.parquet), the strongest (.json), a figure.

    Attention is what the model looks at, no proof of an interaction: see screformer benchmark attention-interactions.

    \b
    Example:
      screformer interactions cells.h5ad --model quickstart/checkpoint --label-column cell_type -o interactions
      screformer interactions cells.h5ad --model quickstart/checkpoint -o islets --gene INS --gene GCG --gene PDX1
    """
    from .annotation.interaction_files import interactions_file
    from .train.batch_size import read_batch_size

    def write() -> None:
        summary = interactions_file(
            cells,
            model,
            output,
            overwrite=overwrite,
            label_column=label_column,
            genes=gene,
            max_genes=max_genes,
            min_mass=min_mass,
            attention_layers=attention_layer,
            max_cells=max_cells,
            layer=layer,
            gene_column=gene_column,
            allow=allow or (),
            batch_size=read_batch_size(batch_size),
            gene_space=gene_space,
        )
        say(str(summary))

    run(write)
