import hashlib
import io
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import unicodedata

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from torchvision.datasets import CIFAR10, CIFAR100

from fastres.data.datasets import CIFAR100_MEAN, CIFAR100_STD, MINI_CIFAR10_CLASSES, digits, load_dataset
from fastres.data.image_folder import folder
from fastres.errors import UserError
from tests.conftest import write_folder

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def fake_cifar10(root, monkeypatch, source=CIFAR10, classes=CIFAR10_CLASSES, per_batch=50):
    """Files of CIFAR-10's format under ``root`` with random images, and torchvision's checksums set to theirs."""
    rng = np.random.default_rng(0)
    base = root / source.base_folder
    base.mkdir(parents=True)

    def write(name, content):
        data = pickle.dumps(content)
        (base / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name):
        labels = [i % len(classes) for i in range(per_batch)]
        pixels = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels" if source is CIFAR10 else "fine_labels": labels})

    key = source.meta["key"]
    meta = write("meta", {key: classes})
    monkeypatch.setattr(source, "train_list", [batch(name) for name, _ in source.train_list])
    monkeypatch.setattr(source, "test_list", [batch(name) for name, _ in source.test_list])
    monkeypatch.setattr(source, "meta", {"filename": meta[0], "key": key, "md5": meta[1]})
    monkeypatch.setattr(source, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # nothing listens there
    return root


def test_digits_is_a_fixed_stratified_split():
    dataset = digits()
    assert dataset.train.images.shape == (1437, 32, 32, 3)
    assert dataset.test.images.shape == (360, 32, 32, 3)
    assert dataset.train.images.dtype == np.uint8
    for split in (dataset.train, dataset.test):
        counts = np.bincount(split.labels)
        assert counts.max() - counts.min() <= 8  # the classes differ that much themselves
        assert split.images.std() > 50
    np.testing.assert_array_equal(dataset.train.images, digits().train.images)
    assert dataset.train.images.max() == 255
    normalised = (dataset.train.images / 255 - dataset.mean) / dataset.std
    assert normalised.mean() == pytest.approx(0, abs=1e-6)
    assert normalised.std() == pytest.approx(1)


def test_cifar10_and_its_classes(tmp_path, monkeypatch):
    root = fake_cifar10(tmp_path, monkeypatch)
    whole, _ = load_dataset("cifar10", root)
    assert whole.classes == tuple(CIFAR10_CLASSES)
    assert whole.train.images.shape == (250, 32, 32, 3)
    pixels = pickle.loads((root / "cifar-10-batches-py/test_batch").read_bytes())["data"]
    np.testing.assert_array_equal(whole.test.images, pixels.reshape(50, 3, 32, 32).transpose(0, 2, 3, 1))
    assert (whole.mean, whole.std) == ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))  # as is usual, RGB
    mini, _ = load_dataset("mini-cifar10", root)
    assert mini.classes == MINI_CIFAR10_CLASSES
    assert len(mini.train) == 75
    np.testing.assert_array_equal(mini.train.images, whole.train.images[whole.train.labels < 3])
    swapped, _ = load_dataset("cifar10", root, ("truck", "airplane"))
    np.testing.assert_array_equal(
        swapped.test.images[swapped.test.labels == 0], whole.test.images[whole.test.labels == 9]
    )
    np.testing.assert_array_equal(
        swapped.test.images[swapped.test.labels == 1], whole.test.images[whole.test.labels == 0]
    )


def test_cifar100(tmp_path, monkeypatch):
    names = [f"class {label}" for label in range(100)]
    dataset, _ = load_dataset("cifar100", fake_cifar10(tmp_path, monkeypatch, CIFAR100, names, per_batch=150))
    assert dataset.classes == tuple(names)
    np.testing.assert_array_equal(dataset.train.labels, np.arange(150) % 100)
    assert not np.array_equal(dataset.train.images, dataset.test.images)
    assert (dataset.mean, dataset.std) == (CIFAR100_MEAN, CIFAR100_STD)


def test_auto_takes_mini_cifar10_where_it_lies(tmp_path, monkeypatch):
    dataset, line = load_dataset("auto", fake_cifar10(tmp_path, monkeypatch))
    assert dataset.name == "mini-cifar10"
    assert "found under" in line


