"""A checkpoint folder opens through transformers' Auto classes, with this package and without it.

Seven ways in which a model of another library goes wrong in transformers without a word, and the tests that guard them:

1. the loss is chosen by the class name:
   test_modeling_screformer.py, test_the_cell_head_has_the_unshifted_classification_loss; as remote code:
   test_without_the_package_every_auto_class_opens_every_folder
2. accumulated gradients are summed, not averaged:
   test_finetune.py and test_pretrain.py, test_accumulation_changes_neither_loss_nor_gradient
3. a folder names only the class that saved it:
   test_every_saved_config_names_every_class
4. code that is not flat breaks saving or loading:
   test_code_beside_a_checkpoint_is_flat_and_needs_only_what_every_user_has
5. a tokenizer without its class falls back to another:
   test_the_tokenizer_names_its_class
6. no gradients in eval mode:
   test_modeling_screformer.py, test_gradients_flow_in_eval_mode_and_equal_the_plain_twin; as remote code:
   test_without_the_package_every_auto_class_opens_every_folder
7. configuration and model come from two copies of the code:
   test_model_code_never_asks_which_class_the_configuration_has
"""

import ast
import inspect
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_corpus import NUM_GENES, make_cells, make_tokenizer

from screformer import (
    ScReformerConfig,
    ScReformerForCellClassification,
    ScReformerForMaskedLM,
    ScReformerModel,
    ScReformerTokenizer,
)

PACKAGE_CLASSES = {
    "AutoConfig": ScReformerConfig,
    "AutoModel": ScReformerModel,
    "AutoModelForMaskedLM": ScReformerForMaskedLM,
    "AutoModelForSequenceClassification": ScReformerForCellClassification,
    "AutoTokenizer": ScReformerTokenizer,
}
SAVED_CLASSES = {
    "base": ScReformerModel,
    "masked": ScReformerForMaskedLM,
    "cells": ScReformerForCellClassification,
}
MODEL_FILES = {
    "cell_classifier.py",
    "configuration_screformer.py",
    "lsh_attention.py",
    "lsh_attention_blocked.py",
    "lsh_attention_triton.py",
    "lsh_hashing.py",
    "modeling_screformer.py",
    "reversible.py",
    "token_blocks.py",
}
TOKENIZER_FILES = {"expression_bins.py", "gene_vocabulary.py", "row_tokens.py", "tokenization_screformer.py"}
OPTIONAL = {"lsh_attention_triton.py": {"triton"}}  # imported within `try`
THIRD_PARTY = {"numpy", "torch", "transformers", "huggingface_hub", "tokenizers"}
REPOSITORY = Path(__file__).parents[1]
SOURCE_FOLDERS = ("modeling_screformer", "tokenization", "train", "annotation", "benchmarks", "model_cards")
SOURCES = [path for folder in SOURCE_FOLDERS for path in sorted((REPOSITORY / folder).glob("*.py"))]

# What the Auto classes, and the package's own, make of the first cells of the example corpus.
COUNTS = make_cells(6).X.toarray().tolist()
GENE_NAMES = list(make_cells(6).var_names)


def read_folder(folder, classes, counts, gene_names, **options):
    """Return arrays and facts: what the classes make of a folder. Its source also runs where the package is absent."""
    import torch

    config = classes["AutoConfig"].from_pretrained(folder, **options)
    tokenizer = classes["AutoTokenizer"].from_pretrained(folder, **options)
    facts = {
        "config": {name: value for name, value in config.to_diff_dict().items() if name != "_name_or_path"},
        "id2label": config.id2label,
        "fingerprint": tokenizer.fingerprint,
        "modules": {"AutoConfig": type(config).__module__, "AutoTokenizer": type(tokenizer).__module__},
        "classes": {"AutoConfig": type(config).__name__, "AutoTokenizer": type(tokenizer).__name__},
        "missing": {},
    }
    spaces = ("full", "expressed")
    batches = {
        space: tokenizer(counts, gene_names=gene_names, gene_space=space, return_tensors="pt") for space in spaces
    }
    arrays = {f"{space} {name}": tensor.numpy() for space in spaces for name, tensor in batches[space].items()}
    models = {}
    for auto_name in ("AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"):
        torch.manual_seed(0)  # a head that the folder lacks is drawn alike
        model, report = classes[auto_name].from_pretrained(folder, output_loading_info=True, **options)
        models[auto_name] = model.eval()
        facts["missing"][auto_name] = sorted(report["missing_keys"])
        facts["modules"][auto_name], facts["classes"][auto_name] = type(model).__module__, type(model).__name__
        for space, batch in batches.items():
            with torch.no_grad():
                arrays[f"{auto_name} {space} states"] = model.base_model(**batch).last_hidden_state.numpy()
                if auto_name != "AutoModel":
                    arrays[f"{auto_name} {space} logits"] = model(**batch).logits.numpy()
    classifier = models["AutoModelForSequenceClassification"]
    batch = batches["full"]
    embeddings = classifier.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    logits = classifier(**batch, inputs_embeds=embeddings).logits
    arrays["gradient"] = torch.autograd.grad(logits[:, 0].sum(), embeddings)[0].numpy()
    labels = torch.arange(len(logits)) % logits.shape[1]
    arrays["loss"] = classifier(**batch, labels=labels).loss.detach().numpy()
    arrays["expected loss"] = torch.nn.functional.cross_entropy(logits, labels).detach().numpy()
    return arrays, facts, {**models, "AutoTokenizer": tokenizer}


