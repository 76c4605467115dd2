"""Networks of other people: how they are named, imported and checked, and the fused operator in them."""

import pytest
import torch
import torchvision
from torch import nn

from fastres.errors import UserError
from fastres.models import create_model, create_to_count, register_model
from fastres.models.own import fuse_norms
from fastres.nn import BatchNormReLU2d
from fastres.profiling.roofline import forward_macs, step_kernels

SOURCE = """
from torch import nn
from helper import WIDTH

def net(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, WIDTH, 3, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.BatchNorm2d(WIDTH),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, num_classes),
    )

class Early(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.parts = nn.Sequential(nn.Conv2d(3, num_classes, 3), nn.BatchNorm2d(num_classes), nn.ReLU())

    def forward(self, x):
        return self.parts[1](self.parts[0](x)).mean((2, 3))

def zero(num_classes):
    model = Early(num_classes)
    nn.init.zeros_(model.parts[1].weight)
    return model

def two(num_classes, width): ...
def keywords(*, num_classes): ...
def nothing(num_classes): ...
def seven(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))
def pair(num_classes): return nn.Sequential(nn.Flatten(), nn.Linear(3072, num_classes), nn.LSTM(num_classes, 2))
def large(num_classes): return nn.Linear(64, num_classes)
def lazy(num_classes): return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))
def raising(num_classes):
    raise ValueError("no such\\nwidth")

number = 3
"""


@pytest.fixture
def folder(own_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "helper.py").write_text("WIDTH = 6")
    (tmp_path / "nets.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("import torch\n\ntorch.nn.Conf2d")
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)")
    return tmp_path


def registered(name, num_classes, **options):
    register_model(name)
    return create_model(name, num_classes, **options)


def test_a_function_of_a_file_or_a_module(folder):
    x = torch.randn(4, 3, 32, 32)
    for name in ("nets.py:net", f"{folder}/nets.py:net", "nets:net"):
        register_model(name)
        torch.manual_seed(0)
        fused, norms = create_model(name, 5), []
        torch.manual_seed(0)
        plain = create_model(name, 5, fused=False)
        for model, kind in ((fused, BatchNormReLU2d), (plain, nn.BatchNorm2d)):
            norms.append([module for module in model.modules() if type(module) is kind])
        assert [len(kind) for kind in norms] == [2, 2]
        assert [norm.relu for norm in norms[0]] == [True, False]
        torch.testing.assert_close(fused(x), plain(x))
        torch.testing.assert_close(fused.state_dict(), plain.state_dict())


COUNTED = """
import torch

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.shift = torch.zeros(1, 3, 1, 1)  # no buffer
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        x = self.norm(self.conv(input=x + self.shift)).relu()
        assert x.sum().item() >= 0
        return self.fc(nn.functional.dropout(x.mean((2, 3)), 0.5, self.training))
"""


