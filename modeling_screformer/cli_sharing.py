"""Commands that share a checkpoint and prove one that was shared."""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .cli_messages import run, say


def publish(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder.", show_default=False)],
    to: Annotated[str, typer.Option(help="ORGANISATION/NAME on the Hub, or a folder to make (./NAME).")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Training data for the card: 'NAME|CITATION|ORIGIN|LICENCE'. Once for each."),
    ] = None,
    counts: Annotated[
        Path | None,
        typer.Option(help="File of the labelled cells it was trained on: puts logistic regression beside it."),
    ] = None,
    pretraining: Annotated[Path | None, typer.Option(help="Folder of the pretraining that it started from.")] = None,
    other_split: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of the same settings trained and evaluated on another split, for the card."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Title of the card. Default: the card's, or the folder.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of weights and code. Default: the card's.")] = None,
    licence_file: Annotated[Path | None, typer.Option(help="Its text, if it is another.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Make a new repository that everybody sees.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch on the Hub. Default: main.")] = None,
    allow_holes: Annotated[
        bool, typer.Option("--allow-holes", help="Publish though the card does not know everything.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be uploaded, and stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before uploading.")] = False,
) -> None:
    """Share a checkpoint: card, checks, licence and made-up golden cells join it; it is verified, shown, and uploaded.

    A new repository is private unless you say otherwise. Without --to a Hub name nothing reads the network.

    \b
    Examples:
      screformer publish quickstart/checkpoint --to ./shared_checkpoint
      screformer publish quickstart/checkpoint --to me/pancreas-tiny --dry-run
    """
    from .model_cards.hub_upload import refuse_offline
    from .model_cards.publish import describe_files, hub_name, refuse_card_fields, stage_checkpoint

    repo_id = run(lambda: hub_name(to))
    if repo_id is not None and not dry_run:
        run(lambda: refuse_offline(repo_id))
    given = {"model_name": name, "data_sources": data, "results": counts, "other_splits": other_split}
    given |= {"pretraining": pretraining}
    run(lambda: refuse_card_fields(folder, [field for field, one in given.items() if one]))  # before measuring
    with tempfile.TemporaryDirectory() as place:
        target = Path(to) if repo_id is None and not dry_run else Path(place, Path(to).resolve().name)
        files = run(
            lambda: stage_checkpoint(
                folder,
                target,
                card=_card_fields(
                    folder, repo_id or target.name, data, counts, pretraining, name, licence, other_split
                ),
                allow_holes=allow_holes,
                licence_file=licence_file,
            )
        )
        say("\n".join(describe_files(files)))
        if dry_run:
            say("Nothing was published: --dry-run.")
        elif repo_id is not None:
            _upload(target, repo_id, public=public, revision=revision, yes=yes)
        else:
            say(f"{target} is ready, and verifies: screformer verify {target}")


def _card_fields(
    folder: Path,
    source: str,
    data: list[str] | None,
    counts: Path | None,
    pretraining: Path | None,
    name: str | None,
    licence: str | None,
    other_split: list[Path] | None,
) -> dict[str, Any]:  # Any: fields of CardInputs
    """Return what the command line says that the card is to say."""
    from .model_cards.card_inputs import DataSource, records_of_pretraining
    from .model_cards.other_splits import record_of_split

    fields: dict[str, Any] = {"repo_id": source}
    if name is not None:
        fields["model_name"] = name
    if licence is not None:
        fields["licence"] = licence
    if pretraining is not None:
        fields["pretraining"] = records_of_pretraining(pretraining)
    if counts is not None:
        fields["results"] = _results_of(folder, counts)
    if other_split:
        fields["other_splits"] = [record_of_split(one, folder, _results_of(one, counts)) for one in other_split]
    sources = [source.split("|") for source in data or ()]
    wrong = next((source for source in sources if len(source) != len(DataSource._fields)), None)
    if wrong is not None:
        raise ValueError(f"--data got {'|'.join(wrong)!r}; four parts are needed: 'NAME|CITATION|ORIGIN|LICENCE'")
    if sources:
        fields["data_sources"] = [DataSource(*(part.strip() for part in source)) for source in sources]
    return fields


def _results_of(folder: Path, counts: Path | None) -> dict[str, Any]:  # Any: metrics
    """Return what `screformer evaluate` found, and baselines on the same split if there are counts to measure them."""
    from .benchmarks.checkpoint_baselines import score_baselines
    from .model_cards.card_inputs import checked_results
    from .model_cards.comparison import MODEL
    from .model_cards.publish import refuse_other_scores
    from .train.result_files import read_json

    path = folder / "evaluation.json"
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} has no evaluation.json; make it first: screformer evaluate {folder} CORPUS --output {folder}"
        )
    refuse_other_scores(folder)
    own = read_json(path)
    beside = {}
    if counts is not None:
        if "label_names" not in own:
            raise ValueError(f"{path} has no label_names; make it with screformer evaluate, which names them")
        seed = read_json(folder / "splits.json")["seed"]
        say(f"{folder}: logistic regression on its split")
        beside = score_baselines(counts, folder, own["label_names"], seed=seed)
    results = checked_results({MODEL: own, **beside})
    assert results is not None
    return dict(results)


def _upload(staged: Path, repo_id: str, *, public: bool, revision: str | None, yes: bool) -> None:
    from .model_cards.hub_upload import upload_checkpoint

    kind = "for everybody to see" if public else "private, if it is new"
    question = (
        f"Upload to {repo_id} ({kind})? Files that are there and not here go; the repository's history keeps them."
    )
    if not yes and not typer.confirm(question):
        say("Nothing was uploaded.")
        return
    address = run(lambda: upload_checkpoint(staged, repo_id, private=not public, revision=revision))
    say(f"Published: {address}\nProve it: screformer verify {repo_id}")


def verify(
    checkpoint: Annotated[str, typer.Argument(help="Published folder or Hub id.", show_default=False)],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run its code though it is not that of this release.")
    ] = False,
    json: Annotated[Path | None, typer.Option("--json", help="Write what was found here.")] = None,
) -> None:
    """Prove a published checkpoint: files, code, vocabulary, card, and what it makes of its golden cells.

    Exits with 1 if anything is wrong, and names it. The code beside the weights runs only if it is this package's.

    \b
    Examples:
      screformer verify shared_checkpoint
      screformer verify me/pancreas-tiny --revision main
    """
    from .model_cards.hub_upload import download_checkpoint
    from .model_cards.publish import is_repo_id
    from .model_cards.verify import verify_checkpoint
    from .train.result_files import write_json

    def check() -> bool:
        is_hub = not Path(checkpoint).is_dir() and is_repo_id(checkpoint)
        place = download_checkpoint(checkpoint, revision=revision) if is_hub else Path(checkpoint)
        found = verify_checkpoint(place, trust_code=trust_remote_code)
        for one in found:
            say(f"{'FAIL' if one.problems else 'ok':<5}{one.name}")
            for problem in one.problems:
                say(f"       {problem}")
        if json is not None:
            write_json(json, [one._asdict() for one in found])
        return not any(one.problems for one in found)

    if not run(check):
        sys.exit(1)
