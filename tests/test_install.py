"""Building and installing as a user does. Nothing is downloaded, and the C++ extension is not compiled again."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fastres

ROOT = Path(__file__).parents[1]
BUILD_SDIST = "import sys, setuptools.build_meta; setuptools.build_meta.build_sdist(sys.argv[1])"
BUILD_WHEEL = "import sys, setuptools.build_meta; setuptools.build_meta.build_wheel(sys.argv[1])"


def run(*command, cwd, **variables):
    """Runs ``command`` in ``cwd``, with these environment variables and none that choose a compiler or a package."""
    chosen = ("CXX", "FASTRES_NO_EXTENSION", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | variables
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def files_of_package(folder):
    """The files of the package ``fastres`` in ``folder``, without what is built from them."""
    paths = (path.relative_to(folder) for path in (folder / "fastres").rglob("*") if path.is_file())
    return {str(path) for path in paths if path.suffix != ".so" and "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The unpacked sdist."""
    tree, unpacked = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    for name in ("csrc", "fastres"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))  # others write there
    for name in ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tree)
    built = run(sys.executable, "-c", BUILD_SDIST, unpacked, cwd=tree, FASTRES_NO_EXTENSION="1")
    assert built.returncode == 0, built.stderr
    (archive,) = unpacked.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(unpacked, filter="data")
    return unpacked / f"fastres-{fastres.__version__}"


@pytest.fixture(scope="module")
def built_without_a_compiler(source, tmp_path_factory):
    """The wheel built beside the sdist, and the output of the build."""
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps", "--no-index", "-w", ".."]
    return run(*pip, ".", cwd=source, PATH=str(tmp_path_factory.mktemp("empty")))


@pytest.fixture(scope="module")
def environment(built_without_a_compiler, source, tmp_path_factory):
    """A virtual environment that sees the packages of this one, and holds the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "there.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", packages]
    done = run(*pip, *source.parent.glob("*.whl"), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_sdist_holds_the_package_and_the_sources_of_its_extension(source):
    assert files_of_package(source) == files_of_package(ROOT)
    assert {path.name for path in (source / "csrc").iterdir()} == {path.name for path in (ROOT / "csrc").iterdir()}
    assert not list(source.rglob("*.so"))


def test_a_wheel_is_built_without_a_compiler_and_says_so(built_without_a_compiler, source):
    printed = built_without_a_compiler.stdout + built_without_a_compiler.stderr
    assert built_without_a_compiler.returncode == 0, printed
    assert "the C++ extension is left out (no C++ compiler found" in printed
    (wheel,) = source.parent.glob("*.whl")
    assert wheel.name == f"fastres-{fastres.__version__}-py3-none-any.whl"
    files = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("fastres/")}
    assert files == files_of_package(ROOT)
    templates = {"fastres/report/page.html", "fastres/report/study.md.j2"}
    assert templates | {"fastres/py.typed", "fastres/studies/residual.toml"} <= files


@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_an_extension_that_does_not_compile_is_not_left_out(source, tmp_path):
    copy = shutil.copytree(source, tmp_path / "copy")
    (copy / "csrc/batch_norm_relu.cpp").write_text("#error does not compile\n")
    build = [sys.executable, "-c", BUILD_WHEEL, tmp_path]
    built = run(*build, cwd=copy)
    assert built.returncode == 1
    assert "#error does not compile" in built.stdout + built.stderr
    assert not list(tmp_path.glob("*.whl"))
    assert run(*build, cwd=copy, FASTRES_NO_EXTENSION="1").returncode == 0


def test_without_the_extension_a_run_on_a_cpu_is_not_fused_and_says_why(environment, image_folder, tmp_path):
    train = [
        "-m", "fastres.train", "--device", "cpu", "--model", "vgg11", "--dataset", "folder", "--data-dir", image_folder,
        "--train-fraction", "0.1", "--batch-size", "6", "--epochs", "1", "--output-dir", "run",
    ]  # fmt: skip
    done = run(environment / "bin/python", *train, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "fused off (the C++ extension of fastres is not built; with a C++ compiler, `make setup`" in done.stdout
    assert (done.stdout + done.stderr).count("C++ extension") == 1
    assert json.loads((tmp_path / "run/config.json").read_text())["chosen"]["fused"] is False


def test_an_extension_for_another_torch_says_what_to_do(environment, tmp_path):
    extension = Path(sys.modules["fastres._C"].__file__)
    (packages,) = environment.glob("lib/python*/site-packages")
    stale = packages / "fastres" / extension.name
    # every c10::NAME becomes cXX::NAME, which this torch does not have
    stale.write_bytes(extension.read_bytes().replace(b"_ZN3c10", b"_ZN3cXX"))
    script = """
import torch
from fastres.nn import BatchNormReLU2d
BatchNormReLU2d(3)(torch.rand(2, 3, 4, 4))
"""
    try:
        done = run(environment / "bin/python", "-c", script, cwd=tmp_path)
    finally:
        stale.unlink()
    *_, line = done.stderr.splitlines()
    assert line.startswith("RuntimeError: batch_norm_relu on a CPU: the C++ extension of fastres was built for ")
    assert f"for another torch than {torch.__version__} (" in line
    assert "undefined symbol: _ZN3cXX" in line
    assert line.endswith("with a C++ compiler, `make setup` or `pip install --no-build-isolation .` builds it")