def test_auto_says_why_it_takes_digits(tmp_path, monkeypatch):
    monkeypatch.setattr("fastres.data.datasets.DOWNLOAD_SECONDS", 0.01)
    dataset, line = load_dataset("auto", tmp_path)
    assert dataset.name == "digits"
    assert "download did not finish" in line


def test_auto_takes_digits_where_the_download_fails(tmp_path, monkeypatch):
    def run(command, **_):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr("fastres.data.datasets.subprocess.run", run)
    dataset, line = load_dataset("auto", tmp_path)
    assert dataset.name == "digits"
    assert "its download failed" in line


def test_auto_takes_what_it_has_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("fastres.data.datasets.subprocess.run", lambda *_, **__: fake_cifar10(tmp_path, monkeypatch))
    dataset, line = load_dataset("auto", tmp_path)
    assert (dataset.name, dataset.classes) == ("mini-cifar10", MINI_CIFAR10_CLASSES)
    assert f"downloaded to {tmp_path}" in line


def test_wrong_checksum(tmp_path, monkeypatch):
    root = fake_cifar10(tmp_path, monkeypatch)
    batch = root / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"--dataset cifar10: .*cifar-10-python.tar.gz.*missing or damaged"):
        load_dataset("cifar10", root)


def test_wrong_checksum_of_the_archive(tmp_path, monkeypatch):
    fake_cifar10(tmp_path / "elsewhere", monkeypatch)
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz"):
        pass
    with pytest.raises(UserError, match="missing or damaged"):
        load_dataset("cifar10", tmp_path)


def test_folder(tmp_path, arrays):
    dataset = folder(write_folder(tmp_path, arrays, ".png"))
    assert dataset.classes == ("bright", "dark")
    assert dataset.train.encoded
    assert not dataset.train.resize
    assert np.bincount(dataset.train.labels).tolist() == [30, 30]
    first = np.asarray(Image.open(io.BytesIO(dataset.test.images[0])))
    np.testing.assert_array_equal(first, arrays.test.images[1])


@pytest.mark.parametrize("suffix", [".jpeg", ".JPG", ".jpe", ".jfif", ".JFIF"])
def test_folder_reads_every_spelling_of_a_suffix(suffix, image_folder):
    path = image_folder / "train/dark/0000.jpg"
    path.rename(path.with_suffix(suffix))
    assert len(folder(image_folder).train) == 60


def test_folder_takes_a_subset_in_its_order(image_folder):
    assert folder(image_folder, ("dark",)).classes == ("dark",)
    assert folder(image_folder, ("dark", "bright")).test.labels.tolist() == [0] * 10 + [1] * 10


def link(path, target):
    """``path`` as a symlink; what was there is moved away."""
    if path.exists():
        path.rename(path.parent / f".{path.name}")
    path.symlink_to(target)


def break_file(root):
    path = root / "train/dark/0000.jpg"
    path.write_bytes(path.read_bytes()[:-300])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "train").rename(root / "training"), "no folder train/"),
        (lambda root: [path.unlink() for path in (root / "test/dark").iterdir()], "test/dark: holds no image file"),
        (lambda root: (root / "train/third").mkdir(), "same classes; only one has third"),
        (lambda root: [shutil.rmtree(path) for path in root.glob("*/*")], "train/ holds no class folders"),
        (break_file, "not readable as JPEG, PNG, WebP or BMP .* megapixels: train/dark/0000.jpg; replace"),
        (lambda root: link(root / "train/dark/0001.jpg", "gone"), "dark/0001.jpg: broken symlink to gone; make"),
        (lambda root: link(root / "train/third", "gone"), "train/third: broken symlink to gone; make it readable"),
        (lambda root: link(root / "train", "gone"), "train: broken symlink to gone; make it readable"),
        (lambda root: link(root / "train/dark/back", ".."), "dark/back/.*: Too many levels of symbolic links"),
        (lambda root: link(root / "train/dark/0001.jpg", "/proc/self/mem"), "dark/0001.jpg: Input/output error; make"),
    ],
)
def test_folder_names_what_is_wrong(damage, message, image_folder):
    damage(image_folder)
    with pytest.raises(UserError, match=message) as error:
        folder(image_folder)
    assert "\n" not in str(error.value)


def spoil(root, names):
    for name in names:
        (root / name).write_bytes(b"no image")


