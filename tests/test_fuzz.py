"""1,000 damaged or hostile files: each gives one clear line or the right result, and nothing in them is executed."""

import contextlib
import gc
import io
import json
import os
import pickle
import re
import shutil
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from random import Random
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load, save_file

from fastres import train
from fastres.config import TrainConfig
from fastres.data.datasets import DATASETS, digits, load_dataset
from fastres.data.image_folder import decode_image
from fastres.errors import Interrupted, UserError
from fastres.flags import Parser, add_flags
from fastres.models import MODELS
from fastres.studies import load_study
from fastres.studies.plan import Planner, StudyConfig
from fastres.trained import load_model
from fastres.training.checkpoint import read_checkpoint
from fastres.training.start import open_run
from tests.conftest import tiny_model
from tests.data.test_datasets import fake_cifar10
from tests.test_study import TINY

GROWTH = 200  # MiB of resident memory that a test of hundreds of cases may leave behind
PROOF = Path(tempfile.gettempdir()) / f"fastres-fuzz-{os.getpid()}"  # what executed code would write

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="counts files and memory in /proc")


def cases(number):
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """No file that executed code would write, no open file, no memory."""
    files, memory = len(os.listdir("/proc/self/fd")), resident()
    yield
    gc.collect()
    assert not PROOF.exists()
    assert len(os.listdir("/proc/self/fd")) <= files
    assert resident() - memory < GROWTH


def resident() -> float:
    """MiB of memory in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def digits_alone(data_dir):
    """In place of ``auto``, which tries a download in a process of its own."""
    return digits()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_, **__):
        raise URLError("no network in tests")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    monkeypatch.setitem(DATASETS, "auto", digits_alone)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A finished run, and one that stopped two steps into its second epoch, on images under the same root."""
    root = tmp_path_factory.mktemp("fuzz")
    rng = np.random.default_rng(0)
    for part, number in (("train", 24), ("test", 6)):
        for i in range(number):
            path = root / "images" / part / ("dark", "bright")[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 128, (32, 32, 3), dtype=np.uint8)).save(path)
    flags = ["--model", "vgg11", "--dataset", "folder", "--data-dir", root / "images", "--batch-size", 8]
    flags += ["--epochs", 2, "--device", "cpu", "--amp", "off"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "vgg11", tiny_model)
        patch.setattr("fastres.report.plots.plot_curves", lambda folder, title: folder)
        assert command_line(*flags, "--output-dir", root / "finished")[0] == 0
        steps = iter([0, 0, 0, 0, 15])
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(Interrupted):
            open_run(flags_of(*flags, "--output-dir", root / "stopped")).fit(signalled=lambda: next(steps))
        yield root


@pytest.fixture(scope="module")
def stopped(folders):
    """The run that stopped: its folder, its checkpoint, and what that holds."""
    folder = folders / "stopped"
    return folder, (folder / "last.pt").read_bytes(), read_checkpoint(folder)


def flags_of(*arguments):
    parser = Parser("python -m fastres.train")
    add_flags(parser, TrainConfig)
    return parser.parse_flags([str(argument) for argument in arguments])


def command_line(*arguments):
    """The exit code and what was written to stderr."""
    error = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(error):
        code = train.main([str(argument) for argument in arguments])
    return code, error.getvalue()


@contextlib.contextmanager
def one_line():
    """Accepts UserError of one line, and no other exception."""
    try:
        yield
    except UserError as error:
        if "\n" in str(error):
            raise


def one_line_or_success(*arguments):
    """Whether the command line succeeded; otherwise it ended in one line."""
    code, error = command_line(*arguments)
    assert code in (0, 1, 2)
    assert error.count("\n") == (0 if code == 0 else 1)
    return code == 0


SEEDS = st.integers(0, 2**32 - 1)  # of evenly spread places; hypothesis prefers the first


@st.composite
def damaged(draw, content):
    """``content`` with a few bits flipped, or a stretch of it cut off, overwritten, taken out or put in."""
    broken = bytearray(content)
    chance = Random(draw(SEEDS))
    kind = chance.choice(["flip", "cut", "overwrite", "remove", "insert"])
    place = chance.randrange(len(broken))
    if kind == "flip":
        for _ in range(chance.randint(1, 3)):
            broken[chance.randrange(len(broken))] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del broken[place:]
    elif kind == "remove":
        del broken[place : place + chance.randint(1, 64)]
    else:
        some = chance.randbytes(chance.randint(1, 16))
        broken[place : place + (len(some) if kind == "overwrite" else 0)] = some
    return bytes(broken)


PLAIN = [None, False, True, -1, 0, 1, 3, 10**30, -0.5, 1.5, float("nan"), float("inf"), "", "x", "a\nb", [], [1], {}]
PLAIN += [{"x": 1}]
TENSORS = [torch.zeros(0), torch.ones(3), torch.tensor(1), torch.ones(2, dtype=torch.float64), torch.ones(8, 3, 3, 4)]