WITHOUT_THE_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "screformer":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

# Each is a program's first line; then every Auto class must know the model type.
IMPORT_ORDERS = {
    "package_then_trainer": "import screformer; from transformers import Trainer, pipeline",
    "transformers_then_package": "import transformers; import screformer",
    "trainer_and_pipeline_then_package": "from transformers import Trainer, pipeline; import screformer",
    "some_auto_classes_before_and_some_after": (
        "from transformers import AutoConfig, AutoTokenizer; import screformer; from transformers import AutoModel"
    ),
    "a_model_class_first": "from screformer import ScReformerForMaskedLM",
}

READ_AND_WRITE = """
import json
import sys

import numpy as np
import transformers

request = json.loads(sys.argv[1])
classes = {name: getattr(transformers, name) for name in request["auto_names"]}
refusals = []
for options in request["refused"]:
    for name, auto_class in classes.items():
        try:
            found = auto_class.from_pretrained(request["folders"][0], **options)
        except Exception as error:
            refusals.append([name, type(error).__name__, str(error)])
        else:
            refusals.append([name, "nothing was raised", type(found).__name__])
for number, folder in enumerate(request["folders"]):
    for options in request["options"]:
        arrays, facts, opened = read_folder(folder, classes, request["counts"], request["gene_names"], **options)
        facts |= {"folder": folder, "options": options, "refusals": refusals}
        facts["package"] = sorted(name for name in sys.modules if name.partition(".")[0] == "screformer")
        output = f"{request['output']}/{number}-{request['options'].index(options)}"
        np.savez(output + ".npz", **arrays)
        with open(output + ".json", "w") as file:
            json.dump(facts, file)
        if request["save"]:
            opened[request["save"]].save_pretrained(output)
            opened["AutoTokenizer"].save_pretrained(output)
"""


