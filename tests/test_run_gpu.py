"""benchmarks/run_gpu.sh goes on whatever fails, and packs what there is."""

import os
import re
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run_gpu(tmp_path):
    """Runs the script with a Python that fails where a model is named; gives its output and the results' names."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *vgg11*) exit 3;; *dali) exit ${NO_DALI:-0};; esac\n')
    python.chmod(0o755)

    def run(*stages, **environment):
        settings = {"PYTHON": str(python), "QUICK": "1", "RESULTS": str(tmp_path / "results"), **environment}
        done = subprocess.run(
            ["bash", ROOT / "benchmarks/run_gpu.sh", tmp_path / "out", *stages],
            env=os.environ | settings,
            capture_output=True,
            text=True,
        )
        return done, re.sub(r" after \d+ s", "", done.stdout).splitlines()[:-1]

    return run


def packed(folder):
    """The names in the one file that comes back, and what its steps.txt says."""
    (path,) = (folder / "out").iterdir()
    with tarfile.open(path) as tar:
        return set(tar.getnames()), tar.extractfile("./steps.txt").read().decode().splitlines()


def test_the_gpu_script_goes_on_after_a_failure_and_packs_all_results(run_gpu, tmp_path):
    done, steps = run_gpu(DATA="cifar10")
    studies = [step for step in steps if step.startswith("study-")]
    assert sorted(studies) == [
        f"study-{name}: exit code 0"
        for name in ("architecture", "augmentation", "fast", "residual", "schedule", "zero-gamma")
    ]
    assert [step for step in steps if step not in studies] == [
        "precompile: exit code 0",
        "doctor: exit code 0",
        "gpu-tests: exit code 0",
        "kernels-fastres-8: exit code 3",
        "tunings: exit code 0",
        "profile-vgg11-8-rival: exit code 3",
        "kernels-compiled-8: exit code 3",
        "train-vgg13: exit code 0",
        "profile-vgg11-8: exit code 3",
        "loaders: exit code 0",
        "doctor: exit code 0",
        "profile-vgg11-8-compiled: exit code 3",
        "slower-gpu-tests: exit code 0",
        "operator: exit code 0",
        "steps: exit code 0",
        "profile-vgg13-8: exit code 0",
        "forward: exit code 0",
        "train-vgg11: exit code 3",
    ]
    names, lines = packed(tmp_path)
    assert {f"./{step.split(':')[0]}.log" for step in steps} < names
    assert "\n".join(lines) in done.stdout
    assert "-m fastres.train --model vgg11" in (tmp_path / "results/train-vgg11.log").read_text()


def test_the_gpu_script_is_called_in_stages(run_gpu, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results/last.pt").touch()  # larger than what comes back from a machine that is lent
    assert run_gpu("train")[1] == ["train-vgg13: exit code 0"]
    assert run_gpu("loaders", "kernels", NO_DALI="1")[1] == [
        "loaders: left out, DALI does not import", "kernels-fastres-8: exit code 3", "tunings: exit code 0",
    ]  # fmt: skip
    names, lines = packed(tmp_path)
    assert len(lines) == 4
    assert names == {".", "./steps.txt", "./train-vgg13.log", "./kernels-fastres-8.log", "./tunings.log"}
    assert run_gpu("train", BUDGET="1")[1] == ["train-vgg13: left out, no time"]


def test_the_gpu_script_names_a_stage_that_it_does_not_have(run_gpu, tmp_path):
    done, _ = run_gpu("train", "kernel")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("run_gpu.sh: no stage kernel; choose from correctness kernels rival ")
    assert not (tmp_path / "results").exists()