def places(value, path=()):
    """The path of every value in nested containers."""
    yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*path, key))


def changed(value, path, change):
    """A copy of nested containers in which ``change`` was done to the container and key at the end of ``path``."""
    if not path:
        return change
    value = value.copy()
    if len(path) > 1:
        value[path[0]] = changed(value[path[0]], path[1:], change)
    elif change is REMOVED:
        del value[path[0]]
    else:
        value[path[0]] = change
    return value


REMOVED = object()


@cases(200)
@given(st.data())
def test_bytes_of_a_checkpoint(stopped, data):
    folder, content, state = stopped
    (folder / "last.pt").write_bytes(data.draw(damaged(content)))
    with one_line():
        again = read_checkpoint(folder)  # the damaged bytes may mean nothing
        assert again["history"] == state["history"]
        torch.testing.assert_close(again["model"], state["model"], rtol=0, atol=0)
        torch.testing.assert_close(again["optimizer"], state["optimizer"], rtol=0, atol=0)


@cases(200)
@given(st.data())
def test_content_of_a_checkpoint(stopped, data):
    folder, _, state = stopped
    part = data.draw(st.sampled_from([*sorted(state), "run", "run", "history"]))
    path = data.draw(st.sampled_from([path for path in places(state) if path[:1] == (part,)]))
    change = data.draw(st.sampled_from([REMOVED, *PLAIN, *TENSORS]))
    assume(path[2:] != ("compile",) or change is not True)  # valid, and takes a minute
    torch.save(changed(state, path, change), folder / "last.pt")
    one_line_or_success("--resume", folder)


HOSTILE = [
    (os.system, (f"touch {PROOF}",)),
    (eval, (f"open({str(PROOF)!r}, 'w')",)),
    (exec, (f"open({str(PROOF)!r}, 'w')",)),
    (open, (str(PROOF), "w")),
    (os.mkdir, (str(PROOF),)),
    (Path.touch, (PROOF,)),
    (torch.save, ({}, str(PROOF))),
    (np.save, (str(PROOF), 0)),
    (pickle.loads, (b"cos\nmkdir\n(V" + str(PROOF).encode() + b"\ntR.",)),
    (bytearray, (2**40,)),
]


class Hostile:
    """Calls ``function(*arguments)`` where it is unpickled."""

    def __init__(self, call):
        self.call = call

    def __reduce__(self):
        return self.call


@cases(50)
@given(st.sampled_from(HOSTILE), st.sampled_from(["whole", "model", "history", "run", "bare"]), st.integers(2, 4))
def test_hostile_checkpoints(stopped, call, place, protocol):
    folder, content, state = stopped
    hostile = Hostile(call)
    pickled = pickle.dumps(hostile if place in ("whole", "bare") else {**state, place: hostile}, protocol)
    path = folder / "last.pt"
    if place == "bare":
        path.write_bytes(pickled)
    else:
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(path, "w") as target:
            for member in source.infolist():
                body = pickled if member.filename.endswith("data.pkl") else source.read(member)
                target.writestr(member.filename, body)
    assert not one_line_or_success("--resume", folder)


@cases(150)
@given(st.data())
def test_weights(folders, data):
    path = folders / "finished/last.safetensors"
    content = path.read_bytes()
    state = load(content)
    try:
        if data.draw(st.booleans()):
            path.write_bytes(data.draw(damaged(content)))
            if one_line_or_success("--eval", folders / "finished"):
                torch.testing.assert_close(load(path.read_bytes()), state, rtol=0, atol=0)
        else:  # from elsewhere, without a checksum; numbers of another type are converted
            name = data.draw(
                st.sampled_from([name for name in state if "num_batches" not in name])
            )  # torch may lack it
            change = data.draw(st.sampled_from([REMOVED, *TENSORS]))
            save_file(changed(state, (name,), change), path)
            fits = change is not REMOVED and change.shape == state[name].shape
            assert one_line_or_success("--eval", folders / "finished") == fits
    finally:
        path.write_bytes(content)


@cases(150)
@given(st.data())
def test_settings_and_summary(folders, data):
    path = folders / "finished" / data.draw(st.sampled_from(["config.json", "summary.json"]))
    content = path.read_bytes()
    try:
        if data.draw(st.booleans()):
            path.write_bytes(data.draw(damaged(content)))
        else:
            value = json.loads(content)
            where = data.draw(st.sampled_from(list(places(value))))
            change = data.draw(st.sampled_from([REMOVED, *PLAIN]))
            assume(where[1:] != ("compile",) or change is not True)
            assume(where or change is not REMOVED)
            path.write_text(json.dumps(changed(value, where, change)))
        one_line_or_success("--eval", folders / "finished")
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("file", ["config.json", "last.pt"])
@pytest.mark.parametrize("name", ["os:getcwd", "proof.py:net", "tests.proof:net", "antigravity:x"])
def test_functions_named_in_files(folders, stopped, file, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("proof.py").write_text(f"open({str(PROOF)!r}, 'w')")
    run = tmp_path / "run"
    folder, content, _ = stopped
    shutil.copytree(folder, run)
    (run / "last.pt").write_bytes(content)
    shutil.copy(folders / "finished/summary.json", run)
    path = run / file
    if file == "config.json":
        record = json.loads(path.read_text())
        record["asked"]["model"] = name
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match="imported only where it is given"):
            load_model(run)
    else:
        state = torch.load(path, weights_only=True)
        state["run"]["asked"]["model"] = name
        torch.save(state, path)
    code, error = command_line("--eval" if file == "config.json" else "--resume", run)
    assert code == 2
    assert f"--model {name}: a function is imported only where it is given as a flag or argument" in error
    assert not {"proof", "tests.proof", "antigravity"} & sys.modules.keys()