def test_it_is_counted_without_the_meta_device(folder):
    (folder / "counted.py").write_text(SOURCE + COUNTED)
    register_model("counted.py:Net")
    before = torch.get_rng_state()
    model = create_to_count("counted.py:Net", 5)
    convolution, linear = 6 * 27 * 30 * 30, 6 * 5
    assert forward_macs(model) == convolution + linear
    kernels = step_kernels(model, 10, torch.float32)
    assert sum(kernel.flops for kernel in kernels) == 2 * 10 * (2 * convolution + 3 * linear)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets.py", "--model: invalid choice 'nets.py'; choose from .*vgg11.*file.py:function"),
        ("nets.py:", "--model: invalid choice 'nets.py:'"),
        ("no.py:net", r"--model no.py:net: cannot be imported \(FileNotFoundError: no file no.py\)"),
        ("no:net", r"--model no:net: cannot be imported \(ModuleNotFoundError: No module named 'no'\)"),
        (":net", r"--model :net: cannot be imported \(ValueError"),
        ("broken.py:net", r"cannot be imported \(AttributeError: .*Conf2d.*broken.py, line 3\)"),
        ("leaving:net", r"cannot be imported \(SystemExit: 0, .*leaving.py, line 1\)"),
        ("nets.py:nett", "nets.py has no function nett; it has net, zero, two and 7 more"),
        ("nets.py:number", "nets.py has no function number"),
        ("torch:relu", r"callable with the number of classes as its only argument \(no signature found"),
        ("nets.py:two", r"callable with the number of classes as its only argument \(missing .*'width'\)"),
        ("nets.py:keywords", "callable with the number of classes as its only argument"),
        ("nets.py:nothing", "returned NoneType instead of a torch.nn.Module"),
        ("nets.py:seven", r"gives \[2, 7\] for images \[2, 3, 32, 32\] instead of logits \[2, 5\]"),
        ("nets.py:pair", r"gives tuple for images \[2, 3, 32, 32\] instead of logits \[2, 5\]"),
        ("nets.py:large", r"does not take images \[2, 3, 32, 32\] \(RuntimeError: .*mat1 and mat2 .*"),
        ("nets.py:lazy", r"cannot be copied and changed \(RuntimeError: .*LazyLinear|cannot be copied and changed \("),
        ("nets.py:raising", r"raising\(5\) failed \(ValueError: no such, .*nets.py, line \d+\)"),
        ("nets.py:Early", "has other outputs with the fused operator; take --no-fused"),
        ("nets.py:zero", "has other outputs with the fused operator; take --no-fused"),
    ],
)
def test_what_is_refused(name, message, folder):
    with pytest.raises(UserError, match=message):
        registered(name, 5)


def test_what_a_norm_gives_before_its_relu_is_kept_without_the_operator(folder):
    assert registered("nets.py:Early", 5, fused=False).parts[2](-torch.ones(1)) == 0


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "mobilenet_v2", "shufflenet_v2_x0_5"])
def test_torchvisions_networks_fused(name):
    """Norms and ReLUs that are attributes, in Sequentials, in subclasses of them, and ReLU6."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=7).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    outputs = []
    for fuse in (False, True):
        if fuse:
            model.load_state_dict(state)
            fuse_norms(model, BatchNormReLU2d)
            assert not any(type(module) is nn.BatchNorm2d for module in model.modules())
        torch.manual_seed(0)  # of dropout
        outputs.append([model.train()(x), model.eval()(x), *model.buffers()])
    torch.testing.assert_close(outputs[1], outputs[0])


def test_a_norm_in_two_places_is_one_norm_still():
    norm = nn.BatchNorm2d(3, eps=0.1, momentum=None, affine=False)
    model = nn.Sequential(norm, nn.ReLU(), nn.Conv2d(3, 3, 1), norm)
    x = torch.randn(4, 3, 5, 5)
    expected = model(x)
    norm.reset_running_stats()
    fuse_norms(model, BatchNormReLU2d)
    assert model[0] is model[3]
    torch.testing.assert_close(model(x), expected)
    assert model[0].num_batches_tracked == 2


def test_what_has_hooks_stays():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.ReLU())
    for module in (model[0], model[3]):
        module.register_forward_hook(lambda *_: None)
    fuse_norms(model, BatchNormReLU2d)
    assert [type(module) for module in model] == [nn.BatchNorm2d, nn.ReLU, BatchNormReLU2d, nn.ReLU]
    assert not model[2].relu


def test_without_the_extension(folder, monkeypatch):
    """A GPU does not use it."""
    monkeypatch.setattr(BatchNormReLU2d, "_function", None)
    register_model("nets.py:net")
    assert [type(module) for module in create_model("nets.py:net", 5)][1] is BatchNormReLU2d


def test_a_name_from_a_file_runs_nothing(folder):
    for name in ("nets.py:net", "nets:net"):
        with pytest.raises(UserError, match=f"--model {name}: a function is imported only where it is given as a flag"):
            create_model(name, 5)
