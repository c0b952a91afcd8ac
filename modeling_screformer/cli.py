"""The command line, ``screformer …``: reads arguments, calls the library, and says where the results are.

Heavy imports wait until a command runs, so that ``screformer --help`` answers at once.
"""

import logging
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

import typer

from . import __version__

app = typer.Typer(
    name="screformer",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="scReformer-BERT: from files of raw counts to cell types. Each command has --help with an example.",
)

benchmark = typer.Typer(no_args_is_help=True, help="Measure screformer beside its rivals; JSON, table and figure each.")
app.add_typer(benchmark, name="benchmark")

TRAINER_COMMAND = {
    "allow_extra_args": True,
    "ignore_unknown_options": True,
    "help_option_names": [],  # the training module's own parser answers --help
}
PAIR_HINT = "Give it once for each: --obs cell_type --obs donor."


Result = TypeVar("Result")
Layer = Annotated[str | None, typer.Option(help="Layer that holds the raw counts. Default: found by its values.")]
GeneColumn = Annotated[str | None, typer.Option(help="Column of var with Ensembl ids or symbols. Default: found.")]
Allow = Annotated[
    list[str] | None, typer.Option(help="Code of a problem to accept, as inspect names it. Give it once for each.")
]
Model = Annotated[str, typer.Option(help="Checkpoint folder or Hub id.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Where to write.")]
BatchSize = Annotated[
    str, typer.Option(help="Cells a forward pass, or auto: as many as fit into memory. The results stay the same.")
]
Space = Annotated[Literal["full", "expressed"] | None, typer.Option(help="Gene space instead of the checkpoint's own.")]
Key = Annotated[str, typer.Option(help="Prefix of what is added to the file.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
Cells = Annotated[
    str, typer.Argument(help="Raw counts: h5ad, zarr, 10x, loom, SOMA, as inspect reads them.", show_default=False)
]
MaxError = Annotated[
    float | None,
    typer.Option(help="Share of answers that may be wrong, such as 0.05: unsure cells back off to a broader type."),
]


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
) -> None:
    """Real pancreas cells become labels: corpus, pretraining, fine-tuning, test, annotation, report; in minutes.

    Run again, it goes on where it was stopped.

    \b
    Example:
      screformer quickstart --output quickstart
    """
    from .train.quickstart import quickstart as run

    prepare_quickstart_folder(output, overwrite=overwrite)
    result = _run(lambda: run(output, announce=_say))
    _say("")
    _say(f"{'Donor ' + result.metrics['test_donor']:<24}{'accuracy':>10}{'macro-F1':>10}")
    for name in ("model", "logistic_regression", "majority_class"):
        row = result.metrics[name]
        title = {"model": "scReformer-BERT"}.get(name, name.replace("_", " ").capitalize())
        _say(f"{title:<24}{row['accuracy']:>10.3f}{row['macro_f1']:>10.3f}")
    _say(result.metrics["verdict"])
    _say(result.metrics["answers_sentence"])
    _say(result.metrics["gene_spaces"]["sentence"])
    _say(f"\nReport: {output / 'report.html'}\nCheckpoint: {output / 'checkpoint'}")
    _say(f"Annotated cells: {output / 'annotated.h5ad'}")
    _say(f"To start over: screformer quickstart --output {output} --overwrite")


def prepare_quickstart_folder(output: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else; empty it of an earlier quickstart if asked to."""
    from shutil import rmtree

    from .train.quickstart import STAGES_FILE

    if not output.exists() or not any(output.iterdir()):
        return
    parts = ("corpus", "corpus.partial", STAGES_FILE)
    if not any((output / part).exists() for part in parts):
        _fail(f"--output {output} holds files that are no quickstart's. Choose another folder.")
    if overwrite:
        rmtree(output)
    else:
        _say(f"{output} exists: finished stages are kept. To start over: --overwrite")


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
        _say(str(passport))
        record = passport.to_dict()
        if against is not None and not passport.refusals:
            seen = find_seen_cells(file, against, layer=layer, gene_column=gene_column, allow=allow or ())
            _say(f"{'seen':<15}{seen.num_seen:,} of {seen.num_cells:,} cells ({seen.share:.1%}) are in {against}")
            record["seen"] = {"folder": str(against), "num_seen": seen.num_seen, "num_indexed": seen.num_indexed}
        if json is not None:
            write_json(json, record)
        return not passport.refusals

    if not _run(read):
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
        _say(made.summary())

    _run(build)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def pretrain(context: typer.Context) -> None:
    """Pretrain by predicting masked expression bins. Example: screformer pretrain pretrain-tiny --corpus corpus"""
    _hand_over("train.pretrain", context)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def finetune(context: typer.Context) -> None:
    """Fine-tune on cell types. Example: screformer finetune finetune-fast --corpus corpus --checkpoint pretrained"""
    _hand_over("train.finetune", context)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def distill(context: typer.Context) -> None:
    """Let a fine-tuned model teach a smaller one. Example: screformer distill --teacher finetuned --corpus corpus"""
    _hand_over("train.distill", context)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def evaluate(context: typer.Context) -> None:
    """Test a fine-tuned checkpoint. Example: screformer evaluate finetuned corpus --output evaluation"""
    _hand_over("train.evaluate", context)


@app.command(context_settings=TRAINER_COMMAND, add_help_option=False)
def gene2vec(context: typer.Context) -> None:
    """Gene vectors, our own or released. Example: screformer gene2vec --corpus corpus -o gene2vec.safetensors"""
    _hand_over("tokenization.own_gene2vec", context)


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
        _say_once(str(summary))

    _run(add)


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

    record = _run(
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
        _say(
            f"level {row['level']}, {row['num_cells']} cells: calibration error "
            f"{row['expected_calibration_error']:.3f} (before {row['before']:.3f})"
        )
    least = min(record["error_rates"])
    _say(f"{model}: calibrated on {record['num_cells']} cells; --max-error can be {least:.3g} or more")


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
        _say_once(str(summary))

    _run(add)


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

        _say(_run(lambda: write(write_space, model, max_upload_mb=max_upload_mb)))
        return
    from .annotation.app import serve

    _run(lambda: serve(model, host=host, port=port, max_upload_mb=max_upload_mb, announce=_say))


@benchmark.callback(invoke_without_command=True)
def benchmark_suite(
    context: typer.Context,
    suite: Annotated[
        Literal["small", "full"] | None,
        typer.Option(help="Compare all systems: on the packaged pancreas (small), and on files too (full)."),
    ] = None,
    cells: Annotated[
        list[str] | None, typer.Option(help="Of the full suite: FILE[:LABELS[:DONORS]]. Give it once for each.")
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="Only this system. Give it once for each.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each system and fold.")] = 1,
    work: Annotated[Path, typer.Option(help="Folder for the result of every run, which is not repeated.")] = Path(
        "runs/comparison"
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "benchmarks/results"
    ),
) -> None:
    """Measure screformer beside its rivals; JSON, table and figure each.

    \b
    Example:
      screformer benchmark --suite small --output benchmark
    """
    if context.invoked_subcommand is not None:
        return
    if suite is None:
        _fail("--suite small or full, or a command: see screformer benchmark --help")
    from .benchmarks.suites import run_suite

    chosen: Literal["small", "full"] = suite
    command = f"screformer benchmark --suite {suite} --seeds {seeds}"
    results = _run(
        lambda: run_suite(
            chosen, cells=cells or (), systems=system or (), seeds=seeds, output=output, work=work, command=command
        )
    )
    for result in results:
        _say(f"{result['question']} {output}")
        for row in result["systems"].values():
            _say(f"  {row['title']:<48} accuracy {row['accuracy']:.3f}  macro-F1 {row['macro_f1']:.3f}")


@benchmark.command("attention")
def benchmark_attention(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "benchmarks/results"
    ),
    checkpoint: Annotated[
        str | None, typer.Option(help="Checkpoint whose attention is compared. Default: base, fresh weights.")
    ] = None,
    only: Annotated[
        Literal["defaults", "speed"] | None,
        typer.Option(help="defaults: nearness to exact attention by setting; speed: ours beside other libraries."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few settings and short cells: minutes, not an hour.")] = False,
) -> None:
    """How near LSH attention comes to exact attention on real cells, by rounds, bucket size and hash, and its speed.

    \b
    Example:
      screformer benchmark attention --quick --output benchmark
    """
    fewer = ["--cells", "1", "--layers", "0", "--rounds", "1", "4", "--bucket-sizes", "64", "--repeats", "1"]
    shorter = ["--target-length", "4096", "--lengths", "1024", "2048", "--batch-sizes", "1", "--repeats", "1"]
    if only != "speed":
        of_checkpoint = [] if checkpoint is None else ["--checkpoint", checkpoint]
        _start(
            "benchmarks.hashing", ["--output", str(output), *of_checkpoint, *([*fewer, "--no-memory"] if quick else [])]
        )
    if only != "defaults":
        _start("benchmarks.attention", ["--output", str(output), *(shorter if quick else [])])


@benchmark.command("encoder", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_encoder(context: typer.Context) -> None:
    """Time and memory of encoders by depth, length and batch. Example: screformer benchmark encoder --depths 1 6"""
    _start("benchmarks.encoder", context.args)


@benchmark.command("memory", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_memory(context: typer.Context) -> None:
    """Predicted memory beside what a step takes. Example: screformer benchmark memory --presets tiny"""
    _start("benchmarks.memory", context.args)


@benchmark.command("kernels", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_kernels(context: typer.Context) -> None:
    """Registers and occupancy of the GPU kernels, without a GPU. Example: screformer benchmark kernels --head-dim 64"""
    _start("benchmarks.kernel_resources", context.args)


@benchmark.command("gpu", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_gpu(context: typer.Context) -> None:
    """Correctness, speed and memory on a GPU, against rivals. Example: screformer benchmark gpu --output runs"""
    _start("benchmarks.gpu", context.args)


@benchmark.command("rounds", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_rounds(context: typer.Context) -> None:
    """Masked genes predicted by kind of attention. Example: screformer benchmark rounds --seeds 2022"""
    _start("benchmarks.rounds", context.args)


@benchmark.command("fine-tuning", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_fine_tuning(context: typer.Context) -> None:
    """Fine-tuning beside logistic regression, with seeds. Example: screformer benchmark fine-tuning --seeds 1"""
    _start("benchmarks.fine_tuning", context.args)


@benchmark.command("unknown-types", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_unknown_types(context: typer.Context) -> None:
    """Cells of types left out of training, found or not. Example: screformer benchmark unknown-types --workers 2"""
    _start("benchmarks.unknown_types", context.args)


@benchmark.command("pretraining", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_pretraining(context: typer.Context) -> None:
    """Few and many labelled cells with and without it. Example: screformer benchmark pretraining --seeds 3"""
    _start("benchmarks.pretraining", context.args)


@benchmark.command("calibration", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_calibration(context: typer.Context) -> None:
    """Error rates asked for, and come true, on unseen donors. Example: screformer benchmark calibration --seeds 1"""
    _start("benchmarks.calibration", context.args)


@benchmark.command("annotating", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_annotating(context: typer.Context) -> None:
    """A large file annotated: memory, kill. Example: screformer benchmark annotating --model quickstart/checkpoint"""
    _start("benchmarks.annotating", context.args)


@benchmark.command("gene-spaces", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_gene_spaces(context: typer.Context) -> None:
    """Expressed genes beside every gene. Example: screformer benchmark gene-spaces --model quickstart/checkpoint"""
    _start("benchmarks.gene_spaces", context.args)


@benchmark.command("tokenizing", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_tokenizing(context: typer.Context) -> None:
    """Speed and memory of making a corpus. Example: screformer benchmark tokenizing --cells 1000000 --work scratch"""
    _start("benchmarks.tokenizing", context.args)


@benchmark.command("feeding", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_feeding(context: typer.Context) -> None:
    """Speed of reading a corpus in shuffled order. Example: screformer benchmark feeding --output benchmarks/results"""
    _start("benchmarks.feeding", context.args)


@benchmark.command("genes", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_genes(context: typer.Context) -> None:
    """Which genes interact, by their vectors. Example: screformer benchmark genes --pairs pairs.tsv --corpus corpus"""
    _start("benchmarks.gene_interactions", context.args)


@benchmark.command("donors", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_donors(context: typer.Context) -> None:
    """Cell types of donors never seen. Example: screformer benchmark donors --output benchmarks/results"""
    _start("benchmarks.donors", context.args)


def main() -> None:
    """Run the command line."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("screformer").setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that wait asleep instead of spinning: on a busy machine spinning threads halve the speed and more.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    app()


def _hand_over(module: str, context: typer.Context) -> None:
    """Let a training module's own command line read the arguments."""
    _start(module, context.args)


def _start(module: str, arguments: list[str]) -> None:
    import_module(f".{module}", __package__).main(arguments)


def _run(action: Callable[[], Result]) -> Result:
    """Call `action`; what a user can mend becomes a message instead of a traceback."""
    try:
        return action()
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))


def _say(text: str) -> None:
    typer.echo(text)


def _say_once(text: str) -> None:
    """Say it if this is the first of the processes that a launcher started."""
    if os.environ.get("RANK", "0") == "0":
        _say(text)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(1)