def encoded(kind, **options):
    rows, columns = np.mgrid[:32, :32] * 8
    image = Image.fromarray(np.stack([rows, columns, (rows + columns) // 2], axis=-1).astype(np.uint8))
    file = io.BytesIO()
    (image.quantize(32) if options.pop("palette", False) else image).save(file, kind, **options)
    return file.getvalue()


IMAGES = [encoded("JPEG"), encoded("JPEG", progressive=True), encoded("PNG"), encoded("PNG", palette=True)]
IMAGES += [encoded("WEBP"), encoded("WEBP", lossless=True), encoded("BMP"), encoded("BMP", palette=True)]


@cases(100)
@given(st.data())
def test_image_files(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("images")
    broken = [data.draw(damaged(content)) for content in IMAGES]
    for part, contents in (("train", [*broken, IMAGES[2]]), ("test", IMAGES)):
        (root / part / "one").mkdir(parents=True)
        for i, content in enumerate(contents):
            (root / part / "one" / f"{i}.jpg").write_bytes(content)
    dataset, _ = load_dataset("folder", root, skip_bad_images=True)
    assert len(dataset.train) + dataset.skipped_images == len(IMAGES) + 1
    if dataset.skipped_images:
        with pytest.raises(UserError, match=r"train/one/\d.jpg[^\n]*; replace or remove them"):
            load_dataset("folder", root)
    decode = pytest.importorskip("fastres.data.dali").decode
    pixels = decode(dataset.train, 1, torch.device("cpu")).astype(int)
    for image, content in zip(pixels, dataset.train.images, strict=True):
        with warnings.catch_warnings(action="ignore"):
            eager = decode_image(content).resize((32, 32), Image.Resampling.BILINEAR)
        assert abs(image - np.asarray(eager)).mean() < 3


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    root = fake_cifar10(tmp_path, monkeypatch, per_batch=10)
    return root, load_dataset("cifar10", root)[0]


@cases(75)
@given(st.data())
def test_cifar_files(cifar10, data):
    root, whole = cifar10
    path = data.draw(st.sampled_from(sorted((root / "cifar-10-batches-py").iterdir())))
    content = path.read_bytes()
    hostile = st.builds(lambda call: pickle.dumps(Hostile(call)), st.sampled_from(HOSTILE))
    path.write_bytes(data.draw(damaged(content) | hostile))
    try:
        with contextlib.redirect_stdout(io.StringIO()), pytest.raises(UserError, match=r"missing or damaged") as error:
            load_dataset("cifar10", root)
        assert "\n" not in str(error.value)
    finally:
        path.write_bytes(content)
    assert np.array_equal(load_dataset("cifar10", root)[0].train.images, whole.train.images)


WORDS = [
    "title", "flags", "runs", "variants", "include", "figures", "conjectures", "published", "model", "lr", "epochs",
    '"x"', "3", "-1", "1e400", "1e-3", "nan", "true", "[]", "{}", "[[1]]", "{ lr = 0.1 }", "1979-05-27", "[runs.x]",
    '["architecture/vgg16"]', "9" * 400, "milestones", "batch-size", "seed", "zero-gamma", "\n",
    "notes", "repeated", "phases", "augmentation", '"flip-crop"', '{ best_accuracy = [1, 2] }',
    "[{ label = 'x', epochs = [1, 2] }]", "=", '"a\\u0000b"',
]  # fmt: skip


@cases(75)
@given(st.data())
def test_study_files(arrays, tmp_path, data):
    path = tmp_path / "study.toml"
    if data.draw(st.booleans()):
        path.write_bytes(data.draw(damaged(TINY.encode())))
    else:
        tokens = re.split(r"([\w.-]+)", TINY)
        chance = Random(data.draw(SEEDS))
        for _ in range(chance.randint(1, 3)):
            tokens[chance.randrange(1, len(tokens), 2)] = chance.choice(WORDS)
        path.write_text("".join(tokens))
    with one_line():
        flags, config, load = {"device": "cpu"}, StudyConfig(eager_cost=False), lambda *_: (arrays, "arrays")
        assert Planner(load_study(str(path)), config, flags, tmp_path / "out", load).plan([0])
