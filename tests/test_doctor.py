"""fastres doctor, and the checks whose outcome ``auto`` goes by on a GPU."""

import sys

import pytest
import torch

from fastres import doctor
from fastres.nn import BatchNormReLU2d
from fastres.ops import batch_norm_relu
from fastres.training import selfcheck

CPU = torch.device("cpu")


def test_a_table_of_what_is_right_here(capsys):
    assert doctor.main([]) == 0
    printed = capsys.readouterr().out
    assert "FAIL" not in printed
    for check in ("C++ extension", "operator", "loaders", "memory", "bf16, channels-last"):
        assert any(line.split("\u2502")[1:3] == [f" {check} ".ljust(21), " pass "] for line in printed.splitlines()), (
            check
        )


@pytest.mark.parametrize("check", ["operator", "loaders"])
def test_what_fails_and_how_to_mend_it(check, capsys, monkeypatch):
    monkeypatch.setattr(selfcheck, "run_check", lambda name, device: "differs by 3" if name == check else "")
    assert doctor.main(["--device", "cpu"]) == 1
    printed = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    assert "FAIL differs by 3; " in printed
    assert doctor.MENDS[check].split(",")[0] in printed
    assert printed.count("FAIL") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda *arguments, **options: batch_norm_relu(*arguments, **options) * 1.1,
        lambda *arguments, **options: batch_norm_relu(*arguments, **{**options, "momentum": 0.2}),
        lambda *arguments, **options: batch_norm_relu(*arguments, **{**options, "residual": None}),
    ],
    ids=["output", "statistics", "residual"],
)
def test_a_wrong_operator_is_found(wrong, monkeypatch):
    selfcheck.check_operator(CPU)
    monkeypatch.setattr(BatchNormReLU2d, "_function", staticmethod(wrong))
    with pytest.raises((ArithmeticError, RuntimeError)):
        selfcheck.check_operator(CPU)


def test_a_wrong_loader_is_found(monkeypatch):
    create = selfcheck.create_loader

    def shifted(name, split, *arguments, **options):
        return create(name, split, *arguments, **{**options, "mean": (0.6, 0.48, 0.45)} if name == "dali" else options)

    monkeypatch.setattr(selfcheck, "create_loader", shifted)
    with pytest.raises(ArithmeticError, match="differs by"):
        selfcheck.check_loaders(CPU)


@pytest.mark.parametrize(
    ("script", "fault"),
    [
        ("", ""),
        ("raise RuntimeError('no kernel image')", "failed: RuntimeError: no kernel image"),
        ("import sys; sys.exit('x: error: differs by 2')", "failed: differs by 2"),
        ("import os; os.abort()", "ended with exit code -6"),
        ("import time; time.sleep(60)", "took longer than 3 s"),
    ],
)
def test_a_check_is_a_process_that_may_die(script, fault, monkeypatch):
    monkeypatch.setattr(selfcheck, "COMMAND", (sys.executable, "-c", script))
    monkeypatch.setattr(selfcheck, "SECONDS", 3)
    found = selfcheck.run_check("operator", CPU)
    assert found == (fault and f"the check of operator on this machine {fault}")


def test_checked_once_for_a_machine_and_its_software(tmp_path, monkeypatch):
    checked = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        selfcheck, "run_check", lambda name, device: checked.append(name) or ("bad" if name == "loaders" else "")
    )
    monkeypatch.setattr(selfcheck, "device_name", lambda device: card)
    device, card = torch.device("cuda", 0), "one"
    for _ in range(2):
        selfcheck.faults.cache_clear()
        assert selfcheck.faults(device) == {"loaders": "bad; fastres doctor checks again"}
        assert sorted(checked) == ["cuda-graph", "loaders", "operator"]
    card = "other"
    selfcheck.faults.cache_clear()
    selfcheck.faults(device)
    assert len(checked) == 6
    assert len(list(tmp_path.glob("fastres/check-*.json"))) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    selfcheck.faults.cache_clear()
    assert selfcheck.faults(device).keys() == {"loaders"}
    selfcheck.faults.cache_clear()
    assert selfcheck.faults(CPU) == {}