def test_bad_images_are_named_and_counted(image_folder):
    spoil(image_folder, [f"test/dark/{i:04d}.jpg" for i in range(0, 12, 2)])
    with pytest.raises(UserError, match=r"megapixels: test/dark/0000.jpg, \S+, \S+ and 3 more; .*--skip-bad-images"):
        folder(image_folder)


def test_bad_images_are_left_out(image_folder):
    whole = folder(image_folder)
    spoil(image_folder, ["train/bright/0001.jpg", "train/dark/0000.jpg", "test/dark/0000.jpg"])
    (image_folder / "train/dark/9999.jpg").touch()
    dataset, line = load_dataset("folder", image_folder, skip_bad_images=True)
    assert line.endswith("(2 classes, 58 train, 19 test, 4 unreadable files left out)")
    assert dataset.skipped_images == 4
    assert dataset.train.labels.tolist() == [0] * 29 + [1] * 29
    kept = [i for i in range(60) if i not in (0, 30)]
    for image, i in zip(dataset.train.images, kept, strict=True):
        np.testing.assert_array_equal(image, whole.train.images[i])


def test_a_class_without_a_readable_image_is_an_error(image_folder):
    spoil(image_folder, [f"test/dark/{i:04d}.jpg" for i in range(0, 20, 2)])
    with pytest.raises(UserError, match="test/dark: none of its files is readable"):
        folder(image_folder, skip_bad_images=True)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_check_of_images_shows_its_progress_on_a_terminal_only(terminal, image_folder, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr("rich._console", Console(file=written, force_terminal=terminal))
    assert len(folder(image_folder).train) == 60
    assert ("checking images" in written.getvalue()) == ("100%" in written.getvalue()) == terminal
    assert terminal or not written.getvalue()


READ_BY_NOBODY = """
import os
from pathlib import Path
from fastres.data.image_folder import folder
from fastres.errors import UserError

images = Path("above/images")
folder(images)  # imports Pillow's decoders while they can be read
if os.geteuid() == 0:
    os.setuid(65534)  # root is refused nothing
CLOSED = ["above", "above/images", "above/images/train", "above/images/train/dark", "above/images/train/dark/0000.jpg"]
for name in CLOSED:
    for skip in (False, True):
        os.chmod(name, 0)
        try:
            folder(images, skip_bad_images=skip)
        except UserError as error:
            print(error)
        os.chmod(name, 0o755)
os.chmod("above/images/train/dark", 0)
print(folder(images, ("bright",)).classes)
"""


def test_what_permissions_forbid_is_named_and_not_skipped(arrays, tmp_path):
    write_folder(tmp_path / "above/images", arrays)
    if os.geteuid() == 0:
        for path in (tmp_path, *tmp_path.rglob("*")):
            os.chown(path, 65534, -1)
    done = subprocess.run([sys.executable, "-c", READ_BY_NOBODY], cwd=tmp_path, capture_output=True, text=True)
    assert done.stderr == ""
    *lines, last = done.stdout.splitlines()
    assert last == "('bright',)"  # a class that is left out need not be readable
    closed = ["", "/train", "/train", "/train/dark", "/train/dark/0000.jpg"]
    for line, path in zip(lines, np.repeat(closed, 2), strict=True):
        mend = "make it readable (--skip-bad-images leaves out damaged images only)"
        assert line == f"above/images{path}: Permission denied; {mend}"


def test_cifar_without_permission(tmp_path, monkeypatch):
    root = fake_cifar10(tmp_path, monkeypatch)

    def refuse(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("torchvision.datasets.utils.check_md5", refuse)
    with pytest.raises(UserError, match=r"cifar-10-batches-py/data_batch_1: Permission denied; make it readable"):
        load_dataset("cifar10", root)


def test_hidden_files_and_leftovers_are_ignored(image_folder):
    _, line = load_dataset("folder", image_folder)
    image = (image_folder / "train/dark/0000.jpg").read_bytes()
    for name in (
        "train/.ipynb_checkpoints/0000-checkpoint.jpg",
        "train/dark/.ipynb_checkpoints/0000-checkpoint.jpg",
        "train/dark/._0000.jpg",
        "train/dark/.DS_Store",
        "train/dark/Thumbs.db",
        "train/dark/@eaDir/0000.jpg/SYNOPHOTO_THUMB_M.jpg",
        "train/__MACOSX/0000.jpg",
        "test/.DS_Store",
    ):
        path = image_folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    assert load_dataset("folder", image_folder)[1] == line


def test_images_in_subfolders_belong_to_their_class(image_folder):
    whole = folder(image_folder).train
    for i, name in ((0, "a/b/0000.jpg"), (2, "a/0002.jpg"), (58, "z.jpg/0058.jpg")):
        path = image_folder / "train/dark" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        (image_folder / f"train/dark/{i:04d}.jpg").rename(path)
    nested = folder(image_folder).train
    assert nested.labels.tolist() == whole.labels.tolist()
    assert sorted(map(bytes, nested.images)) == sorted(map(bytes, whole.images))


def test_what_is_left_out_is_counted(image_folder):
    for name in ("train/list.CSV", "train/dark/a.txt", "test/dark/more/b.txt", "test/dark/README", "test/bright/c.tif"):
        (image_folder / name).parent.mkdir(exist_ok=True)
        (image_folder / name).touch()
    assert load_dataset("folder", image_folder)[1].endswith(
        "(2 classes, 60 train, 20 test, 5 other files left out (.txt, .csv, .tif and 1 more))"
    )
    line = load_dataset("folder", image_folder, ("dark",))[1]
    assert line.endswith("(1 classes, 30 train, 10 test, 4 other files left out (.txt, .csv, no suffix))")


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("classes", [(), ("bright", COMPOSED), ("bright", DECOMPOSED)])
def test_unicode_spellings_of_a_class_are_one(classes, image_folder):
    (image_folder / "train/dark").rename(image_folder / "train" / COMPOSED)
    (image_folder / "test/dark").rename(image_folder / "test" / DECOMPOSED)
    dataset = folder(image_folder, classes)
    assert dataset.classes == ("bright", COMPOSED)
    assert np.bincount(dataset.test.labels).tolist() == [10, 10]
    with pytest.raises(UserError, match="--classes: a class is named twice"):
        folder(image_folder, (COMPOSED, DECOMPOSED))
    (image_folder / "train" / DECOMPOSED).mkdir()
    with pytest.raises(UserError, match=f"train: two folders are called {COMPOSED}, in two Unicode spellings; merge"):
        folder(image_folder)


def test_a_class_name_that_is_not_utf_8(image_folder):
    name = os.fsdecode(b"caf\xe9")
    for part in ("train", "test"):
        (image_folder / part / "dark").rename(image_folder / part / name)
    assert folder(image_folder).classes == ("bright", name)


def test_an_unknown_dataset(tmp_path):
    with pytest.raises(UserError, match=r"--dataset cifar: unknown; choose from auto, digits, cifar10, .*folder$"):
        load_dataset("cifar", tmp_path)


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_unknown_classes(name, image_folder):
    with pytest.raises(UserError, match=r"--classes.*has no cow.*it has"):
        load_dataset(name, image_folder, ("cow",))


@pytest.mark.parametrize(("name", "label"), [("digits", "3"), ("folder", "dark")])
def test_a_class_that_is_named_twice(name, label, image_folder):
    with pytest.raises(UserError, match="--classes: a class is named twice"):
        load_dataset(name, image_folder, (label, label))


def test_hold_out_splits_the_training_set(arrays):
    kept, held = arrays.hold_out(0.2, seed=1)
    assert (len(kept.train), len(held)) == (48, 12)
    together = np.concatenate([kept.train.images, held.images]).reshape(60, -1)
    assert len(np.unique(together, axis=0)) == 60
    assert not np.array_equal(held.images, arrays.hold_out(0.2, seed=2)[1].images)
    with pytest.raises(UserError, match="--val-fraction"):
        arrays.hold_out(0.001, seed=1)


def test_sample_keeps_a_part_of_the_training_set(arrays):
    sampled = arrays.sample(0.5, seed=1)
    assert len(sampled.train) == 30
    assert len(sampled.test) == len(arrays.test)
    assert np.array_equal(sampled.train.images, arrays.sample(0.5, seed=1).train.images)
    assert not np.array_equal(sampled.train.images, arrays.sample(0.5, seed=2).train.images)
    assert len(arrays.sample(1e-6, seed=1).train) == 1
    assert len(arrays.sample(0.33, seed=1).train) == 20  # 19.8
