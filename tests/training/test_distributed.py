"""Jobs of two processes: by torchrun, as users start them, and forked around a piece of one. Gloo, on the CPU."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastres import profile, study
from fastres.config import TrainConfig
from fastres.errors import Interrupted, UserError
from fastres.models import MODELS
from fastres.nn import BatchNormReLU2d, SyncBatchNormReLU2d
from fastres.training import distributed
from fastres.training.checkpoint import read_checkpoint
from fastres.training.epoch import Epoch
from fastres.training.hardware import resolve
from fastres.training.run import Run
from tests.conftest import CommandLine
from tests.training.conftest import assert_same_run

JOINT = 2  # processes


def join(rank, store, function, args):
    torch.set_num_threads(1)
    multiprocessing.set_start_method(None, force=True)  # the default, as in a process that torchrun starts
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=JOINT)
    function(*args)
    dist.destroy_process_group()


def jointly(function, tmp_path, *args):
    """Calls ``function`` in both processes of a job; a failure of one is this test's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    store = tmp_path / f"store-{len(list(tmp_path.iterdir()))}"
    processes = [context.Process(target=join, args=(rank, store, function, args)) for rank in range(JOINT)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * JOINT


@pytest.mark.parametrize(("rank", "error"), [(0, UserError), (1, SystemExit)])
def test_all_processes_end_with_the_exit_code_of_rank_0(rank, error, monkeypatch):
    def broadcast(outcome):
        sent.append(list(outcome))
        if rank == 1:
            outcome[:] = [None, 2]

    def make():
        raise UserError("--lr: bad")

    sent = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    with pytest.raises(error) as raised:
        distributed.on_rank_0(make)
    if rank == 0:
        assert sent == [[None, 2]]
    else:
        assert raised.value.code == 2


def test_every_process_takes_a_gpu_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: taken[-1])
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.local_device("cuda") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="--nproc-per-node 3: each takes a GPU, and there are 2"):
        distributed.local_device("cuda")


def normalise_jointly(options):
    generator = torch.Generator().manual_seed(0)
    x, residual, grad = torch.randn(3, 5, 6, 4, 4, generator=generator, dtype=torch.float64)
    x += torch.arange(6).view(6, 1, 1)  # channels of unlike means
    mine = slice(0, 3) if dist.get_rank() == 0 else slice(3, 5)
    whole, part = (layer(6, **options["layer"]).double() for layer in (BatchNormReLU2d, SyncBatchNormReLU2d))
    for layer, rows in ((whole, slice(0, 5)), (part, mine)):
        if layer.weight is not None:
            with torch.no_grad():
                layer.weight.copy_(torch.linspace(-1, 2, 6))
                layer.bias.copy_(torch.linspace(-1, 1, 6))
        inputs = [tensor[rows].clone().requires_grad_() for tensor in (x, residual)]
        layer.y = layer(inputs[0], inputs[1] if options["residual"] else None)
        layer.y.backward(grad[rows])
        layer.grads = [tensor.grad for tensor in inputs if tensor.grad is not None]
    torch.testing.assert_close(part.y, whole.y[mine])
    torch.testing.assert_close(part.grads, [tensor[mine] for tensor in whole.grads])
    for ours, joined in zip(part.parameters(), whole.parameters(), strict=True):
        dist.all_reduce(ours.grad)
        torch.testing.assert_close(ours.grad, joined.grad)
    torch.testing.assert_close(dict(part.named_buffers()), dict(whole.named_buffers()))
    torch.testing.assert_close(part.eval()(x), whole.eval()(x))


def normalise_all_jointly(all_options):
    for options in all_options:
        normalise_jointly(options)


def test_sync_bn_is_batch_norm_of_the_joined_batch(tmp_path):
    layers = [{}, {"relu": False}, {"affine": False}, {"momentum": None}, {"track_running_stats": False}, {"eps": 0.1}]
    options = [{"layer": layer, "residual": residual} for layer in layers for residual in (True, False)]
    jointly(normalise_all_jointly, tmp_path, options)


