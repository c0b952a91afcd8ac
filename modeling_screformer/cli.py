"""The command line, ``screformer …``: reads arguments, calls the library, and says where the results are.

Heavy imports wait until a command runs, so that ``screformer --help`` answers at once.
"""

import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from . import __version__
from .cli_benchmarks import benchmark
from .cli_explanations import explain, interactions, perturb
from .cli_messages import TRAINER_COMMAND, fail, run, say, say_once, start
from .cli_options import Allow, BatchSize, Cells, GeneColumn, Key, Layer, MaxError, Model, Output, Overwrite, Space
from .cli_sharing import publish, verify

app = typer.Typer(
    name="screformer",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="scReformer-BERT: from files of raw counts to cell types. Each command has --help with an example.",
)

app.add_typer(benchmark, name="benchmark")

PAIR_HINT = "Give it once for each: --obs cell_type --obs donor."


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"screformer {__version__}")
        raise typer.Exit
    if context.invoked_subcommand != "benchmark":  # which takes the process as it is
        from .train.process_memory import return_large_blocks

        return_large_blocks()


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("quickstart"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start over: delete an earlier quickstart.")] = False,
    test_donor: Annotated[str, typer.Option(help="human1, human2, human3 or human4; the others are trained on.")] = (
        "human4"
    ),
) -> None:
    """Real pancreas cells become labels: corpus, pretraining, fine-tuning, test, annotation, report; in minutes.

    Run again, it goes on where it was stopped.

    \b
    Example:
      screformer quickstart --output quickstart
      screformer quickstart --output quickstart_human1 --test-donor human1
    """

    from .train.quickstart import quickstart as run_quickstart

    prepare_quickstart_folder(output, overwrite=overwrite)
    result = run(lambda: run_quickstart(output, test_donor=test_donor, announce=say))
    say("")
    say(f"{'Donor ' + result.metrics['test_donor']:<24}{'accuracy':>10}{'macro-F1':>10}")
    for name in ("model", "logistic_regression", "majority_class"):
        row = result.metrics[name]
        title = {"model": "scReformer-BERT"}.get(name, name.replace("_", " ").capitalize())
        say(f"{title:<24}{row['accuracy']:>10.3f}{row['macro_f1']:>10.3f}")
    say(result.metrics["verdict"])
    say(result.metrics["answers_sentence"])
    say(result.metrics["gene_spaces"]["sentence"])
    say(f"\nReport: {output / 'report.html'}\nCheckpoint: {output / 'checkpoint'}")
    say(f"Annotated cells: {output / 'annotated.h5ad'}")
    say(f"To start over: screformer quickstart --output {output} --overwrite")