def run_program(beginning, folders, output, *, options, refused=(), save=None):
    """Read the folders in a fresh interpreter with caches of its own; return what `read_folder` found in each."""
    output.mkdir(parents=True)
    request = {
        "folders": [str(folder) for folder in folders],
        "output": str(output),
        "auto_names": list(PACKAGE_CLASSES),
        "options": options,
        "refused": refused,
        "save": save,
        "counts": COUNTS,
        "gene_names": GENE_NAMES,
    }
    environment = os.environ | {
        "HF_HOME": str(output / "home"),
        "HF_MODULES_CACHE": str(output / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("PYTHONPATH", None)
    program = "\n".join([beginning, inspect.getsource(read_folder), READ_AND_WRITE])
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(request)],
        cwd=output,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for number in range(len(folders)):
        for choice in range(len(options)):
            with np.load(output / f"{number}-{choice}.npz") as arrays:
                facts = json.loads((output / f"{number}-{choice}.json").read_text())
                found.append((dict(arrays), facts))
    return found


def assert_same(found, expected):
    """Compare what two readings of a folder found: facts and token ids exactly, numbers to 1e-6."""
    (arrays, facts), (expected_arrays, expected_facts) = found, expected
    assert arrays.keys() == expected_arrays.keys()
    for name, array in expected_arrays.items():
        np.testing.assert_allclose(arrays[name], array, atol=1e-6, rtol=1e-6, err_msg=name)
    for name in ("config", "id2label", "fingerprint", "missing", "classes"):
        assert facts[name] == expected_facts[name]
    np.testing.assert_allclose(arrays["loss"], arrays["expected loss"], rtol=1e-5)
    assert np.abs(arrays["gradient"]).max() > 0


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Return a folder a class, each as a user would share it: model, tokenizer and the names of labels."""
    parent = tmp_path_factory.mktemp("shared")
    tokenizer = make_tokenizer()
    config = {
        "num_genes": NUM_GENES,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 32,
        "bucket_size": 8,
        "num_hashes": 2,
        "classifier_hidden_sizes": [12, 8],
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "id2label": {0: "alpha", 1: "beta", 2: "T cell, CD4+"},
    }
    for name, saved_class in SAVED_CLASSES.items():
        torch.manual_seed(0)
        saved_class(ScReformerConfig(**config)).save_pretrained(parent / name)
        tokenizer.save_pretrained(parent / name)
    return {name: parent / name for name in SAVED_CLASSES}


@pytest.fixture(scope="module")
def expected(shared):
    """Return what the package's own classes find in each folder."""
    readings = {}
    for name, folder in shared.items():
        arrays, facts, _ = read_folder(folder, PACKAGE_CLASSES, COUNTS, GENE_NAMES)
        readings[name] = arrays, json.loads(json.dumps(facts))
    return readings


@pytest.fixture(scope="module")
def programs(shared, tmp_path_factory):
    """Return the promised results of all programs by name; they take seconds each, so two run at a time."""
    parent = tmp_path_factory.mktemp("programs")
    trusted = [{"trust_remote_code": True}]

    def without_package(name):
        return run_program(
            WITHOUT_THE_PACKAGE,
            [shared[name]],
            parent / name,
            options=trusted,
            refused=[{}, {"trust_remote_code": False}],
            save="AutoModelForSequenceClassification" if name == "cells" else None,
        )

    def saved_again(first):
        first.result()
        return run_program(WITHOUT_THE_PACKAGE, [parent / "cells" / "0-0"], parent / "again", options=trusted)

    def with_package(order):
        options = [{}, *trusted] if order == "transformers_then_package" else [{}]
        return run_program(IMPORT_ORDERS[order], shared.values(), parent / order, options=options)

    with ThreadPoolExecutor(max_workers=2) as pool:
        promised = {name: pool.submit(without_package, name) for name in reversed(SAVED_CLASSES)}
        promised |= {order: pool.submit(with_package, order) for order in IMPORT_ORDERS}
        promised["again"] = pool.submit(saved_again, promised["cells"])
        yield promised


@pytest.mark.parametrize("name", SAVED_CLASSES)
def test_without_the_package_every_auto_class_opens_every_folder(name, programs, expected):
    [found] = programs[name].result()
    assert_same(found, expected[name])
    facts = found[1]
    assert facts["package"] == []
    assert all(module.startswith("transformers_modules.") for module in facts["modules"].values())


@pytest.mark.parametrize("name", SAVED_CLASSES)
def test_without_the_package_nothing_opens_without_consent(name, programs):
    [(_, facts)] = programs[name].result()
    refusals = facts["refusals"]
    assert [auto_name for auto_name, _, _ in refusals] == [*PACKAGE_CLASSES, *PACKAGE_CLASSES]
    for _, error, message in refusals:
        assert error == "ValueError"
        assert "trust_remote_code=True" in message


def test_what_remote_code_saves_is_a_checkpoint_again(programs, expected, shared):
    [found] = programs["again"].result()
    assert_same(found, expected["cells"])
    folder = Path(found[1]["folder"])
    files = {path.name: path for path in folder.iterdir()}
    assert files.keys() == {path.name for path in shared["cells"].iterdir()}
    for name in MODEL_FILES | TOKENIZER_FILES:
        assert files[name].read_bytes() == (shared["cells"] / name).read_bytes()


@pytest.mark.parametrize("order", IMPORT_ORDERS)
def test_with_the_package_no_consent_is_needed_in_any_import_order(order, programs, expected):
    plain = [reading for reading in programs[order].result() if not reading[1]["options"]]
    for name, found in zip(expected, plain, strict=True):
        assert_same(found, expected[name])
        assert all(module.startswith("screformer.") for module in found[1]["modules"].values())


def test_consent_changes_no_number_where_the_package_is_there(programs, expected):
    trusted = [reading for reading in programs["transformers_then_package"].result() if reading[1]["options"]]
    for name, found in zip(expected, trusted, strict=True):
        assert_same(found, expected[name])


@pytest.mark.parametrize("name", SAVED_CLASSES)
def test_every_saved_config_names_every_class(name, shared):
    config = json.loads((shared[name] / "config.json").read_text())
    assert config["architectures"] == [SAVED_CLASSES[name].__name__]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_screformer.ScReformerConfig",
        "AutoModel": "modeling_screformer.ScReformerModel",
        "AutoModelForMaskedLM": "modeling_screformer.ScReformerForMaskedLM",
        "AutoModelForSequenceClassification": "modeling_screformer.ScReformerForCellClassification",
    }


