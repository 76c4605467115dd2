import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from fastres.config import TrainConfig
from fastres.errors import RunError
from fastres.models import create_model
from fastres.profiling.measure import PlainTrainer
from fastres.training import trainer as trainer_module
from fastres.training.casts import with_cast_weights
from fastres.training.epoch import Epoch
from fastres.training.optimizer import state_tensors
from fastres.training.schedule import lr_factor
from fastres.training.trainer import Trainer, explain_out_of_memory

SETTINGS = {"device": "cpu", "amp": "off", "compile": False, "schedule": "constant", "warmup_epochs": 0.0, "lr": 0.05}
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


class Batches:
    """A loader of given batches."""

    def __init__(self, batches):
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def epoch(self, epoch, first_batch=0):
        return iter(self.batches[first_batch:])


def random_batches(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Batches(
        [
            (torch.randn(n, 3, 32, 32, generator=generator), torch.randint(0, 4, (n,), generator=generator))
            for n in sizes
        ]
    )


def small_model(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def make_trainer(batches, model=None, device="cpu", **settings):
    config = TrainConfig(**{**SETTINGS, "device": device, **settings})
    return Trainer(model or small_model(), config, torch.device(device), 4, len(batches))


def train_epoch(trainer, batches, number=0, after_step=lambda: None):
    epoch = Epoch.begin(number, trainer.device)
    trainer.train_epoch(batches, epoch, after_step)
    return epoch


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_an_epoch_is_sgd_step_by_step(nesterov, label_smoothing):
    batches = random_batches([8, 8, 5])
    trainer = make_trainer(batches, nesterov=nesterov, label_smoothing=label_smoothing)
    result = train_epoch(trainer, batches)

    model = small_model()
    velocity = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    loss_sum, correct = 0.0, 0
    for images, labels in batches.batches:
        logits = model(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        loss_sum += loss.item() * len(labels)
        correct += (logits.argmax(1) == labels).sum().item()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for (name, parameter), grad in zip(model.named_parameters(), grads, strict=True):
                grad = grad + 5e-4 * parameter
                velocity[name] = 0.9 * velocity[name] + grad
                parameter -= 0.05 * (grad + 0.9 * velocity[name] if nesterov else velocity[name])
    for ours, reference in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)
    assert result.loss == pytest.approx(loss_sum / 21)
    assert result.accuracy == pytest.approx(100 * correct / 21)
    assert (result.images, result.steps, int(result.finite_steps)) == (21, 3, 3)
    assert 0 <= result.data_wait_seconds <= result.seconds


def test_adamw_is_torchs():
    def unbiased():  # a bias before a norm has gradients of rounding errors, of which Adam makes whole steps
        model = small_model()
        model[0].bias = None
        return model

    batches = random_batches([8, 8, 5])
    trainer = make_trainer(batches, unbiased(), optimizer="adamw", momentum=0.8, weight_decay=0.1, lr=0.01)
    train_epoch(trainer, batches)

    model = unbiased()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.999), weight_decay=0.1)
    for images, labels in batches.batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    for ours, reference in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, reference)


def test_mirrored_images_are_asked_too():
    batches = random_batches([8, 5])
    trainer = make_trainer(batches)
    found = trainer.evaluate(batches, 0, mirrored=True)
    images, labels = (torch.cat(parts) for parts in zip(*batches.batches, strict=True))
    model = trainer.model.eval()
    mean = (model(images).softmax(1) + model(images.flip(3)).softmax(1)) / 2
    assert found.loss == pytest.approx(F.nll_loss(mean.log(), labels).item(), rel=1e-5)
    assert found.accuracy == pytest.approx(100 * (mean.argmax(1) == labels).double().mean().item())
    assert found.loss != trainer.evaluate(batches, 0).loss


class SlowBatches(Batches):
    """Each batch takes 20 ms."""

    def epoch(self, epoch, first_batch=0):
        for batch in super().epoch(epoch, first_batch):
            time.sleep(0.02)
            yield batch


def test_seconds_are_those_of_training_and_the_wait_is_a_part_of_them():
    batches = SlowBatches(random_batches([8] * 3).batches)
    trainer = make_trainer(batches)
    start = time.perf_counter()
    result = train_epoch(trainer, batches, after_step=lambda: time.sleep(0.1))
    assert 0.06 <= result.data_wait_seconds <= result.seconds <= time.perf_counter() - start - 0.3
    eager = PlainTrainer(small_model(), trainer.config, trainer.device)
    result = Epoch.begin(0, eager.device)
    eager.train_epoch(batches, result)
    assert 0.06 <= result.data_wait_seconds <= result.seconds