def prepare_quickstart_folder(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else; empty it of an earlier quickstart if asked to."""
    from shutil import rmtree

    from .train.quickstart import STAGES_FILE

    if not output.exists() or not any(output.iterdir()):
        return
    parts = ("corpus", "corpus.partial", STAGES_FILE)
    if not any((output / part).exists() for part in parts):
        fail(f"--output {output} holds files that are no quickstart's. Choose another folder.")
    if overwrite:
        rmtree(output)
    else:
        say(f"{output} exists: finished stages are kept. To start over: --overwrite")


@app.command()
def inspect(
    file: Annotated[str, typer.Argument(help="File of raw counts.", show_default=False)],
    layer: Layer = None,
    gene_column: GeneColumn = None,
    min_genes: Annotated[
        int, typer.Option(min=0, help="Genes that a cell should have; those with fewer are counted.")
    ] = 200,
    allow: Allow = None,
    against: Annotated[
        Path | None, typer.Option(help="Corpus or checkpoint: say how many of the cells it has seen, by their counts.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write everything, all genes not matched too, here.")
    ] = None,
) -> None:
    """What a file of counts holds, whether it can be used, and the fix if not; exits with 1 if it would be refused.

    \b
    Example:
      screformer inspect cells.h5ad --json passport.json
      screformer inspect cells.h5ad --against quickstart/corpus
    """
    from .tokenization.overlap import find_seen_cells, tokenizer_of
    from .tokenization.passport import inspect_file
    from .tokenization.tokenization_screformer import ScReformerTokenizer
    from .train.result_files import write_json

    def read() -> bool:
        if json is not None and (json.is_dir() or (json.exists() and json.samefile(file))):
            raise ValueError(f"--json {json}: the name of a new file is needed")
        tokenizer = ScReformerTokenizer() if against is None else tokenizer_of(against)
        passport = inspect_file(
            file, tokenizer, layer=layer, gene_column=gene_column, min_genes=min_genes, allow=allow or ()
        )
        say(str(passport))
        record = passport.to_dict()
        if against is not None and not passport.refusals:
            seen = find_seen_cells(file, against, layer=layer, gene_column=gene_column, allow=allow or ())
            say(f"{'seen':<15}{seen.num_seen:,} of {seen.num_cells:,} cells ({seen.share:.1%}) are in {against}")
            record["seen"] = {"folder": str(against), "num_seen": seen.num_seen, "num_indexed": seen.num_indexed}
        if json is not None:
            write_json(json, record)
        return not passport.refusals

    if not run(read):
        sys.exit(1)


@app.command()
def corpus(
    files: Annotated[
        list[str], typer.Argument(help="Files, folders or addresses of raw counts, of any format.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Corpus folder to make.")],
    obs: Annotated[list[str] | None, typer.Option(help=f"Column of obs to keep. {PAIR_HINT}")] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    allow: Allow = None,
    num_bins: Annotated[int, typer.Option(help="Expression bins, bin 0 (not expressed) included.")] = 6,
    binning: Annotated[
        Literal["log2", "quantile"], typer.Option(help="scBERT's rule, or quantiles of each cell.")
    ] = "log2",
    min_genes: Annotated[
        int, typer.Option(min=0, help="Drop cells with fewer expressed genes of the vocabulary; 200 is usual.")
    ] = 0,
    min_counts: Annotated[int, typer.Option(min=0, help="Drop cells with fewer counts.")] = 0,
    max_mitochondrial_share: Annotated[
        float, typer.Option(min=0, max=1, help="Drop cells with a larger share of mitochondrial counts, such as 0.2.")
    ] = 1.0,
    keep_duplicates: Annotated[
        bool, typer.Option("--keep-duplicates", help="Keep cells whose counts equal those of an earlier cell.")
    ] = False,
    hold_out: Annotated[float | None, typer.Option(help="Share of the cells to keep from training, as 0.1.")] = None,
    split_by: Annotated[
        str, typer.Option(help="What is held out as a whole: cell, file, or a kept column (donor, dataset).")
    ] = "cell",
    seed: Annotated[int, typer.Option(help="Draws the cells or groups to hold out.")] = 2022,
    cells_per_shard: Annotated[int, typer.Option(min=1, help="The most cells in one Arrow file.")] = 50_000,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes. Default: one for each core that may be used.")
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="Dask scheduler whose workers do it instead, as tcp://HOST:8786; files on a shared disk."),
    ] = None,
) -> None:
    """Tokenize files of raw counts into a corpus for training; a stopped run goes on where it was.

    \b
    Example:
      screformer corpus a.h5ad b.h5ad -o corpus --obs cell_type --obs donor
      screformer corpus *.h5ad -o corpus --obs donor --min-genes 200 --hold-out 0.1 --split-by donor
    """
    from .tokenization.cell_filters import CellFilters
    from .tokenization.corpus import build_corpus
    from .tokenization.corpus_split import HoldOut
    from .tokenization.corpus_workers import available_cores
    from .tokenization.freed_memory import return_columns
    from .tokenization.tokenization_screformer import ScReformerTokenizer

    def build() -> None:
        return_columns()
        made = build_corpus(
            files,
            output,
            tokenizer=ScReformerTokenizer(num_bins=num_bins, binning=binning),
            obs_columns=obs or [],
            layer=layer,
            gene_column=gene_column,
            allow=allow or (),
            cells_per_shard=cells_per_shard,
            filters=CellFilters(min_genes, min_counts, max_mitochondrial_share, drop_duplicates=not keep_duplicates),
            hold_out=None if hold_out is None else HoldOut(hold_out, split_by, seed),
            num_workers=workers or available_cores(),
            scheduler=scheduler,
        )
        say(made.summary())

    run(build)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def pretrain(context: typer.Context) -> None:
    """Pretrain by predicting masked expression bins. Example: screformer pretrain pretrain-tiny --corpus corpus"""
    start("train.pretrain", context.args)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def finetune(context: typer.Context) -> None:
    """Fine-tune on cell types. Example: screformer finetune finetune-fast --corpus corpus --checkpoint pretrained"""
    start("train.finetune", context.args)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def distill(context: typer.Context) -> None:
    """Let a fine-tuned model teach a smaller one. Example: screformer distill --teacher finetuned --corpus corpus"""
    start("train.distill", context.args)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Test a fine-tuned checkpoint. Example: screformer evaluate finetuned corpus --output evaluation"""
    start("train.evaluate", context.args)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def gene2vec(context: typer.Context) -> None:
    """Gene vectors, our own or released. Example: screformer gene2vec --corpus corpus -o gene2vec.safetensors"""
    start("tokenization.own_gene2vec", context.args)


@app.command()
def annotate(
    cells: Cells,
    model: Model,
    output: Output,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    allow: Allow = None,
    batch_size: BatchSize = "32",
    gene_space: Space = None,
    max_error: MaxError = None,
    unknown_below: Annotated[
        float | None,
        typer.Option(help="Call cells unknown that look stranger than all but this share of known ones, as 0.01."),
    ] = None,
    cluster_column: Annotated[
        str | None, typer.Option(help="Column of obs with a clustering: adds the vote of each cluster's cells.")
    ] = None,
    embeddings: Annotated[
        bool, typer.Option("--embeddings", help="Add the cells' vectors, obsm[X_screformer].")
    ] = False,
    key: Key = "screformer",
    overwrite: Overwrite = False,
) -> None:
    """Name the type of every cell: a copy with new columns (.h5ad), or a table (.csv, .tsv, .parquet).

    Rows and their order stay. A run that is stopped goes on with the same command. Several GPUs or machines share the
    cells: torchrun --nproc_per_node 8 -m screformer annotate ...

    \b
    Examples:
      screformer annotate cells.h5ad --model quickstart/checkpoint -o annotated.h5ad
      screformer annotate filtered_feature_bc_matrix.h5 --model quickstart/checkpoint -o labels.csv --max-error 0.05
    """
    from .annotation.annotate import annotate_file
    from .train.batch_size import read_batch_size

    def add() -> None:
        summary = annotate_file(
            cells,
            model,
            output,
            layer=layer,
            gene_column=gene_column,
            allow=allow or (),
            batch_size=read_batch_size(batch_size),
            gene_space=gene_space,
            max_error=max_error,
            unknown_below=unknown_below,
            cluster_column=cluster_column,
            embeddings=embeddings,
            key=key,
            overwrite=overwrite,
        )
        say_once(str(summary))

    run(add)


@app.command()
def calibrate(
    cells: Cells,
    model: Annotated[Path, typer.Option(help="Folder of a fine-tuned checkpoint; its configuration is changed.")],
    label_column: Annotated[str, typer.Option(help="Column of obs with the labels.")] = "cell_type",
    group_column: Annotated[
        str | None, typer.Option(help="Column of obs with donors: error rates then hold in each of them.")
    ] = None,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    allow: Allow = None,
    batch_size: BatchSize = "32",
) -> None:
    """Fit a checkpoint's probabilities to labelled cells that it was not trained on, so that --max-error can be asked.

    \b
    Example:
      screformer calibrate other_donor.h5ad --model finetuned --label-column cell_type
    """
    from .annotation.recalibration import calibrate_checkpoint
    from .train.batch_size import read_batch_size

    record = run(
        lambda: calibrate_checkpoint(
            cells,
            model,
            label_column=label_column,
            group_column=group_column,
            layer=layer,
            gene_column=gene_column,
            allow=allow or (),
            batch_size=read_batch_size(batch_size),
        )
    )
    for row in record["levels"]:
        say(
            f"level {row['level']}, {row['num_cells']} cells: calibration error "
            f"{row['expected_calibration_error']:.3f} (before {row['before']:.3f})"
        )
    least = min(record["error_rates"])
    say(f"{model}: calibrated on {record['num_cells']} cells; --max-error can be {least:.3g} or more")


@app.command()
def embed(
    cells: Cells,
    model: Model,
    output: Output,
    layer: Layer = None,
    gene_column: GeneColumn = None,
    allow: Allow = None,
    batch_size: BatchSize = "32",
    gene_space: Space = None,
    key: Key = "screformer",
    overwrite: Overwrite = False,
) -> None:
    """Give a vector for every cell: a copy with obsm["X_screformer"] (.h5ad), or a table (.csv, .tsv, .parquet).

    \b
    Example:
      screformer embed cells.h5ad --model quickstart/pretrained -o embedded.h5ad
    """
    from .annotation.embed import embed_file
    from .train.batch_size import read_batch_size

    def add() -> None:
        summary = embed_file(
            cells,
            model,
            output,
            layer=layer,
            gene_column=gene_column,
            allow=allow or (),
            batch_size=read_batch_size(batch_size),
            gene_space=gene_space,
            key=key,
            overwrite=overwrite,
        )
        say_once(str(summary))

    run(add)


for command in (explain, perturb, interactions, publish, verify):
    app.command()(command)


@app.command("app")
def web_page(
    model: Model,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 lets other computers in, without a password.")
    ] = "127.0.0.1",
    max_upload_mb: Annotated[int, typer.Option(min=1, help="The largest file that is taken, in megabytes.")] = 2048,
    write_space: Annotated[
        Path | None, typer.Option(help="Write this folder for a Hugging Face Space instead of serving the page.")
    ] = None,
) -> None:
    """Serve a web page that annotates an uploaded file: passport, cell types, plots, downloads; works offline.

    \b
    Example:
      screformer app --model quickstart/checkpoint --port 7860
      screformer app --model me/my-cell-types --write-space space
    """
    if write_space is not None:
        from .annotation.app_space import write_space as write

        say(run(lambda: write(write_space, model, max_upload_mb=max_upload_mb)))
        return
    from .annotation.app import serve

    run(lambda: serve(model, host=host, port=port, max_upload_mb=max_upload_mb, announce=say))


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("screformer").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait asleep instead of spinning: on a busy machine spinning threads halve the speed and more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()