def test_the_tokenizer_names_its_class(shared):
    settings = json.loads((shared["cells"] / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "ScReformerTokenizer"
    assert settings["auto_map"] == {"AutoTokenizer": ["tokenization_screformer.ScReformerTokenizer", None]}


def imports(path):
    """Yield (level, module) of every import in a file, wherever it stands; level 0 is absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module


@pytest.mark.parametrize("name", SAVED_CLASSES)
def test_code_beside_a_checkpoint_is_flat_and_needs_only_what_every_user_has(name, shared):
    files = sorted(shared[name].rglob("*.py"))
    assert {path.relative_to(shared[name]).as_posix() for path in files} == MODEL_FILES | TOKENIZER_FILES
    siblings = {path.stem for path in files}
    for path in files:
        for level, module in imports(path):
            if level == 0:
                root = module.partition(".")[0]
                allowed = THIRD_PARTY | OPTIONAL.get(path.name, set())
                assert root in allowed or root in sys.stdlib_module_names, f"{path.name} imports {module}"
            else:
                assert (level, module in siblings) == (1, True), f"{path.name} imports {'.' * level}{module}"


def test_code_beside_a_checkpoint_is_the_packages(shared):
    sources = {path.name: path for path in SOURCES if path.name in MODEL_FILES | TOKENIZER_FILES}
    assert sources.keys() == MODEL_FILES | TOKENIZER_FILES
    for name, path in sources.items():
        package_file = Path(sys.modules[_module_of(path)].__file__)
        assert (shared["cells"] / name).read_bytes() == package_file.read_bytes()


def _module_of(path):
    folder = "screformer" if path.parent.name == "modeling_screformer" else f"screformer.{path.parent.name}"
    return f"{folder}.{path.stem}"


@pytest.mark.parametrize("path", [path for path in SOURCES if path.name in MODEL_FILES], ids=lambda path: path.name)
def test_model_code_never_asks_which_class_the_configuration_has(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("isinstance", "issubclass"):
            assert "ScReformerConfig" not in ast.unparse(node.args[1])
        if isinstance(node, ast.Compare):
            assert "ScReformerConfig" not in ast.unparse(node)


# No pickle: neither in a folder that is shared nor anywhere in the source.


@pytest.mark.parametrize("name", SAVED_CLASSES)
def test_a_checkpoint_is_json_code_and_safetensors(name, shared):
    files = {path.name for path in shared[name].iterdir()}
    data = {"config.json", "model.safetensors", "tokenizer_config.json", "genes.json"}
    assert files == data | MODEL_FILES | TOKENIZER_FILES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_source_file_uses_pickle(path):
    picklers = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not {module.partition(".")[0] for _, module in imports(path) if module} & picklers
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"torch.load", "torch.save"}
            assert node.attr not in {"to_pickle", "read_pickle"}
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False"


# Loading builds a model without memory for its weights, then fills in what the file has: what it lacks must not stay
# whatever the memory held.


@pytest.mark.parametrize("model_class", SAVED_CLASSES.values())
def test_a_model_is_built_whole_on_the_device_asked_for(model_class, tiny_config):
    with torch.device("meta"):
        model = model_class(tiny_config())
    devices = {name: tensor.device.type for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert set(devices.values()) == {"meta"}, devices


@pytest.mark.parametrize("name", SAVED_CLASSES)
@pytest.mark.parametrize("has_rotations", [True, False])
def test_buffers_are_those_of_a_new_model_after_loading(name, has_rotations, shared, tmp_path):
    weights = load_file(shared[name] / "model.safetensors")
    assert not [key for key in weights if key.endswith("positions")]
    kept = {key: tensor for key, tensor in weights.items() if has_rotations or not key.endswith("rotations")}
    assert (len(kept) == len(weights)) == has_rotations
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_bytes((shared[name] / "config.json").read_bytes())
    opened = SAVED_CLASSES[name].from_pretrained(tmp_path)
    built = dict(SAVED_CLASSES[name](opened.config).named_buffers())
    buffers = dict(opened.named_buffers())
    assert buffers.keys() == built.keys()
    assert len(buffers) == 3  # positions, and rotations of two layers
    for key, buffer in buffers.items():
        torch.testing.assert_close(buffer, built[key], atol=0, rtol=0)
        assert buffer.isfinite().all()