def normalise_half_precision():
    torch.manual_seed(dist.get_rank())
    x = 2 * dist.get_rank() + torch.randn(4, 8, 5, 5).to(memory_format=torch.channels_last)
    outs = []
    for autocast in (False, True):
        layer = SyncBatchNormReLU2d(8)
        inner = x.clone().requires_grad_()
        y = layer(inner.bfloat16() if autocast else inner)
        assert y.is_contiguous(memory_format=torch.channels_last)
        y.float().square().sum().backward()
        outs.append((y.float(), inner.grad, layer.weight.grad, layer.running_var))
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(outs[1], outs[0], rtol=0.05, atol=0.05)


def test_sync_bn_of_bfloat16(tmp_path):
    jointly(normalise_half_precision, tmp_path)


class Residual(nn.Module):
    """A residual block and little else; nothing random in it."""

    def __init__(self, num_classes, norm_layer):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn1 = norm_layer(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.bn2 = norm_layer(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        return self.fc(self.bn2(self.conv2(x), residual=x).mean((2, 3)))


SETTINGS = {
    "model": "vgg11", "dataset": "folder", "augmentation": "crop-flip-cutout", "epochs": 5, "batch_size": 10,
    "drop_last": False, "lr": 0.05, "device": "cpu", "amp": "off", "output_dir": "unused",
}  # fmt: skip


def make_run(dataset, **settings):
    MODELS["vgg11"] = MODELS["resnet18"] = Residual
    config, _ = resolve(TrainConfig(**{**SETTINGS, **settings}), dataset)
    return Run(config, dataset)


def losses_of_training(dataset, **settings):
    """Over the images of all processes: the loss of every step, the weights after the last, and its epoch's loss."""
    run = make_run(dataset, **settings)
    sums = []
    for number in range(run.config.epochs):
        epoch = Epoch.begin(number, run.trainer.device)
        sums.append((0.0, 0))
        run.trainer.train_epoch(
            run.train_loader, epoch, lambda epoch=epoch: sums.append((epoch.loss_sum.item(), epoch.images))
        )
    parts = torch.tensor(distributed.gather(sums), dtype=torch.float64).sum(0).diff(dim=0)
    steps = parts[parts[:, 1] > 0]
    return steps[:, 0] / steps[:, 1], dict(run.trainer.model.state_dict()), epoch.of_all_processes().loss


def train_jointly(dataset, settings, path):
    trained = losses_of_training(dataset, **settings)
    if dist.get_rank() == 0:
        torch.save(trained, path)


@pytest.fixture
def restored_models(monkeypatch):
    for name in ("vgg11", "resnet18"):
        monkeypatch.setitem(MODELS, name, MODELS[name])


@pytest.mark.usefixtures("restored_models")
def test_losses_of_one_and_of_two_processes(arrays, tmp_path):
    dataset = replace(arrays, train=arrays.train.take(torch.arange(57).numpy()))  # the last batch: 4 and 3 images
    alone = losses_of_training(dataset)
    two = {}
    for sync_bn in (True, False):
        path = tmp_path / f"{sync_bn}.pt"
        jointly(train_jointly, tmp_path, dataset, {"sync_bn": sync_bn}, path)
        two[sync_bn] = torch.load(path)
    assert len(alone[0]) == 30
    assert alone[0][-6:].mean() < 0.8 * alone[0][:6].mean()
    torch.testing.assert_close(two[True], alone, rtol=0, atol=1e-4)
    assert (two[False][0] - alone[0]).abs().max() > 1e-3  # statistics of half a batch are other statistics


@pytest.mark.usefixtures("restored_models")
def test_the_tricks_of_the_fast_recipe_in_one_and_in_two_processes(arrays, tmp_path):
    settings = {
        "model": "resnet18", "optimizer": "muon", "lr": 0.02, "sgd_lr": 0.05, "image_size_schedule": "16:0.3,24:0.5",
        "augmentation": "reflectcrop-altflip-cutout", "drop_last": True, "sync_bn": True,
    }  # fmt: skip
    assert_same_in_two_processes(arrays, settings, tmp_path)


@pytest.mark.usefixtures("restored_models")
@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
def test_images_mixed_in_one_and_in_two_processes(mixing, arrays, tmp_path):
    """The last batch: 4 and 3 images."""
    dataset = replace(arrays, train=arrays.train.take(torch.arange(55).numpy()))
    settings = {"augmentation": f"crop-flip-{mixing}", "batch_size": 8, "sync_bn": True}
    assert_same_in_two_processes(dataset, settings, tmp_path, steps=35, falls_to=0.9, atol=1e-4)


def assert_same_in_two_processes(dataset, settings, tmp_path, steps=30, falls_to=0.8, atol=1e-2):
    alone = losses_of_training(dataset, **settings)
    jointly(train_jointly, tmp_path, dataset, settings, tmp_path / "two.pt")
    assert len(alone[0]) == steps
    assert alone[0][-6:].mean() < falls_to * alone[0][:6].mean()
    torch.testing.assert_close(torch.load(tmp_path / "two.pt"), alone, rtol=0, atol=atol)  # Muon's steps are bfloat16


def evaluate_jointly(dataset, alone):
    if sys.version_info < (3, 12):
        os.fork = None  # beside Gloo's threads Python 3.11 forks with luck only
    for loader in ("dali", "eager"):
        for images, expected in alone.items():
            test = dataset.test.take(torch.arange(images).numpy())
            run = make_run(replace(dataset, test=test), loader=loader, eval_batch_size=7)
            if dist.get_rank() == 1:  # whose statistics must not count
                run.trainer.model.bn1.running_mean += 1
            evaluation = run.trainer.evaluate(run.test_loader, 0)
            assert evaluation.confusion == expected.confusion
            assert evaluation.loss == pytest.approx(expected.loss, rel=1e-5)


@pytest.mark.usefixtures("restored_models")
def test_evaluation_counts_each_image_once(arrays, tmp_path):
    alone = {}
    for images in (1, 2, 9, 20):
        run = make_run(replace(arrays, test=arrays.test.take(torch.arange(images).numpy())))
        alone[images] = run.trainer.evaluate(run.test_loader, 0)
        assert sum(map(sum, alone[images].confusion)) == images
    jointly(evaluate_jointly, tmp_path, arrays, alone)


def stop_jointly(dataset, folder):
    run = make_run(dataset, output_dir=folder)
    signals = iter([0, 0, 15, 0] if dist.get_rank() == 1 else [0] * 4)
    with pytest.raises(Interrupted) as stop:
        run.fit(signalled=lambda: next(signals))
    assert (stop.value.exit_code, next(signals)) == (143, 0)


@pytest.mark.usefixtures("restored_models")
def test_a_signal_to_one_process_stops_all_after_that_step(arrays, tmp_path):
    jointly(stop_jointly, tmp_path, arrays, tmp_path / "run")
    assert read_checkpoint(tmp_path / "run")["epoch"]["steps"] == 3


def torchrun(*arguments, restarts=0, module="tests.training.tiny_job", **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={JOINT}"]
    command += [f"--max-restarts={restarts}", "-m", module, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    # a job takes 10 s; one that never ends, or leaves a process with its pipes, must not hold the suite
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


FLAGS = (
    "--model", "vgg11", "--dataset", "digits", "--train-fraction", 0.06, "--augmentation", "crop-flip", "--epochs", 3,
    "--batch-size", 8, "--no-drop-last", "--lr", 0.02, "--device", "cpu", "--amp", "off", "--loader", "dali",
)  # fmt: skip
STEPS = 11  # an epoch, of 86 images


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("jobs") / "whole"
    done = torchrun(*FLAGS, "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^epoch +\d/3 ", done.stdout, re.M)) == 3
    assert done.stdout.count("dataset: digits") == done.stdout.count("run: ") == 1
    return folder


def test_a_job_leaves_what_a_run_leaves(whole):
    names = sorted(re.sub(r"events\..*", "events", path.name) for path in whole.iterdir())
    assert names == sorted(
        [
            ".lock",
            "best.safetensors",
            "last.safetensors",
            "config.json",
            "curves.png",
            "events",
            "history.csv",
            "history.pkl",
            "last.pt",
            "summary.json",
        ]
    )
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["world_size"], sum(map(sum, summary["confusion_matrix"]))) == (2, 360)
    history = pd.read_csv(whole / "history.csv")
    # of the whole job: 86 images an epoch
    assert (history["images_per_second"] * history["epoch_seconds"]).tolist() == pytest.approx([86] * 3)
    correct = history["train_accuracy"] * 0.86
    assert correct.tolist() == pytest.approx(correct.round().tolist())


def test_a_job_stopped_by_sigterm_to_torchrun_ends_bit_identically(whole, tmp_path):
    stopped = torchrun(*FLAGS, "--output-dir", tmp_path / "part", FAULT=f"1 {STEPS + 5} SIGTERM torchrun")
    assert stopped.returncode != 0
    assert stopped.stderr.count("stopped by SIGTERM; --resume") == 1
    assert read_checkpoint(tmp_path / "part")["epoch"]["steps"] < STEPS
    resumed = torchrun("--resume", tmp_path / "part")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(whole, tmp_path / "part")


def test_a_process_that_dies_ends_the_job_and_the_workers(tmp_path):
    flags = (*FLAGS, "--loader", "eager", "--workers", 1, "--output-dir", tmp_path / "part")
    died = torchrun(*flags, FAULT=f"0 {STEPS + 5} SIGKILL self")
    assert died.returncode != 0
    message = (
        f"rank 1: another process of this job died; its own message says why; --resume {tmp_path / 'part'} goes on"
    )
    assert died.stderr.count(f"python -m fastres.train: error: {message}\n") == 1
    assert "RuntimeError" not in died.stderr


def test_max_restarts(whole, tmp_path):
    flags = (*FLAGS, "--output-dir", tmp_path / "part")
    restarted = torchrun(*flags, restarts=1, FAULT=f"1 {STEPS + 5} SIGKILL self")
    assert restarted.returncode == 0, restarted.stderr
    assert f"restart 1 of 1: goes on from {tmp_path / 'part/last.pt'}" in restarted.stdout
    assert_same_run(whole, tmp_path / "part")


@pytest.fixture
def machines():
    """Two network namespaces, joined by a cable."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    names = [f"fastres-{os.getpid()}-{i}" for i in range(2)]
    ends = [f"fr{os.getpid()}{i}"[:15] for i in range(2)]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add {ends[0]} netns {names[0]} type veth peer name {ends[1]} netns {names[1]}"]
    for i, (name, end) in enumerate(zip(names, ends, strict=True)):
        commands += [f"-n {name} addr add 10.99.7.{i + 1}/24 dev {end}"]
        commands += [f"-n {name} link set {device} up" for device in ("lo", end)]
    try:
        for command in commands:
            if subprocess.run(["ip", *command.split()], capture_output=True).returncode:
                pytest.skip(f"ip {command} does not work here")
        yield list(zip(names, ends, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def torchrun_on(machines, *arguments, fault=""):
    """One process on each machine; returns the exit codes and the text of both."""
    jobs = []
    for number, (name, end) in enumerate(machines):
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes=2"]
        command += [f"--node-rank={number}", "--nproc-per-node=1", "--master-addr=10.99.7.1", "--master-port=29500"]
        command += ["-m", "tests.training.tiny_job", *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": end, "FAULT": fault}
        pipe = subprocess.PIPE
        jobs.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    texts = [job.communicate(timeout=180)[0] for job in jobs]
    return [job.returncode for job in jobs], texts


def test_a_machine_that_dies_and_comes_back(machines, whole, tmp_path):
    flags = (*FLAGS, "--output-dir", tmp_path / "part")
    codes, texts = torchrun_on(machines, *flags, fault=f"1 {STEPS + 5} SIGKILL both")
    assert codes[0] == 1
    assert f"another process of this job died; its own message says why; --resume {tmp_path / 'part'}" in texts[0]
    assert codes[1] == -9
    codes, texts = torchrun_on(machines, "--resume", tmp_path / "part")
    assert codes == [0, 0], texts
    assert_same_run(whole, tmp_path / "part")


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--batch-size", 31, "must be a multiple of the 2 processes"),
        ("--weights", "best", "needs --eval; a new run has --select"),
    ],
)
def test_an_error_of_all_is_said_once(flag, value, message):
    done = torchrun("--dataset", "digits", flag, value, module="fastres.train")
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("python -m fastres.train: ")]
    assert errors == [f"python -m fastres.train: error: {flag} {value}: {message}"]


def test_a_checkpoint_that_does_not_fit_is_said_once(whole, tmp_path):
    state = torch.load(whole / "last.pt", weights_only=True)
    state["steps_per_epoch"] += 1
    torch.save(state, tmp_path / "last.pt")
    done = torchrun("--resume", tmp_path)
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("python -m fastres.train: ")]
    assert "last.pt does not fit this run (its epochs have 12 steps instead of 11" in error


def test_fewer_images_in_the_last_batch_than_processes(arrays, monkeypatch):
    monkeypatch.setattr("fastres.training.hardware.world_size", lambda: 4)
    for batch_size in (8, 20, 28):
        resolve(TrainConfig(**{**SETTINGS, "batch_size": batch_size}), arrays)
    with pytest.raises(UserError, match=r"--batch-size 58.*multiple of the 4 processes"):
        resolve(TrainConfig(**{**SETTINGS, "batch_size": 58}), arrays)
    few = replace(arrays, train=arrays.train.take(torch.arange(59).numpy()))
    with pytest.raises(UserError, match=r"--batch-size 8: leaves 3 of 59 images for the last batch of 4.*--drop-last"):
        resolve(TrainConfig(**{**SETTINGS, "batch_size": 8}), few)
    resolve(TrainConfig(**{**SETTINGS, "batch_size": 8, "drop_last": True}), few)
    mixing = {**SETTINGS, "augmentation": "mixup"}
    with pytest.raises(UserError, match=r"--batch-size 20: must be a multiple of twice the 4 processes, each with pai"):
        resolve(TrainConfig(**{**mixing, "batch_size": 20}), arrays)
    with pytest.raises(UserError, match=r"--batch-size 8: leaves 4 of 60 images for the last batch of 4.*--drop-last"):
        resolve(TrainConfig(**{**mixing, "batch_size": 8}), arrays)


@pytest.fixture
def one_of_torchrun(monkeypatch):
    """Makes this process one that torchrun started alone."""

    def start(**environment):
        for name, value in {"TORCHELASTIC_RUN_ID": "0", "RANK": "0", "WORLD_SIZE": "1", **environment}.items():
            monkeypatch.setenv(name, value)

    return start


@pytest.mark.parametrize("module", [study, profile], ids=lambda module: module.__name__)
def test_other_command_lines_are_for_one_process(module, one_of_torchrun, capfd):
    command_line = CommandLine(capfd, module.main)
    one_of_torchrun()
    assert command_line("architecture", "--epochs", 1) == 2
    assert command_line.err == f"python -m {module.__name__}: error: runs in one process; start it without torchrun\n"
    one_of_torchrun(RANK="1")
    assert (command_line("architecture"), command_line.err) == (2, "")


@pytest.mark.usefixtures("tiny_vgg11")
def test_restarts_need_and_recognise_their_folder(one_of_torchrun, command_line, tmp_path):
    one_of_torchrun(TORCHELASTIC_RESTART_COUNT="0", TORCHELASTIC_MAX_RESTARTS="2")
    assert command_line(*FLAGS) == 2
    assert re.search(r"error: --output-dir: needed with torchrun's --max-restarts.*\n$", command_line.err)

    one_of_torchrun(TORCHELASTIC_RESTART_COUNT="1")
    flags = (*FLAGS, "--epochs", 1, "--warmup-epochs", 0, "--amp", "auto", "--output-dir", tmp_path)
    for name in (".lock", "config.json"):  # the first start died before it saved anything
        (tmp_path / name).touch()
    assert command_line(*flags) == 0
    assert "goes on from" not in command_line.out
    assert command_line(*flags) == 0
    assert "restart 1 of 2: goes on from" in command_line.out
    assert command_line(*flags, "--lr", 0.5) == 2
    assert "--lr 0.5: " in command_line.err