@pytest.mark.gpu
@pytest.mark.parametrize("busy", [True, False])
def test_a_gpu_that_is_busy_does_not_wait(busy):
    batches = SlowBatches([(images.cuda(), labels.cuda()) for images, labels in random_batches([8] * 5).batches])
    trainer = make_trainer(batches, device="cuda")
    trainer.warm_up()
    result = train_epoch(trainer, batches, after_step=lambda: busy and torch.cuda._sleep(2 * 10**8))  # about 0.1 s
    if busy:
        assert result.data_wait_seconds < 0.06  # the first batch is waited for
        assert result.seconds > 0.3
    else:
        assert 0.08 <= result.data_wait_seconds <= result.seconds


def test_a_compiled_model_trains_alike():
    torch.compiler.reset()
    batches = random_batches([8, 8, 5])
    compiled, plain = (make_trainer(batches, compile=flag) for flag in (True, False))
    assert compiled.forward is compiled.predict is not compiled.model
    assert plain.forward is plain.predict is plain.model
    for trainer in (compiled, plain):
        trainer.warm_up()
        train_epoch(trainer, batches)
    torch.testing.assert_close(compiled.model.state_dict(), plain.model.state_dict(), rtol=1e-4, atol=1e-5)
    assert compiled.evaluate(batches, 0).loss == pytest.approx(plain.evaluate(batches, 0).loss, rel=1e-4)


def test_without_coordinate_descent_the_compiler_is_that_of_max_autotune():
    theirs, ours = (
        make_trainer(random_batches([8]), compile=True, compile_mode=mode).forward.get_compiler_config()
        for mode in ("max-autotune", "max-autotune-no-coordinate-descent")
    )
    assert theirs["max_autotune"]
    assert theirs == ours | {"coordinate_descent_tuning": True} != ours


