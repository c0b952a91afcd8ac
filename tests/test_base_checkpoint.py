"""`screformer benchmark checkpoint`: packed, made, brought back and described, at toy width on packaged cells."""

import json
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import anndata
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from screformer.benchmarks import base_checkpoint, checkpoint_parcel, checkpoint_parts
from screformer.benchmarks.base_checkpoint import main, make_base_checkpoint
from screformer.benchmarks.base_checkpoint_report import format_checkpoint_report, write_checkpoint_card
from screformer.benchmarks.checkpoint_parcel import open_parcel, prepare_parcel
from screformer.benchmarks.checkpoint_parts import RECIPES, CheckpointOptions
from screformer.benchmarks.fine_tuning_runs import do_runs
from screformer.benchmarks.pretraining_report import summarize_pretraining
from screformer.model_cards.downstream_section import downstream_paragraphs, downstream_verdicts
from screformer.model_cards.publish import stage_checkpoint
from screformer.model_cards.verify import check_files
from screformer.tokenization import example_cells_path
from screformer.tokenization.corpus_files import checksum
from screformer.tokenization.gene2vec import GeneVectors
from screformer.tokenization.gene_vocabulary import GeneVocabulary

TYPES = ["alpha", "beta"]
QUICK = "--class_weights balanced --learning_rate 1e-3 --max_steps 2"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Cells of one donor that pretrain, of two that test."""
    folder = tmp_path_factory.mktemp("cells")
    adata = anndata.read_h5ad(example_cells_path())
    adata = adata[adata.obs["cell_type"].isin(TYPES)]
    for name, donors in (("one", ["human1"]), ("two", ["human2", "human3"]), ("all", ["human1", "human2", "human3"])):
        rows = [
            row
            for donor in donors
            for label in TYPES
            for row in ((adata.obs["donor"] == donor) & (adata.obs["cell_type"] == label)).to_numpy().nonzero()[0][:14]
        ]
        adata[rows].copy().write_h5ad(folder / f"{name}.h5ad")
    (folder / "sources.json").write_text(
        json.dumps({"one": {"citation": "Baron et al. 2016", "origin": "PyPI package came", "licence": "MIT"}})
    )
    return folder


@pytest.fixture(scope="module")
def parcel(files, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parcel")
    with pytest.MonkeyPatch.context() as patch:
        # gensim's five minutes of pairs say nothing here; that they are trained is tested elsewhere.
        patch.setattr(checkpoint_parcel, "gene2vec_of_corpus", some_vectors)
        main([
            "prepare", "--cells", str(files / "one.h5ad"), "--test", f"{files / 'two.h5ad'}:cell_type:donor",
            "--preset", "tiny", "--data-sources", str(files / "sources.json"),
            "-o", str(folder / "parcel.zip"), "--work", str(folder / "work"),
        ])  # fmt: skip
    return folder / "parcel.zip"


def some_vectors(corpus, *, num_dimensions):
    genes = GeneVocabulary.human_v1().ensembl_ids
    vectors = torch.randn(len(genes), num_dimensions, generator=torch.Generator().manual_seed(0)).numpy()
    return GeneVectors(list(genes), vectors)


@pytest.fixture(scope="module")
def brought_back(parcel, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_parts, "PILOT_STEPS", (1, 2))
        patch.setattr(checkpoint_parts, "do_runs", lambda runs, _, log: do_runs(runs, 1, log))  # no new processes
        patch.setitem(RECIPES, "tiny", RECIPES["tiny"]._replace(paper=QUICK))
        main([
            "run", "--parcel", str(parcel), "--minutes", "0.02", "--parts", "pretraining", "fine_tuning", "--use-cpu",
            "-o", str(folder / "out"), "--work", str(folder / "work"),
        ])  # fmt: skip
    return folder / "out"


def test_what_travels_is_small_and_holds_no_cell_that_tests(parcel, files, tmp_path):
    opened = open_parcel(parcel, tmp_path)
    (task,) = opened.tasks
    assert parcel.stat().st_size < checkpoint_parcel.MAX_BYTES
    assert (task.name, task.groups, task.group_column) == ("two", ("human2", "human3"), "donor")
    assert opened.facts["num_pretraining_cells"] + opened.facts["num_held_out_cells"] == 28
    (source,) = opened.facts["sources"]
    assert (source["name"], source["num_cells"], source["citation"]) == ("one", 28, "Baron et al. 2016")
    assert source["sha256"] == checksum(files / "one.h5ad")
    assert opened.facts["test_sources"] == [{"name": "two", "sha256": checksum(files / "two.h5ad")}]
    assert str(parcel.parent) not in json.dumps(opened.facts)
    assert open_parcel(parcel, tmp_path).tasks == opened.tasks
    with pytest.raises(ValueError, match=r"56 of 56 cells of two, which test, are among the cells that pretrain"):
        prepare_parcel(
            [files / "all.h5ad"], [f"{files / 'two.h5ad'}:cell_type:donor"], tmp_path / "x.zip", preset="tiny",
            work=tmp_path / "work",
        )  # fmt: skip
    assert not (tmp_path / "x.zip").exists()


def test_other_cells_do_not_become_the_corpus_that_is_there(files, parcel, tmp_path):
    with pytest.raises(ValueError, match="corpus"):
        prepare_parcel(
            [files / "all.h5ad"], [f"{files / 'two.h5ad'}:cell_type:donor"], tmp_path / "x.zip", preset="tiny",
            work=parcel.parent / "work",
        )  # fmt: skip


def test_a_parcel_that_is_too_large_or_none_is_refused(parcel, files, tmp_path):
    with pytest.raises(SystemExit, match=r"error: output: the parcel has .* MiB, and at most 0 may travel; leave out"):
        main([
            "prepare", "--cells", str(files / "one.h5ad"), "--test", f"{files / 'two.h5ad'}:cell_type:donor",
            "--preset", "tiny", "-o", str(tmp_path / "parcel.zip"), "--work", str(parcel.parent / "work"),
            "--max-mib", "0.1",
        ])  # fmt: skip
    assert not (tmp_path / "parcel.zip").exists()
    (tmp_path / "none.zip").write_text("no zip")
    with pytest.raises(SystemExit, match=r"error: parcel: .*none.zip is none"):
        main(["run", "--parcel", str(tmp_path / "none.zip"), "-o", str(tmp_path / "out"), "--work", str(tmp_path)])
    with pytest.raises(ValueError, match=r"parts got \['pretrain'\]"):
        make_base_checkpoint(parcel, tmp_path, work=tmp_path, options=CheckpointOptions(parts=["pretrain"]))


def test_the_checkpoint_loads_by_every_auto_class(brought_back, tmp_path):
    assert {path.name for path in brought_back.iterdir()} == {
        "results.json", "checkpoint.zip", "runs.zip", "report.md", "curves.png"
    }  # fmt: skip
    with zipfile.ZipFile(brought_back / "checkpoint.zip") as file:
        file.extractall(tmp_path / "checkpoint")
    weights = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert {one.dtype for name, one in weights.items() if "rotations" not in name} == {torch.bfloat16}
    assert {one.dtype for name, one in weights.items() if "rotations" in name} == {torch.float32}
    for auto_class in (AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification):
        model = auto_class.from_pretrained(tmp_path / "checkpoint")
        assert model.dtype == torch.float32
    assert len(AutoTokenizer.from_pretrained(tmp_path / "checkpoint")) > 0
    for path in (tmp_path / "checkpoint").glob("*.json"):
        assert str(brought_back.parent) not in path.read_text(), path.name
    metrics = json.loads((tmp_path / "checkpoint" / "metrics.json").read_text())
    results = json.loads((brought_back / "results.json").read_text())
    part = results["parts"]["pretraining"]
    assert metrics == part["metrics"]
    assert metrics["held_out_loss"] == pytest.approx(part["held_out_loss_before_rounding"], rel=0.01)
    assert 0 <= metrics["held_out_gene_majority_accuracy"] <= 1
    assert results["parcel"]["num_pretraining_cells"] == 26


def test_every_fold_has_its_twin_and_its_regression(brought_back):
    results = json.loads((brought_back / "results.json").read_text())
    assert results["parts"]["fine_tuning"]["made"]["device"] == results["device"]
    task = results["parts"]["fine_tuning"]["tasks"]["two"]
    told = {(run["system"], *run["groups"]) for run in task["runs"]}
    systems = {"pretrained", "scratch", "paper_pretrained", "paper_scratch", "logistic_regression"}
    assert told == {(system, donor) for system in systems for donor in ("human2", "human3")}
    text = (brought_back / "report.md").read_text()
    for words in (
        "## Pretraining",
        "of 0.02 that were asked for",
        "Of the masked genes of held-out cells",
        "2 folds, 1 seed",
        f"Made on {results['date']}, {results['device']['name']}",
    ):
        assert words in text
    assert str(brought_back.parent) not in text + (brought_back / "results.json").read_text()


def test_a_run_goes_on_from_what_was_brought_back(parcel, brought_back, tmp_path, monkeypatch):
    for name in ("pretrain_by", "round_weights"):
        monkeypatch.setattr(checkpoint_parts, name, None)  # would be called
    monkeypatch.setattr(
        checkpoint_parts, "run_ablations", lambda data, **given: {"notes": [data.name], "columns": ["a"], "rows": []}
    )
    main([
        "run", "--parcel", str(parcel), "--minutes", "7", "--parts", "ablations", "--use-cpu", "--earlier",
        str(brought_back), "-o", str(tmp_path / "out"), "--work", str(tmp_path / "work"),
    ])  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(results["parts"]) == ["pretraining", "fine_tuning", "ablations"]
    earlier = json.loads((brought_back / "results.json").read_text())
    assert results["parts"]["fine_tuning"] == earlier["parts"]["fine_tuning"]
    assert (tmp_path / "out" / "checkpoint.zip").exists()
    # Who asks for another checkpoint does not get this one.
    options = CheckpointOptions(7, ["pretraining"], use_cpu=True)
    with pytest.raises(ValueError, match=r"has a checkpoint that was made with minutes 0\.02, now 7; choose another"):
        make_base_checkpoint(parcel, tmp_path / "other", work=tmp_path / "work", options=options)


def test_there_must_be_a_checkpoint_to_fine_tune(parcel, tmp_path):
    options = CheckpointOptions(parts=["fine_tuning"], use_cpu=True)
    with pytest.raises(ValueError, match=r"there is no checkpoint in .* to fine-tune; add pretraining to the parts"):
        make_base_checkpoint(parcel, tmp_path / "out", work=tmp_path / "work", options=options)


def test_a_run_that_is_cut_short_leaves_the_records_of_what_was_done(parcel, brought_back, tmp_path, monkeypatch):
    monkeypatch.setattr(base_checkpoint, "SECONDS_BETWEEN", 0.05)

    def ablate_until_cut(data, *, work, **given):
        Path(work).mkdir()
        (Path(work) / "one.json").write_text("{}")
        (Path(work) / "one.npz").write_text("numbers")
        (Path(work) / "half.npz").write_text("numbers of a run that is not done")
        for _ in range(400):
            time.sleep(0.05)
            with zipfile.ZipFile(tmp_path / "out" / "runs.zip") as file:
                if "ablation_runs/one.json" in file.namelist():
                    raise KeyboardInterrupt
        raise AssertionError("no record came")

    monkeypatch.setattr(checkpoint_parts, "run_ablations", ablate_until_cut)
    options = CheckpointOptions(0.02, ["ablations"], use_cpu=True)
    with pytest.raises(KeyboardInterrupt):
        make_base_checkpoint(parcel, tmp_path / "out", work=tmp_path / "work", options=options, earlier=brought_back)
    with zipfile.ZipFile(tmp_path / "out" / "runs.zip") as file:
        kept = {name for name in file.namelist() if name.startswith("ablation_runs")}
    assert kept == {"ablation_runs/one.json", "ablation_runs/one.npz"}


def test_the_card_says_what_was_seen_and_what_it_is_worth(brought_back, tmp_path):
    path = write_checkpoint_card(brought_back, tmp_path)
    text = path.read_text()
    assert path.name == "screformer-tiny.md"
    for words in (
        "Is the pretraining worth it?", "| one | Baron et al. 2016 | PyPI package came | MIT |",
        "### two", "Logistic regression", "each gene's commonest bin", "AutoModelForMaskedLM",
    ):  # fmt: skip
        assert words.lower() in text.lower(), words
    assert str(brought_back.parent) not in text
    with pytest.raises(ValueError, match="name got 'a/b'"):
        write_checkpoint_card(brought_back, tmp_path, name="a/b")


def test_what_was_brought_back_can_be_published(brought_back, tmp_path, capsys):
    given = ["card", "--results", str(brought_back), "-o", str(tmp_path), "--checkpoint", str(tmp_path / "checkpoint")]
    main(given)
    assert "can be shared: screformer publish" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: checkpoint: .* is there; choose another folder"):
        main(given)
    stage_checkpoint(tmp_path / "checkpoint", tmp_path / "screformer-tiny")
    assert not [problem for check in check_files(tmp_path / "screformer-tiny") for problem in check.problems]
    told = (tmp_path / "screformer-tiny" / "README.md").read_text()
    assert "Is the pretraining worth it?" in told
    assert "| one.h5ad | h5ad | human | 28 |" in told


def test_an_earlier_run_that_is_not_there_or_is_damaged_is_refused(parcel, brought_back, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"earlier: .*nowhere has neither checkpoint.zip nor runs.zip"):
        make_base_checkpoint(parcel, tmp_path / "out", work=tmp_path / "work", earlier=tmp_path / "nowhere")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "runs.zip").write_bytes((brought_back / "runs.zip").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"earlier: .*runs\.zip is damaged .*; bring it back again"):
        make_base_checkpoint(parcel, tmp_path / "out", work=tmp_path / "work", earlier=tmp_path / "half")


def test_a_plan_is_of_what_was_asked(parcel, tmp_path, monkeypatch):
    def making(minutes):
        options = CheckpointOptions(minutes=minutes, use_cpu=True)
        return checkpoint_parts.CheckpointMaking(open_parcel(parcel, tmp_path), tmp_path, options)

    took = {f"pilot{steps}": steps for steps in checkpoint_parts.PILOT_STEPS}
    monkeypatch.setattr(
        checkpoint_parts.CheckpointMaking,
        "_run_pretraining",
        lambda self, folder, *_: SimpleNamespace(metrics={"training_seconds": took[folder]}),
    )
    assert making(1)._plan_steps() == (60, 1.0)
    took["pilot15"] = 27
    assert making(1)._plan_steps() == (60, 1.0)  # planned before
    assert making(2)._plan_steps() == (60, 2.0)
    (tmp_path / "pretrained").mkdir()
    with pytest.raises(ValueError, match=r"has a pretraining that was begun with .*'minutes': 2.*; choose"):
        making(3)._plan_steps()


def test_a_part_or_run_of_other_settings_or_weights_is_done_again(parcel, brought_back, tmp_path, monkeypatch):
    make_base_checkpoint(parcel, tmp_path / "out", work=tmp_path, options=CheckpointOptions(parts=[], use_cpu=True),
                         earlier=brought_back)  # fmt: skip
    done = []
    slow = RECIPES["tiny"]
    monkeypatch.setitem(RECIPES, "tiny", slow._replace(paper=QUICK))
    monkeypatch.setattr(checkpoint_parts, "do_runs", lambda runs, *_: done.extend(runs) or [])
    monkeypatch.setattr(checkpoint_parts, "summarize_pretraining", lambda runs, *_: {"runs": runs})

    def making(**options):
        given = CheckpointOptions(**{"minutes": 0.02, "use_cpu": True, **options})
        return checkpoint_parts.CheckpointMaking(open_parcel(parcel, tmp_path), tmp_path, given)

    making().do("fine_tuning")
    assert not done
    making(parts=["costs"], seeds=2).do("fine_tuning")
    assert not done  # was not asked for
    monkeypatch.setitem(RECIPES, "tiny", slow)
    making().do("fine_tuning")
    assert {run.name for run in done if not run.is_done()} == {"paper_pretrained", "paper_scratch"}
    monkeypatch.setitem(RECIPES, "tiny", slow._replace(paper=QUICK))
    done.clear()
    making(gene_space="full").do("fine_tuning")
    runs = {(run.name, run.test_groups): run for run in done}
    assert len(runs) == 10
    assert {run.is_done() for run in runs.values() if run.name == "logistic_regression"} == {True}
    assert {run.is_done() for run in runs.values() if run.name != "logistic_regression"} == {False}
    done.clear()
    weights = tmp_path / "release" / "model.safetensors"
    changed = {name: one + 1 for name, one in load_file(weights).items()}
    save_file(changed, weights, metadata={"format": "pt"})
    making().do("fine_tuning")
    assert {run.name for run in done if not run.is_done()} >= {"pretrained", "paper_pretrained"}
    assert all(run.is_done() for run in done if run.name in ("scratch", "logistic_regression"))


def test_what_was_left_out_is_tried_again(parcel, tmp_path, monkeypatch):
    making = checkpoint_parts.CheckpointMaking(open_parcel(parcel, tmp_path), tmp_path, CheckpointOptions(use_cpu=True))
    found = [([], {"scbert": "no package"}), ([], {}), ([], {})]
    monkeypatch.setattr(checkpoint_parts, "run_systems", lambda *_, **__: found.pop(0))
    assert making.do("scbert")["left_out"] == {"scbert": "no package"}
    assert making.do("scbert")["left_out"] == {}
    making.do("scbert")
    assert len(found) == 1
    ablated = [{"left_out": {"full": "no package"}}, {"left_out": {}}, {}]
    monkeypatch.setattr(checkpoint_parts, "run_ablations", lambda *_, **__: ablated.pop(0))
    for _ in range(3):
        making.do("ablations")
    assert ablated == [{}]


RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
README = RESULTS.parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="no checkout")
def test_the_committed_report_and_what_the_readme_says_of_it_are_of_the_json():
    found = json.loads((RESULTS / "checkpoint-tiny.json").read_text())
    page = format_checkpoint_report(found).replace("(curves.png)", "(checkpoint-tiny-curves.png)")
    assert page == (RESULTS / "checkpoint-tiny.md").read_text()
    minutes = found["parts"]["pretraining"]["metrics"]["training_seconds"] / 60
    text = " ".join(README.read_text(encoding="utf-8").split())
    assert f"{minutes:.0f} minutes of pretraining with one thread, other work beside it, and one seed" in text
    assert (found["options"]["seeds"], found["device"]["threads"]) == (1, 1)
    tasks = found["parts"]["fine_tuning"]
    twins = [line for task in tasks["tasks"] for line in downstream_verdicts(tasks, task)[: len(tasks["twins"])]]
    assert len(twins) == 4
    assert all("ties with" in line for line in twins)


def test_verdicts_follow_the_interval():
    def run(system, seed, **groups):
        scores = {group: {"accuracy": score, "macro_f1": score} for group, score in groups.items()}
        return {"system": system, "seed": seed, "groups": scores}

    titles = {"logistic_regression": "Regression", "ours": "Ours", "twin": "Twin"}
    for less, words in ((0.1, "Ours beats Twin"), (-0.1, "Ours loses to Twin"), (0.0, "Ours ties with Twin")):
        ours = dict(zip("abcde", (0.7, 0.8, 0.6, 0.65, 0.75), strict=True))
        runs = [run("logistic_regression", 0, **dict.fromkeys("abcde", 0.5))]
        runs += [run("ours", seed, **ours) for seed in range(2)]
        runs += [run("twin", seed, **{fold: score - less for fold, score in ours.items()}) for seed in range(2)]
        compared = [("ours", "twin"), ("ours", "logistic_regression")]
        found = {
            "titles": titles,
            "twins": [["ours", "twin"]],
            "tasks": {"set": summarize_pretraining(runs, titles, compared)},
        }
        assert downstream_verdicts(found, "set")[0].startswith(words)
        assert any("| Ours | 0.700 | 0.700 |" in text for text in downstream_paragraphs(found))


def test_four_folds_make_no_claim_and_one_has_no_interval():
    titles = {"logistic_regression": "Regression", "ours": "Ours", "twin": "Twin"}
    for folds, words in (
        ("abcd", "4 folds, 9 seeds, and 5 folds are needed for a claim."),
        ("a", "one fold is too few"),
    ):
        runs = [
            {"system": name, "seed": seed, "groups": {fold: {"accuracy": score, "macro_f1": score} for fold in folds}}
            for name, score in (("logistic_regression", 0.5), ("ours", 0.9), ("twin", 0.7))
            for seed in range(9)
        ]
        compared = [("ours", "twin"), ("ours", "logistic_regression")]
        task = summarize_pretraining(runs, titles, compared)
        told = downstream_verdicts({"titles": titles, "twins": [["ours", "twin"]], "tasks": {"set": task}}, "set")
        assert all(words in line for line in told)
