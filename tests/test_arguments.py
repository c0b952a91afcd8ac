import pytest

from screformer.train.argument_parser import parse_arguments
from screformer.train.arguments import (
    FineTuningArguments,
    FineTuningDataArguments,
    ModelArguments,
    PretrainingArguments,
    PretrainingDataArguments,
)


def parse(*argv, types=(PretrainingDataArguments, ModelArguments, PretrainingArguments)):
    return parse_arguments(
        types, argv, program="pretrain", description="Pretrain.", example="  pretrain --corpus corpus --preset tiny"
    )


def test_pretraining_defaults_are_the_papers():
    training = PretrainingArguments()
    assert (training.num_train_epochs, training.per_device_train_batch_size) == (50, 64)
    assert (training.lr_scheduler_type, training.warmup_steps, training.seed) == ("linear", 0.1, 2022)
    assert training.optim.startswith("adamw")
    assert (training.early_stopping_patience, training.metric_for_best_model) == (5, "eval_loss")
    assert training.greater_is_better is False
    data = PretrainingDataArguments(corpus="corpus")
    assert (data.held_out_fraction, data.masked_fraction, data.replace_probability) == (0.1, 0.15, 0.9)


def test_fine_tuning_defaults_are_the_papers():
    training = FineTuningArguments()
    assert (training.per_device_train_batch_size, training.gradient_accumulation_steps) == (6, 60)
    assert (training.learning_rate, training.num_train_epochs, training.seed) == (1e-4, 3, 2022)
    assert (training.early_stopping_patience, training.metric_for_best_model) == (1, "eval_accuracy")
    assert training.greater_is_better is True
    assert training.get_warmup_steps(1000) == 100
    data = FineTuningDataArguments(corpus="corpus")
    assert (data.validation_fraction, data.test_fraction) == (0.2, 0.2)


@pytest.mark.parametrize("training", [PretrainingArguments(), FineTuningArguments()])
def test_the_collator_gets_its_columns_and_nothing_is_reported_elsewhere(training):
    assert training.remove_unused_columns is False
    assert training.report_to in ([], "none")
    assert training.use_cpu is False


def test_flags_fill_the_dataclasses():
    data, model, training = parse(
        "--corpus", "cells", "--preset", "tiny", "--learning_rate", "3e-4", "--config_overrides", "hidden_size=32",
        "classifier_hidden_sizes=[8, 4]", "--gene-space", "expressed", "--overwrite",
    )  # fmt: skip
    assert (data.corpus, model.preset, training.learning_rate, training.overwrite) == ("cells", "tiny", 3e-4, True)
    expected = {"hidden_size": 32, "classifier_hidden_sizes": [8, 4], "gene_space": "expressed"}
    assert model.config_values() == expected


def test_a_yaml_file_says_the_same_as_flags_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "corpus: cells\npreset: tiny\nlearning_rate: 3e-4\nbf16: false\ncheckpoint: null\n"
        "config_overrides: {hidden_size: 32, attention: exact}\nlr_scheduler_kwargs: {num_cycles: 2}\nseed: 1\n"
    )
    data, model, training = parse(str(path), "--seed", "2")
    assert (data.corpus, model.preset, training.learning_rate, training.seed) == ("cells", "tiny", 3e-4, 2)
    assert model.config_values() == {"hidden_size": 32, "attention": "exact"}
    assert training.lr_scheduler_kwargs == {"num_cycles": 2}


def test_yaml_lists_fill_lists(tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("corpus: cells\ngroup_column: donor\ntest_groups: [human3, human4]\nexclude_labels: []\n")
    (data,) = parse(str(path), types=(FineTuningDataArguments,))
    assert (data.test_groups, data.exclude_labels) == (["human3", "human4"], [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--corpus", "c", "--learn_rate", "1"], "--learn_rate is unknown; did you mean --learning_rate?"),
        (["--corpus", "c", "--warmup_ratio", "0.1"], "--warmup_ratio is now --warmup_steps"),
        (["--corpus", "c", "cells"], "'cells' belongs to no argument"),
        (["--corpus", "c", "--xyzzy=1"], "--xyzzy is unknown"),
        (["--preset", "tiny"], "the following arguments are required: --corpus"),
        (["--corpus", "c", "--preset", "huge"], "invalid choice"),
        (["--corpus", "c", "--preset", "tiny", "--checkpoint", "x"], "leave out one or the other"),
        (["--corpus", "c", "--learning_rate", "fast"], "invalid float value: 'fast'"),
        (["absent.yaml"], "cannot read absent.yaml"),
    ],
)
def test_wrong_arguments_end_the_program_with_a_message(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_yaml_file_is_checked_like_flags(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    for text, message in (
        ("corpus: c\nwarmup_ratio: 0.1\n", "--warmup_ratio is now --warmup_steps"),
        ("- corpus\n", "must hold `name: value` lines, got list"),
        ("corpus: [\n", "cannot read"),
    ):
        path.write_text(text)
        with pytest.raises(SystemExit):
            parse(str(path))
        assert message in capsys.readouterr().err


def test_help_has_an_example_and_the_arguments_that_matter(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert "  pretrain --corpus corpus --preset tiny\n" in text
    assert "--learning_rate" in text
    assert "--torch_compile" not in text
    assert len(text.splitlines()) < 220  # all of TrainingArguments would be over 500


def test_help_all_has_every_training_argument(capsys):
    with pytest.raises(SystemExit):
        parse("--help_all")
    assert "--torch_compile" in capsys.readouterr().out


def test_overrides_must_be_pairs():
    with pytest.raises(ValueError, match=r"config_overrides must be name=value pairs, got 'hidden_size'"):
        ModelArguments(config_overrides=["hidden_size"]).config_values()


def test_groups_and_their_column_go_together():
    with pytest.raises(ValueError, match=r"test_groups=\['human4'\] and validation_groups=\[\] need group_column"):
        FineTuningDataArguments(corpus="c", test_groups=["human4"])
    with pytest.raises(ValueError, match="group_column='donor' needs test_groups"):
        FineTuningDataArguments(corpus="c", group_column="donor")
    with pytest.raises(ValueError, match=r"exclude_groups=\['human4'\] go together"):
        PretrainingDataArguments(corpus="c", exclude_groups=["human4"])
    with pytest.raises(ValueError, match="group_column='donor' and exclude_groups"):
        PretrainingDataArguments(corpus="c", group_column="donor")