@pytest.mark.parametrize("device", DEVICES)
def test_warming_up_changes_nothing(device):
    batches = random_batches([8])
    model = nn.Sequential(small_model(), nn.Dropout())
    trainer = make_trainer(batches, model, device=device, batch_size=8, cuda_graphs=device == "cuda")
    train_epoch(trainer, batches)
    model = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    momentum = [tensor.clone() for tensor in state_tensors(trainer.optimizer)]
    random_state = torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state() if device == "cuda" else None
    assert trainer.warm_up() > 0
    assert device == "cpu" or torch.equal(torch.cuda.get_rng_state(), gpu_state)
    torch.testing.assert_close(trainer.model.state_dict(), model, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random_state)
    torch.testing.assert_close(state_tensors(trainer.optimizer), momentum, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.parametrize("device", DEVICES)
def test_evaluation_counts_every_image_once(device):
    batches = random_batches([8, 8, 3])
    trainer = make_trainer(batches, device=device)
    evaluation = trainer.evaluate(batches, 0)
    model = small_model().eval()
    with torch.no_grad():
        logits = torch.cat([model(images) for images, _ in batches.batches])
    labels = torch.cat([labels for _, labels in batches.batches])
    assert evaluation.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert evaluation.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    confusion = np.zeros((4, 4), int)
    np.add.at(confusion, (labels, logits.argmax(1)), 1)
    assert evaluation.confusion == confusion.tolist()
    expected = 100 * confusion.diagonal() / confusion.sum(1)
    assert evaluation.per_class_accuracy == pytest.approx(expected.tolist())


def test_cudnn_tries_its_algorithms_for_whole_batches_only(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    batches, model, seen = random_batches([8, 8, 5]), small_model(), []
    model.register_forward_pre_hook(
        lambda module, inputs: seen.append((len(inputs[0]), torch.backends.cudnn.benchmark))
    )
    trainer = make_trainer(batches, model, batch_size=8, eval_batch_size=8, cuda_graphs=False)
    train_epoch(trainer, batches)
    trainer.evaluate(batches, 0, mirrored=True)
    whole, smaller = (8, True), (5, False)
    assert seen == [whole, whole, smaller, *[whole] * 4, *[smaller] * 2]
    assert torch.backends.cudnn.benchmark


def test_top_5_of_a_hundred_classes():
    trainer = make_trainer(random_batches([8]))
    trainer.num_classes = 100
    logits = torch.zeros(4, 100)
    labels = torch.tensor([0, 50, 99, 7])
    logits[0, 0], logits[1, :4], logits[1, 50], logits[2, 10:15] = 9, 5, 1, 3  # first, fifth, sixth, among equals
    logits[3, :6] = torch.arange(6.0)
    trainer.predict = lambda images: logits
    batches = SimpleNamespace(epoch=lambda number: [(torch.zeros(4, 3, 32, 32), labels)])
    evaluation = trainer.evaluate(batches, 0)
    assert (evaluation.accuracy, evaluation.top5_accuracy) == (25.0, 50.0)
    trainer.num_classes = 99
    logits, labels = logits[:, :99], labels.clamp(max=98)
    batches = SimpleNamespace(epoch=lambda number: [(torch.zeros(4, 3, 32, 32), labels)])
    assert trainer.evaluate(batches, 0).top5_accuracy is None


def test_evaluation_leaves_the_model_as_it_is():
    batches = random_batches([8])
    trainer = make_trainer(batches)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.evaluate(batches, 0)
    torch.testing.assert_close(trainer.model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("schedule", "options"),
    [
        ("multistep", {"milestones": (1, 2), "warmup_epochs": 0.4}),
        ("cosine", {"warmup_epochs": 1.0}),
        ("onecycle", {"warmup_epochs": 0.0}),
    ],
)
def test_every_step_has_its_rate_of_the_schedule(schedule, options):
    batches = random_batches([4] * 5)
    trainer = make_trainer(batches, epochs=3, schedule=schedule, **options)
    seen = []
    for number in range(3):
        epoch = train_epoch(trainer, batches, number, lambda: seen.append(trainer.optimizer.param_groups[0]["lr"]))
        assert epoch.lr == seen[-1]
    factor = lr_factor(schedule, epochs=3, steps_per_epoch=5, **options)
    assert seen == pytest.approx([0.05 * factor(step) for step in range(15)])


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("loop", [Trainer, PlainTrainer])
def test_precision_and_layout_reach_the_model(loop, amp, channels_last):
    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            self.out = self.conv(x)
            return self.out.mean((2, 3))

    batches = random_batches([4])
    trainer = make_trainer(batches, Probe(), amp=amp, channels_last=channels_last)
    if loop is PlainTrainer:
        trainer = PlainTrainer(trainer.model, trainer.config, trainer.device)
    trainer.train_epoch(batches, Epoch.begin(0, trainer.device))
    out = trainer.model.out
    assert out.dtype == (torch.bfloat16 if amp == "bf16" else torch.float32)
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_a_graph_is_for_whole_batches_and_keeps_the_schedule(monkeypatch):
    replayed = []

    def capture(step, images, labels):  # a replay would do what the step does, with its learning rate
        step(images, labels)
        return lambda *batch: replayed.append(len(batch[1])) or step(*batch)

    monkeypatch.setattr(trainer_module, "captured", capture)
    batches = random_batches([8, 8, 5])
    capturing, plain = (
        make_trainer(batches, batch_size=8, cuda_graphs=flag, schedule="cosine", epochs=2) for flag in (True, False)
    )
    lr = capturing.optimizer.param_groups[0]["lr"]
    capturing.warm_up()
    train_epoch(capturing, batches)
    assert replayed == [8, 8]
    assert capturing.optimizer.param_groups[0]["lr"] is lr  # which a graph goes on reading
    assert train_epoch(plain, batches).lr == pytest.approx(lr.item())
    capturing.evaluate(batches, 0)
    assert replayed == [8, 8]
    torch.testing.assert_close(capturing.model.state_dict(), plain.model.state_dict(), rtol=1e-6, atol=1e-7)


def test_there_is_a_graph_for_each_size(monkeypatch):
    captured = []

    def capture(step, images, labels):
        captured.append(images.size(3))
        return lambda *batch: captured.append(-batch[0].size(3)) or step(*batch)

    monkeypatch.setattr(trainer_module, "captured", capture)
    small = [(torch.randn(8, 3, size, size), torch.arange(8) % 4) for size in (16, 16, 24, 32)]
    batches = random_batches([8] * 4)
    batches.batches = small
    trainer = make_trainer(batches, batch_size=8, cuda_graphs=True, image_size_schedule="16:0.5,24:0.7")
    trainer.warm_up()
    train_epoch(trainer, batches)
    assert captured == [16, 24, 32, -16, -16, -24, -32]


def test_running_out_of_memory_names_the_batch_size_also_from_within_a_capture():
    def step(capturing):
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            if capturing:
                raise RuntimeError("the capture was broken off")

    for capturing in (True, False):
        message = "--batch-size 8: out of memory; try --batch-size 4"
        with pytest.raises(RunError, match=message), explain_out_of_memory("--batch-size", 8):
            step(capturing)
    with pytest.raises(ValueError, match="another"), explain_out_of_memory("--batch-size", 8):
        raise ValueError("another error")
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory("--batch-size", 8):
        raise RuntimeError("another error")


def test_a_first_step_that_fp16_skips_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # with NaN
    batches = random_batches([8])
    trainer = make_trainer(batches, amp="fp16")
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    torch.use_deterministic_algorithms(True)
    try:
        train_epoch(trainer, batches)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert not any(buffer.any() for buffer in state_tensors(trainer.optimizer))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("settings", "amp", "tolerance"),
    [
        ({"cuda_graphs": True}, "off", 1e-3),
        ({"cuda_graphs": True}, "bf16", 2e-2),
        ({"cuda_graphs": True}, "fp16", 1e-2),
        ({"cuda_graphs": True, "compile": True}, "off", 1e-3),
        ({"compile": True, "compile_mode": "reduce-overhead"}, "off", 1e-3),
    ],
)
def test_training_in_cuda_graphs_is_training(settings, amp, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    batches = random_batches([32] * 5 + [20] + [32] * 4)
    sums = []  # of the losses so far
    for engine in ({}, settings):
        torch.manual_seed(0)
        model = create_model("resnet18", 4, zero_gamma=True)
        trainer = make_trainer(
            batches, model, device="cuda", batch_size=32, lr=0.01, schedule="cosine", epochs=1, amp=amp, **engine
        )
        trainer.warm_up()
        epoch, seen = Epoch.begin(0, trainer.device), []
        trainer.train_epoch(batches, epoch, lambda epoch=epoch, seen=seen: seen.append(epoch.loss_sum.item()))
        sums.append(seen)
    assert len(sums[0]) == 10
    assert sums[1] == pytest.approx(sums[0], rel=tolerance)


@pytest.mark.gpu
def test_a_graph_draws_new_dropout_at_every_step():
    ((images, labels),) = random_batches([8]).batches
    trainer = make_trainer(
        random_batches([8]),
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.Dropout()),
        device="cuda",
        batch_size=8,
        cuda_graphs=True,
    )
    trainer.warm_up()
    trainer.model.train()
    (replay,) = trainer.replays.values()
    first, second = (replay(images.cuda(), labels.cuda())[1].clone() for _ in range(2))
    assert not torch.equal(first == 0, second == 0)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_no_synchronisation_inside_an_epoch(cuda_graphs):
    batches = random_batches([8] * 4)
    batches.batches = [(images.cuda(), labels.cuda()) for images, labels in batches.batches]
    trainer = make_trainer(batches, device="cuda", batch_size=8, cuda_graphs=cuda_graphs)
    trainer.warm_up()
    train_epoch(trainer, batches)
    steps = []

    def forbid():
        steps.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(steps) < 4 else "default")  # an epoch ends with waiting

    try:
        train_epoch(trainer, batches, 0, forbid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(steps) == 4


class Shared(nn.Module):
    """A convolution of which a parametrization makes the weight, one that has two names, and two with one weight."""

    def __init__(self):
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.second = self.third = nn.Conv2d(8, 8, 3)
        self.fourth = nn.Conv2d(8, 8, 3, bias=False)
        self.fourth.weight = self.third.weight
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.fourth(self.third(self.second(self.first(x)).relu())).mean((2, 3)))


@pytest.mark.parametrize("model", [Shared(), nn.Sequential(nn.AvgPool2d(32), nn.Flatten())], ids=["layers", "none"])
def test_weights_cast_at_once_are_those_that_autocast_casts(model):
    images = torch.randn(6, 3, 32, 32)
    results = []
    for forward in (model, with_cast_weights(model, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(images)
        parameters = list(model.parameters())
        assert all(parameter.is_leaf for parameter in parameters)
        results.append(
            [logits, *(torch.autograd.grad(logits.float().square().sum(), parameters) if parameters else ())]
        )
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
