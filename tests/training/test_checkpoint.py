"""A run's files: written whole or not at all, and refused in one line where they are damaged or do not fit."""

import pickle
import random
import resource
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastres.errors import Interrupted, RunError, UserError
from fastres.training.checkpoint import read_checkpoint, save_weights
from tests.training.conftest import start

pytestmark = pytest.mark.usefixtures("tiny_vgg11")


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
@pytest.mark.parametrize("name", ["last.pt", "best.safetensors"])
def test_a_full_disk_keeps_the_old_file(name, finished):
    run, _ = finished
    path = run.folder / name
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(RunError, match=rf"{name}: cannot be written \(.*make room, then --resume"):
            run._save() if name == "last.pt" else save_weights(run.trainer.model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert not list(run.folder.glob("*.tmp"))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello", pickle.dumps({"format": "fastres checkpoint 2"})],
    ids=["empty", "text", "pickle"],
)
def test_what_is_no_checkpoint(content, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"--resume .*last.pt: not a checkpoint"):
        read_checkpoint(path)


def test_a_compressed_checkpoint_is_refused(finished):
    """Since torch.save compresses nothing, a file that is larger inside than outside can only mean to fill memory."""
    run, _ = finished
    path = run.folder / "last.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for compression in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(path, "w", compression) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        if compression == zipfile.ZIP_STORED:
            read_checkpoint(path)
        else:
            with pytest.raises(UserError, match="not a checkpoint"):
                read_checkpoint(path)


def test_flipped_bits_in_the_best_weights_are_noticed(finished):
    run, _ = finished
    path = run.folder / "best.safetensors"
    content = path.read_bytes()
    weights = 8 + int.from_bytes(content[:8], "little")  # where the header ends
    draw = random.Random(0)
    for _ in range(50):
        damaged = bytearray(content)
        damaged[draw.randrange(weights, len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"best.safetensors: damaged, its checksum"):
            run.evaluate_weights("best")


def test_weights_from_elsewhere_need_no_checksum(finished):
    run, summary = finished
    path = run.folder / "best.safetensors"
    state = load_file(path)
    save_file(state, path)
    assert run.evaluate_weights("best").loss == pytest.approx(summary["best_test_loss"])
    save_file({name: tensor for name, tensor in state.items() if name != "7.bias"}, path)
    with pytest.raises(UserError, match=r"best.safetensors: does not hold weights of this model"):
        run.evaluate_weights("best")


@pytest.fixture
def saved_within_an_epoch(arrays, tmp_path):
    """A checkpoint after one epoch and two steps of the second."""
    run = start(arrays, tmp_path / "run")
    stops = iter([0, 0, 0, 0, 2])
    with pytest.raises(Interrupted):
        run.fit(signalled=lambda: next(stops))
    return read_checkpoint(run.folder)


def change(*path, to):
    """A function that replaces, or with ``to`` None removes, the value at ``path`` in nested containers."""

    def damage(state):
        *parents, last = path
        for name in parents:
            state = state[name]
        if to is None:
            del state[last]
        else:
            state[last] = to(state[last]) if callable(to) else to

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("history", to=lambda rows: {}), "its history is not a list"),
        (change("history", 0, to="row"), "no proper row of epoch 1"),
        (change("history", 0, "test_accuracy", to=None), "no proper row of epoch 1"),
        (change("history", 0, "test_accuracy", to="90"), "no proper row of epoch 1"),
        (change("history", 0, "epoch", to=2), "no proper row of epoch 1"),
        (change("history", 0, "epoch_seconds", to=0.0), "no proper row of epoch 1"),
        (change("epoch", "loss_sum", to=None), "epoch has no 'loss_sum'"),
        (change("epoch", "more", to=1), "epoch has an unknown 'more'"),
        (change("epoch", "steps", to=4), "it is at step 4 of epoch 2, after 1 finished ones"),
        (change("epoch", "number", to=5), "it is at step 2 of epoch 6, after 1 finished ones"),
        (change("epoch", "steps", to="2"), "epoch steps is str instead of int"),
        (change("steps_per_epoch", to=4), "its epochs have 4 steps instead of 3: was the training set another"),
        (change("model", "0.weight", to=None), "model has no '0.weight'"),
        (change("model", "0.weight", to=1.0), r"0.weight is float instead of a strided float32 \[8, 3, 3, 3\]"),
        (change("model", "0.weight", to=torch.ones(8, 3, 3, 2)), r"is a strided float32 \[8, 3, 3, 2\] instead of"),
        (change("model", "0.weight", to=lambda weight: weight.double()), "is a strided float64 "),
        (change("model", "0.weight", to=lambda weight: weight.to_sparse()), "is a sparse_coo float32 "),
        (change("model", "0.weight", to=lambda weight: weight.to("meta")), "is a meta strided float32 "),
        (change("epoch", "loss_sum", to=lambda sums: sums.requires_grad_()), "is a differentiable strided float64"),
        (change("optimizer", 7, to=None), "optimizer has no '7'"),
        (
            change("optimizer", 7, "momentum_buffer", to=torch.ones(3)),
            r"optimizer 7 momentum_buffer is a strided float32 \[3\] instead of",
        ),
        (change("optimizer", to=lambda state: {}), "optimizer has no '0'"),
        (change("scaler", to=lambda scaler: []), "scaler is list instead of dict"),
        (change("rng", 0, to=lambda rng: rng[1:]), "rng is a strided uint8"),
        (change("rng", to=torch.zeros(9)), "rng has not a state for each process"),
        (change("cuda_rng", to=lambda states: []), "cuda_rng has not a state for each process"),
        (change("rng", 0, to=torch.zeros_like), "mt19937"),
    ],
)
def test_a_checkpoint_that_does_not_fit(damage, message, saved_within_an_epoch, arrays, tmp_path):
    start(arrays, tmp_path / "run", saved_within_an_epoch)
    damage(saved_within_an_epoch)
    with pytest.raises(UserError, match=r"--resume .*run: last.pt does not fit this run \(.*" + message) as error:
        start(arrays, tmp_path / "run", saved_within_an_epoch)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_a_checkpoint_with_another_random_state_of_cuda(arrays, tmp_path):
    settings = {"device": "cuda", "epochs": 1}
    start(arrays, tmp_path / "run", **settings).fit()
    checkpoint = read_checkpoint(tmp_path / "run") | {"cuda_rng": ["x"]}
    with pytest.raises(UserError, match="cuda_rng is str instead of a strided uint8"):
        start(arrays, tmp_path / "run", checkpoint, **settings)


def test_a_checkpoint_of_another_training_set(saved_within_an_epoch, arrays, tmp_path):
    smaller = replace(arrays, train=arrays.train.take(np.arange(40)))
    with pytest.raises(UserError, match="its epochs have 3 steps instead of 2: was the training set another"):
        start(smaller, tmp_path / "run", saved_within_an_epoch)
