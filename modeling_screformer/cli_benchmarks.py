"""The command line of measurements, ``screformer benchmark …``: ours beside rivals, and ours alone."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .cli_messages import TRAINER_COMMAND, fail, run, say, start

benchmark = typer.Typer(no_args_is_help=True, help="Measure screformer beside its rivals; JSON, table and figure each.")


@benchmark.callback(invoke_without_command=True)
def benchmark_suite(
    context: typer.Context,
    suite: Annotated[
        Literal["small", "full", "across"] | None,
        typer.Option(
            help="small: quick systems on the packaged pancreas, each donor held out. full: all systems, on files too. "
            "across: train on one file, test on another."
        ),
    ] = None,
    cells: Annotated[
        list[str] | None, typer.Option(help="FILE[:LABELS[:DONORS]], not for small. Give it once for each.")
    ] = None,
    label_map: Annotated[
        Path | None, typer.Option(help="JSON: {name of a file: {its label: label of the comparison}}.")
    ] = None,
    few_labels: Annotated[
        list[int] | None, typer.Option(help="Train on so many cells of each type, too. Give it once for each.")
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="Folds instead of the suite's: random (60/20/20), five_fold, leave_one_group_out. Once for each."
        ),
    ] = None,
    split: Annotated[
        list[Path] | None, typer.Option(help="Split file of one of the data sets, instead of folds. Once for each.")
    ] = None,
    marker_table: Annotated[
        str | None, typer.Option(help="FILE[:TISSUE,TISSUE], csv like CellMatch, for the system sccatch_cellmatch.")
    ] = None,
    marker_types: Annotated[
        Path | None, typer.Option(help="JSON: {name: {tissues: [of the table], types: {type of the table: label}}}.")
    ] = None,
    system: Annotated[list[str] | None, typer.Option(help="Only this system. Give it once for each.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each system and fold.")] = 1,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at once, a thread each. Default: the cores, at most 4; with a GPU 1."),
    ] = None,
    note: Annotated[str | None, typer.Option(help="Sentence for readers of the tables: what ran beside.")] = None,
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
        fail("--suite small, full or across, or a command: see screformer benchmark --help")
    from .benchmarks.suites import default_workers, run_suite

    chosen: Literal["small", "full", "across"] = suite
    given = [f" --cells {Path(one).name}" for one in cells or ()] + [f" --system {name}" for name in system or ()]
    given += [f" --few-labels {number}" for number in few_labels or ()]
    given += [f" --kind {one}" for one in kind or ()] + [f" --split {one.name}" for one in split or ()]
    given += [f" --label-map {label_map.name}"] if label_map else []
    given += [f" --marker-table {Path(marker_table).name}"] if marker_table else []
    given += [f" --marker-types {marker_types.name}"] if marker_types else []
    given += [f" --workers {workers}"] if workers else []
    command = f"screformer benchmark --suite {suite}{''.join(given)} --seeds {seeds}"
    results = run(
        lambda: run_suite(
            chosen,
            cells=cells or (),
            systems=system or (),
            label_map=label_map,
            few_labels=few_labels or (),
            kinds=kind or (),
            splits=split or (),
            marker_table=marker_table,
            marker_types=marker_types,
            seeds=seeds,
            output=output,
            work=work,
            command=command,
            note=note,
            num_workers=workers or default_workers(),
        )
    )
    for result in results:
        say(f"{result['question']} ({result['kind'].replace('_', ' ')}) {output}")
        for row in result["systems"].values():
            say(f"  {row['title']:<48} accuracy {row['accuracy']:.3f}  macro-F1 {row['macro_f1']:.3f}")


@benchmark.command("systems")
def benchmark_systems() -> None:
    """Every system of the comparison, and what this machine lacks for it.

    \b
    Example:
      screformer benchmark systems
    """
    from .benchmarks.known_systems import missing_packages
    from .benchmarks.suites import known_systems

    for name, make in known_systems().items():
        system = make()
        kind = "inductive" if system.is_inductive else "transductive"
        say(f"{name:<20} {system.title:<36} {kind:<12}  {'; '.join(missing_packages(name)) or 'ready'}")


@benchmark.command("heart")
def benchmark_heart(
    source: Annotated[
        Literal["litvinukova2020", "tucker2020", "wang2020", "heca"] | None, typer.Option(help="The data set.")
    ] = None,
    cells: Annotated[
        list[Path] | None, typer.Option(help="Its file, as downloaded. Of wang2020 give it for each text matrix.")
    ] = None,
    annotation: Annotated[Path | None, typer.Option(help="Of wang2020's text matrices: the table of clusters.")] = None,
    kind: Annotated[
        Literal["random", "five_fold", "leave_one_group_out"],
        typer.Option(help="random: the paper's 60/20/20 of the cells. leave_one_group_out: each donor held out."),
    ] = "random",
    system: Annotated[list[str] | None, typer.Option(help="Only this system. Give it once for each.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of each system and fold.")] = 1,
    max_cells: Annotated[int | None, typer.Option(help="Draw so many, each type by its share: less memory.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of cell types, if it is another.")] = None,
    donor_column: Annotated[str | None, typer.Option(help="Column of donors, if it is another.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Only look whether the file fits.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path(
        "benchmarks/results"
    ),
    work: Annotated[Path, typer.Option(help="Folder for the result of every run, which is not repeated.")] = Path(
        "runs/comparison"
    ),
) -> None:
    """The paper's heart data through the comparison. Without --cells: where to get them, and what is expected.

    \b
    Example:
      screformer benchmark heart --source litvinukova2020 --cells global_raw.h5ad --check
    """
    from .benchmarks import heart
    from .benchmarks.heart_sources import format_source, heart_sources

    if source is None or not cells:
        shown = [one for one in heart_sources().values() if source in (None, one.name)]
        say("\n\n".join(format_source(one) for one in shown))
        return
    name: str = source
    path = run(lambda: heart.cells_of_source(name, cells, annotation=annotation, work=work))
    checked = run(lambda: heart.check_heart_cells(name, path, label_column=label_column, donor_column=donor_column))
    say(heart.format_check(checked))
    if check:
        return
    given = "".join(f" --system {one}" for one in system or ()) + (f" --max-cells {max_cells}" if max_cells else "")
    command = f"screformer benchmark heart --source {name} --cells {path.name} --kind {kind}{given} --seeds {seeds}"
    result = run(
        lambda: heart.compare_on_heart(
            checked,
            kind=kind,
            systems=system or (),
            seeds=seeds,
            max_cells=max_cells,
            output=output,
            work=work,
            command=command,
        )
    )
    say(f"\n{result['question']} ({result['kind'].replace('_', ' ')}) {output}")
    for row in result["systems"].values():
        say(f"  {row['title']:<48} accuracy {row['accuracy']:.3f}  macro-F1 {row['macro_f1']:.3f}")


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
        start(
            "benchmarks.hashing", ["--output", str(output), *of_checkpoint, *([*fewer, "--no-memory"] if quick else [])]
        )
    if only != "defaults":
        start("benchmarks.attention", ["--output", str(output), *(shorter if quick else [])])


@benchmark.command("encoder", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_encoder(context: typer.Context) -> None:
    """Time and memory of encoders by depth, length and batch. Example: screformer benchmark encoder --depths 1 6"""
    start("benchmarks.encoder", context.args)


@benchmark.command("memory", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_memory(context: typer.Context) -> None:
    """Predicted memory beside what a step takes. Example: screformer benchmark memory --presets tiny"""
    start("benchmarks.memory", context.args)


@benchmark.command("kernels", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_kernels(context: typer.Context) -> None:
    """Registers and occupancy of the GPU kernels, without a GPU. Example: screformer benchmark kernels --head-dim 64"""
    start("benchmarks.kernel_resources", context.args)


@benchmark.command("gpu", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_gpu(context: typer.Context) -> None:
    """Correctness, speed and memory on a GPU, against rivals. Example: screformer benchmark gpu --output runs"""
    start("benchmarks.gpu", context.args)


@benchmark.command("rounds", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_rounds(context: typer.Context) -> None:
    """Masked genes predicted by kind of attention. Example: screformer benchmark rounds --seeds 2022"""
    start("benchmarks.rounds", context.args)


@benchmark.command("fine-tuning", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_fine_tuning(context: typer.Context) -> None:
    """Fine-tuning beside logistic regression, with seeds. Example: screformer benchmark fine-tuning --seeds 1"""
    start("benchmarks.fine_tuning", context.args)


@benchmark.command("unknown-types", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_unknown_types(context: typer.Context) -> None:
    """Cells of types left out of training, found or not. Example: screformer benchmark unknown-types --workers 2"""
    start("benchmarks.unknown_types", context.args)


@benchmark.command("pretraining", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_pretraining(context: typer.Context) -> None:
    """Few and many labelled cells with and without it. Example: screformer benchmark pretraining --seeds 3"""
    start("benchmarks.pretraining", context.args)


@benchmark.command("calibration", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_calibration(context: typer.Context) -> None:
    """Error rates asked for, and come true, on unseen donors. Example: screformer benchmark calibration --seeds 1"""
    start("benchmarks.calibration", context.args)


@benchmark.command("annotating", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_annotating(context: typer.Context) -> None:
    """A large file annotated: memory, kill. Example: screformer benchmark annotating --model quickstart/checkpoint"""
    start("benchmarks.annotating", context.args)


@benchmark.command("gene-spaces", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_gene_spaces(context: typer.Context) -> None:
    """Expressed genes beside every gene. Example: screformer benchmark gene-spaces --model quickstart/checkpoint"""
    start("benchmarks.gene_spaces", context.args)


@benchmark.command("tokenizing", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_tokenizing(context: typer.Context) -> None:
    """Speed and memory of making a corpus. Example: screformer benchmark tokenizing --cells 1000000 --work scratch"""
    start("benchmarks.tokenizing", context.args)


@benchmark.command("feeding", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_feeding(context: typer.Context) -> None:
    """Speed of reading a corpus in shuffled order. Example: screformer benchmark feeding --output benchmarks/results"""
    start("benchmarks.feeding", context.args)


@benchmark.command("genes", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_genes(context: typer.Context) -> None:
    """Which genes interact, by their vectors. Example: screformer benchmark genes --pairs pairs.tsv --corpus corpus"""
    start("benchmarks.gene_interactions", context.args)


@benchmark.command("attention-interactions", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_attention_interactions(context: typer.Context) -> None:
    """Genes that interact, by attention. Example: screformer benchmark attention-interactions --model m --pairs p"""
    start("benchmarks.attention_interactions", context.args)


@benchmark.command("ablations", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_ablations(context: typer.Context) -> None:
    """What each part of the method is worth. Example: screformer benchmark ablations --names not_pretrained"""
    start("benchmarks.ablations", context.args)


@benchmark.command("checkpoint", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_checkpoint(context: typer.Context) -> None:
    """A base checkpoint, made and tested: prepare, run, card. Example: screformer benchmark checkpoint --help"""
    start("benchmarks.base_checkpoint", context.args)


@benchmark.command("explanations", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_explanations(context: typer.Context) -> None:
    """Explanations of test cells, by all methods. Example: screformer benchmark explanations --class beta"""
    start("benchmarks.explanations", context.args)


@benchmark.command("donors", context_settings=TRAINER_COMMAND, add_help_option=False)
def benchmark_donors(context: typer.Context) -> None:
    """Cell types of donors never seen. Example: screformer benchmark donors --output benchmarks/results"""
    start("benchmarks.donors", context.args)


@benchmark.command("report")
def benchmark_report(
    results: Annotated[Path, typer.Option(help="Folder with the results of screformer benchmark --suite.")] = Path(
        "benchmarks/results"
    ),
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the page and its figures.")] = Path(
        "benchmarks/results"
    ),
    readme: Annotated[
        Path | None, typer.Option(help="Also replace what is between the marks of the benchmark table in this file.")
    ] = None,
) -> None:
    """All comparisons in a folder as one page: who is ahead, tables and figures; Markdown, HTML and JSON.

    \b
    Example:
      screformer benchmark report --results benchmark --output benchmark
    """
    from .benchmarks.comparison_report import write_benchmark_report

    say(str(run(lambda: write_benchmark_report(results, output, readme=readme))))
