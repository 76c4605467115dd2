import shutil
import subprocess

import pytest

from fastres import machine


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A git repository with one commit."""
    monkeypatch.delenv("FASTRES_COMMIT", raising=False)
    for command in (
        ["init", "--quiet"],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "--allow-empty", "--message", "x"],
    ):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    return tmp_path


def test_the_commit_is_that_of_the_packages_own_checkout(repository, monkeypatch):
    monkeypatch.setattr(machine, "REPOSITORY", repository)
    commit = machine.commit()
    assert len(commit) == 40
    (repository / "file").touch()
    subprocess.run(["git", "add", "file"], cwd=repository, check=True)
    assert machine.commit() == f"{commit}-dirty"


def test_an_installed_package_has_no_commit(repository, monkeypatch):
    installed = repository / "venv/lib/site-packages"
    installed.mkdir(parents=True)
    monkeypatch.setattr(machine, "REPOSITORY", installed)
    assert machine.commit() is None
    monkeypatch.setenv("FASTRES_COMMIT", "abc")
    assert machine.commit() == "abc"


def test_another_repository_in_the_environment_does_not_count(repository, tmp_path_factory, monkeypatch):
    own = tmp_path_factory.mktemp("own") / "checkout"
    shutil.copytree(repository, own)
    monkeypatch.setattr(machine, "REPOSITORY", own)
    commit = machine.commit()
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(repository))
    assert machine.commit() == commit is not None
