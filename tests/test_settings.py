"""Where settings come from: flags, a file, the recipe, the dataset; and the recipes themselves."""

import json
import tomllib
from dataclasses import replace

import pytest

from fastres.config import TrainConfig, over_recipe
from fastres.data.datasets import synthetic
from fastres.fields import as_json, read_table
from fastres.training.start import choose_dataset

pytestmark = pytest.mark.usefixtures("tiny_vgg11")


def test_settings_from_a_file(command_line, flags, tmp_path):
    run = tmp_path / "run"
    assert command_line(*flags, "--label-smoothing", 0.1, "--amp", "auto") == 0
    config = json.loads((run / "config.json").read_text())
    assert command_line("--config", run / "config.json", "--seed", 2, "--output-dir", tmp_path / "second") == 0
    second = json.loads((tmp_path / "second/config.json").read_text())
    own = {"seed": 2, "output_dir": str(tmp_path / "second")}
    assert second["asked"] == config["asked"] | own
    assert second["asked"]["amp"] == "auto"  # chosen anew
    assert second["chosen"].get("amp") == config["chosen"].get("amp")

    assert "--recipe fast: changes nothing" in command_line.one_line(
        "--config", run / "config.json", "--recipe", "fast"
    )
    toml = tmp_path / "settings.toml"
    toml.write_text(f'label-smoothing = 0.2\nbatch_size = 10\nlr = 0.5\noutput_dir = "{tmp_path}/no"\nrecipe = "fast"')
    assert command_line(*flags[:-2], "--lr", 0.01, "--config", toml, "--print-config") == 0
    printed = tomllib.loads(command_line.out)
    assert [printed[name] for name in ("label_smoothing", "batch_size", "lr")] == [0.2, 20, 0.01]
    assert printed["optimizer"] == "muon"  # flags, file, recipe
    assert "# output_dir: auto\n" in command_line.out
    assert 'device = "cpu"\n' in command_line.out
    assert 'loader = "auto"  # here "dali"\n' in command_line.out
    assert not (tmp_path / "no").exists()
    printed_file = tmp_path / "printed.toml"
    printed_file.write_text(command_line.out)
    again = command_line.out
    assert command_line("--config", printed_file, "--print-config") == 0
    assert command_line.out == again


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.toml", "lr = ", "a.toml: not readable as TOML"),
        ("a.toml", "l = 1", "a.toml: unknown key l; did you mean"),
        ("a.toml", "lr = -1", "--lr -1: must be above 0"),
        ("a.toml", 'recipe = "quick"', "--recipe: invalid choice 'quick'; choose from default, fast"),
        ("a.toml", 'lr = "a"', "a.toml: lr: must be a number, not 'a'"),
        ("none.toml", None, "none.toml: not readable as TOML"),
        ("none.json", None, "none.json: not readable as JSON"),
        ("a.json", "{}", "a.json: asked: is missing"),
        ("a.toml", 'model = "os:getcwd"', "a function is imported only where it is given"),
    ],
)
def test_bad_files_of_settings(name, content, message, command_line, flags, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    assert message in command_line.one_line("--config", tmp_path / name, *flags[2:10])


def test_a_file_of_settings_is_for_a_new_run(command_line, flags, tmp_path):
    assert command_line(*flags) == 0
    for action in ("--resume", "--eval"):
        for flag in (["--config", tmp_path / "run/config.json"], ["--print-config"]):
            assert f"{flag[0]}: is for a new run; leave it off" in command_line.one_line(
                action, tmp_path / "run", *flag
            )


def test_the_spelling_of_an_augmentation_does_not_matter(command_line, flags, tmp_path):
    assert command_line(*flags, "--augmentation", "erasing-flip-crop") == 0
    assert json.loads((tmp_path / "run/config.json").read_text())["asked"]["augmentation"] == "crop-flip-erasing"
    assert command_line("--resume", tmp_path / "run", "--epochs", 3, "--augmentation", "crop-erasing-flip") == 0
    message = command_line.one_line("--resume", tmp_path / "run", "--augmentation", "flip-crop")
    assert "--augmentation crop-flip: " in message
    assert "is a run with crop-flip-erasing; leave the flag off" in message


@pytest.mark.parametrize(
    ("recipe", "model", "expected"),
    [
        ("study-a", "vgg16", {"epochs": 20}),
        ("study-a", "resnet50", {"epochs": 15}),
        ("study-b", "resnet18", {"lr": 0.1}),
        ("study-b", "vgg19_bn_4096", {"lr": 0.1}),
        ("study-b", "vgg19_4096", {"lr": 0.01}),
    ],
)
def test_the_studies_settings_are_the_published_ones(recipe, model, expected):
    published = {
        "study-a": {
            "dataset": "mini-cifar10", "augmentation": "none", "eval_batch_size": 100, "lr": 0.01,
            "schedule": "constant", "init": "default",
        },
        "study-b": {
            "dataset": "cifar10", "augmentation": "crop-flip", "epochs": 100, "schedule": "multistep",
            "milestones": (50, 75), "init": "study-b", "eval_batch_size": 128,
        },
    }  # fmt: skip
    expected = published[recipe] | expected
    expected |= {"batch_size": 128, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": False, "warmup_epochs": 0.0}
    expected |= {"zero_gamma": False, "drop_last": False, "label_smoothing": 0.0}  # as plain scripts have it
    config = vars(TrainConfig(**over_recipe({"recipe": recipe, "model": model})))
    assert {name: config[name] for name in expected} == expected


def test_defaults_give_way_to_the_models_the_datasets_and_the_flags_that_were_given():
    def chosen(name="synthetic", **given):
        dataset = replace(synthetic(200), name=name)
        return choose_dataset(over_recipe(given), lambda line: None, lambda *_: (dataset, name))[0]

    assert chosen(model="resnet18").lr == 0.1
    assert (chosen(model="vgg16").lr, chosen(model="vgg16").init) == (0.01, "dirac")
    assert (chosen(model="vgg19_4096").lr, chosen(model="vgg19_4096").init) == (0.01, "default")
    assert chosen(model="vgg16", lr=0.3).lr == 0.3
    assert chosen(recipe="study-b", model="vgg16").lr == 0.1
    digits = chosen("digits", model="resnet18")
    assert (digits.epochs, digits.batch_size, digits.lr, digits.augmentation) == (7, 32, 0.02, "none")
    digits = chosen("digits", model="resnet18", lr=0.3, augmentation="crop-flip")
    assert (digits.epochs, digits.lr, digits.augmentation) == (7, 0.3, "crop-flip")


def test_config_survives_json():
    config = TrainConfig(milestones=(5, 7), classes=("a", "b"), schedule="multistep", compile=True)
    assert read_table(TrainConfig, json.loads(json.dumps(as_json(config)))) == config
