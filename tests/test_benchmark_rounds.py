"""The comparison of hash rounds by what is learned, at toy size."""

import json

import pytest

from screformer.benchmarks.rounds import SETTINGS, compare_rounds, main


def test_every_setting_is_one_that_a_model_accepts_and_differs():
    from screformer.configuration_screformer import ScReformerConfig
    from screformer.train.arguments import ModelArguments

    shapes = set()
    for setting in SETTINGS.values():
        values = ModelArguments(preset="tiny", config_overrides=list(setting.overrides)).config_values()
        config = ScReformerConfig.preset("tiny", **values)
        shapes.add((config.attention, config.hashing, config.num_hashes))
    assert len(shapes) == len(SETTINGS)


@pytest.mark.slow  # of the packaged cells, all of them
def test_settings_are_compared_with_every_seed(tmp_path):
    results = compare_rounds(
        tmp_path / "work", tmp_path, settings=["sign_1", "exact"], seeds=[1, 2], max_steps=1, command="a test"
    )
    assert [(run["setting"], run["seed"]) for run in results["runs"]] == [
        ("sign_1", 1), ("exact", 1), ("sign_1", 2), ("exact", 2)
    ]  # fmt: skip
    summary = results["settings"]["exact"]
    losses = [run["held_out_loss"] for run in results["runs"] if run["setting"] == "exact"]
    assert summary["held_out_loss"] == pytest.approx(sum(losses) / 2, abs=1e-4)
    assert summary["held_out_loss_spread"] > 0
    assert losses[0] != results["runs"][0]["held_out_loss"]  # the settings are not the same function
    assert json.loads((tmp_path / "rounds.json").read_text()) == results
    text = (tmp_path / "rounds.md").read_text()
    assert "sign hashing, 1 round " in text
    assert f"{summary['held_out_loss']:.4f}" in text
    assert (tmp_path / "rounds.png").stat().st_size > 1000


def test_an_unknown_setting_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"sign_1.*got \['nothing'\]"):
        main(["--work", str(tmp_path), "--settings", "nothing"])
    assert not list(tmp_path.iterdir())
