"""Folders that several processes are told to write to, and files on a disk that refuses them."""

import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from fastres.errors import RunError, UserError
from fastres.files import LOCK, claimed, new_folder, write_atomically


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(RunError, match=r"file: cannot be written \(disk full\); make room, then --resume"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


AS_NOBODY = """
import os, sys
from pathlib import Path
from fastres.errors import UserError
from fastres.files import claimed, make_folder, write_atomically
os.setgid(65534)
os.setuid(65534)
root = Path(sys.argv[1])
for action in (
    lambda: write_atomically(root / "closed" / "file", lambda path: path.write_text("new")),
    lambda: make_folder(root / "closed" / "folder"),
    lambda: claimed(root / "closed").__enter__(),
):
    try:
        action()
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="another user's folder needs root")
def test_a_folder_without_permission(tmp_path):
    (tmp_path / "closed").mkdir(mode=0o755)
    for folder in (tmp_path, *tmp_path.parents):
        if folder.owner() == "root" and folder != folder.parent and str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    done = subprocess.run([sys.executable, "-c", AS_NOBODY, tmp_path], capture_output=True, text=True, timeout=60)
    written, made, locked = done.stdout.splitlines()
    assert "file: cannot be written ([Errno 13] Permission denied" in written
    assert "; make the folder writable, then --resume" in written
    assert "folder: cannot be made (Permission denied)" in made
    assert "closed: not writable (Permission denied); choose another folder" in locked


def test_new_folders_never_collide(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: new_folder(tmp_path / "runs/vgg11"), range(8)))
    assert sorted(folder.name for folder in folders) == ["vgg11", *(f"vgg11-{number}" for number in range(2, 9))]


def test_a_folder_is_for_one_process(tmp_path):
    with claimed(tmp_path / "run"):
        with (
            pytest.raises(UserError, match=r"--output-dir .*run: another process is writing to it"),
            claimed(tmp_path / "run"),
        ):
            pass
        assert [path.name for path in (tmp_path / "run").iterdir()] == [LOCK]
    with claimed(tmp_path / "run"):
        pass


def test_a_worker_that_outlives_its_process_does_not_hold_the_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    started = context.Event()
    with claimed(tmp_path):
        worker = context.Process(target=lambda: started.set() or time.sleep(60))
        worker.start()
        assert started.wait(60)
    with claimed(tmp_path):
        assert worker.is_alive()
    worker.kill()
    worker.join()


def test_files_of_others_are_not_overwritten(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    with (
        pytest.raises(UserError, match=r"config.json in it would be overwritten and is not from fastres"),
        claimed(tmp_path, ("history.csv", "config.json")),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    with claimed(tmp_path, ("history.csv",)):
        pass
    with claimed(tmp_path, ("config.json",)):  # which a start of fastres may have left there
        pass
