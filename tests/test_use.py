"""What is done with a finished run: its network predicts, is exported, shows its mistakes, and begins another run."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fastres
from fastres import export, predict, train
from fastres.data.image_folder import decode_image
from fastres.errors import RunError
from fastres.report.figures import draw_confusion, side_of
from fastres.report.gallery import most_confident_mistakes
from fastres.training.start import open_run
from tests.conftest import CommandLine, write_folder

pytestmark = pytest.mark.usefixtures("tiny_vgg11")


@pytest.fixture
def flags(image_folder):
    return [
        "--model", "vgg11", "--dataset", "folder", "--data-dir", image_folder, "--epochs", 1, "--batch-size", 20,
        "--lr", 0.02, "--device", "cpu", "--amp", "off",
    ]  # fmt: skip


@pytest.fixture
def run(capfd, flags, tmp_path):
    """The folder of a finished run."""
    assert CommandLine(capfd, train.main)(*flags, "--output-dir", tmp_path / "run") == 0
    return tmp_path / "run"


def test_predictions_are_those_of_the_network(run, capfd, image_folder, tmp_path):
    command_line = CommandLine(capfd, predict.main)
    folder = image_folder / "test"
    files = sorted(folder.rglob("*.jpg"))
    assert command_line(run, folder, "--json") == 0
    rows = [json.loads(line) for line in command_line.out.splitlines()]
    assert [row["file"] for row in rows] == list(map(str, files))
    model = fastres.load_model(run)
    pixels = np.stack([np.asarray(decode_image(np.fromfile(file, np.uint8))) for file in files])
    with torch.no_grad():
        expected = model(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255).softmax(1).max(1)
    assert [row["probability"] for row in rows] == pytest.approx(expected.values.tolist(), rel=1e-5)
    assert [row["class"] for row in rows] == [model.class_names[i] for i in expected.indices]
    assert [prediction.class_name for prediction in model.predict(files, batch_size=3)] == [
        row["class"] for row in rows
    ]

    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8")
    assert command_line(run, files[3], broken, files[0]) == 2
    assert command_line.out.splitlines() == [
        f"{row['file']}: {row['class']}, {100 * row['probability']:.2f} %" for row in (rows[3], rows[0])
    ]
    assert command_line.err.endswith(f"error: not readable as images: {broken}; replace them or leave them out\n")
    assert [found.file for found in model.predict([files[0], files[0]])] == [files[0], files[0]]
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/._hidden.jpg").write_bytes(b"")
    for arguments, message in (
        ((run, files[0], tmp_path / "none.jpg"), "none.jpg: No such file or directory"),
        ((run, files[0], tmp_path / ("x" * 300)), "x: File name too long"),
        ((run, tmp_path / "empty"), "empty: holds no image file (.jpg, "),
        ((tmp_path / "empty", files[0]), "empty/config.json: not readable as JSON"),
    ):
        assert message in command_line.one_line(*arguments)
        assert not command_line.out


@pytest.fixture
def pt2(run, capfd, tmp_path):
    command_line = CommandLine(capfd, export.main)
    file = tmp_path / "model.pt2"
    assert command_line(run, file) == 0
    accuracy = json.loads((run / "summary.json").read_text())["accuracy"]
    assert f"checked on 20 test images: accuracy {accuracy:.2f} %" in command_line.out
    assert f"{file}: exists already; choose another name" in command_line.one_line(run, file)
    assert "there is no folder" in command_line.one_line(run, tmp_path / "none/model.pt2")
    return file


def test_an_exported_network_needs_no_fastres(run, pt2, tmp_path):
    images = torch.rand(5, 3, 32, 32)
    torch.save(images, tmp_path / "images.pt")
    code = (
        "import sys; sys.modules['fastres'] = None; import torch; images = torch.load(sys.argv[2])\n"
        "model = torch.export.load(sys.argv[1]).module()\n"
        "torch.save([model(images), model(images[:1])], sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, pt2, tmp_path / "images.pt"], check=True, cwd=tmp_path)
    whole, single = torch.load(tmp_path / "images.pt")
    with torch.no_grad():
        expected = fastres.load_model(run)(images)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(single, expected[:1])


def test_an_export_that_differs_is_not_written(run, capfd, tmp_path, monkeypatch):
    plain = fastres.load_model(run)
    with torch.no_grad():
        next(plain.parameters()).mul_(1.1)
    content = export.exported(plain)
    monkeypatch.setattr(export, "exported", lambda model: content)
    command_line = CommandLine(capfd, export.main)
    assert command_line(run, tmp_path / "model.pt2") == 1
    assert "the exported model differs by" in command_line.err
    assert not (tmp_path / "model.pt2").exists()


def test_a_network_that_cannot_be_exported(run):
    model = fastres.load_model(run)
    model.model.forward = lambda x: x.mean((2, 3)) if x.sum().item() > 0 else -x.mean((2, 3))
    with pytest.raises(RunError, match=r"torch.export cannot trace this network"):
        export.exported(model)
    model.model.forward = lambda x: 1 / 0
    with pytest.raises(RunError, match=r"torch.export cannot trace this network"):
        export.exported(model)


def test_the_gallery(run, capfd):
    command_line = CommandLine(capfd, train.main)
    assert command_line("--eval", run, "--gallery") == 0
    for name in ("mistakes.png", "confusion.png"):
        assert f"picture: {run / name}" in command_line.out
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert "--gallery: needs --eval" in command_line.one_line("--gallery")


def test_mistakes_are_the_most_confident_ones(run):
    opened = open_run({}, finished=run)
    with torch.no_grad():
        for parameter in opened.trainer.model[-1].parameters():
            parameter.zero_()
        opened.trainer.model[-1].bias[1] = 2.0  # everything is dark, with the same probability
    mistakes = most_confident_mistakes(opened, 3)
    assert [(mistake.true, mistake.predicted) for mistake in mistakes] == [("bright", "dark")] * 3
    assert mistakes[0].probability == pytest.approx(1 / (1 + np.exp(-2)))
    decoded = np.stack([np.asarray(decode_image(file)) for file in opened.dataset.test.images]).astype(int)
    assert abs(decoded - mistakes[0].image).max((1, 2, 3)).min() <= 3  # decoders differ
    with torch.no_grad():
        opened.trainer.model[-1].bias[1] = 0.0
        opened.trainer.model[-1].weight[0] = torch.linspace(-1, 1, 16)
    probabilities = [mistake.probability for mistake in most_confident_mistakes(opened, 20)]
    assert probabilities == sorted(probabilities, reverse=True)


@pytest.mark.parametrize(("classes", "numbers"), [(20, 400), (100, 0)])
def test_confusion_of_many_classes(classes, numbers):
    from matplotlib.figure import Figure

    names = [f"class {i}" for i in range(classes)]
    figure = Figure(figsize=(side_of(names),) * 2)
    axes = figure.subplots()
    draw_confusion(axes, np.eye(classes), names, "title")
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert len(axes.texts) == numbers
    assert side_of(names) <= 20


def test_a_run_begins_with_the_weights_of_another(run, flags, capfd, arrays, tmp_path):
    command_line = CommandLine(capfd, train.main)
    flags = (*flags, "--initial-checkpoint", run, "--lr", 1e-12)
    assert command_line(*flags, "--output-dir", tmp_path / "same") == 0
    assert f"begins with the weights of {run}\n" in command_line.out
    before = load_file(run / "last.safetensors")
    learnt = {name for name in before if "running" not in name and "num_batches" not in name}
    after = load_file(tmp_path / "same/last.safetensors")
    for name in learnt:
        torch.testing.assert_close(after[name], before[name])

    # other classes, although as many
    others = write_folder(tmp_path / "others", replace(arrays, classes=("light", "black")))
    assert command_line(*flags, "--data-dir", others, "--output-dir", tmp_path / "other") == 0
    assert f"begins with the weights of {run}, but for a new 7 for 2 other classes" in command_line.out
    after = load_file(tmp_path / "other/last.safetensors")
    for name in learnt:
        assert torch.allclose(after[name], before[name]) == (name not in ("7.weight", "7.bias"))

    assert "--init dirac: needs a run without --initial-checkpoint" in command_line.one_line(*flags, "--init", "dirac")
    for folder in (tmp_path / "same", tmp_path / "other"):  # which no longer need the run
        run.rename(tmp_path / "moved")
        assert command_line("--eval", folder) == 0
        assert command_line("--resume", folder, "--epochs", 2) == 0
        assert "begins with" not in command_line.out
        (tmp_path / "moved").rename(run)
    for arguments, message in (
        (["--initial-checkpoint", tmp_path], f"--initial-checkpoint {tmp_path}: {tmp_path}/config.json: not readable"),
        (["--model", "vgg13"], "is a run of vgg11, not of vgg13; take that --model"),
    ):
        assert message in command_line.one_line(*flags, "--output-dir", tmp_path / "none", *arguments)
    assert not (tmp_path / "none").exists()
