"""Tests cannot change what belongs to the user: reports, models, examples, the cache, the usual ports."""

import os
import shutil
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

CHANGES = {
    "a new file": "open('reports/guarded.txt', 'w')",
    "a lock": "open('reports/reference/.lock', 'a')",
    "a descriptor": "import os; os.open('models/guarded.pth', os.O_RDWR | os.O_CREAT)",
    "a folder": "import pathlib; pathlib.Path('data/drawn/guarded').mkdir(parents=True)",
    "a move away": "import os; os.rename('reports/reference/metrics.json', '/tmp/guarded.json')",
    "a move into": "import os; os.replace('README.md', 'samples/guarded.md')",
    "a removal from within": "import os; os.remove('metrics.json', dir_fd=os.open('reports/reference', os.O_RDONLY))",
    "a removal": "import os; os.remove('reports/reference/metrics.json')",
    "the cache": "import pathlib; (pathlib.Path.home() / '.cache' / 'mnist_nb').mkdir(parents=True); open('models/guarded', 'w')",
    "a port": "import socket; socket.socket().bind(('127.0.0.1', 8080))",
}


@pytest.mark.parametrize("code", CHANGES.values(), ids=CHANGES)
def test_a_process_of_a_test_cannot_change_the_users_files(code):
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "RuntimeError: a test" in result.stderr
    assert not [name for name in ("reports", "models", "samples", "data/drawn") for _ in (ROOT / name).rglob("guarded*")]


def test_the_tests_themselves_cannot_either():
    with pytest.raises(RuntimeError, match="belongs to the user"): (ROOT / "reports" / "guarded.txt").write_text("")
    with pytest.raises(RuntimeError, match="port 8888"), socket.socket() as server: server.bind(("127.0.0.1", 8888))


def test_reading_and_folders_of_ones_own_are_free(tmp_path, monkeypatch):
    assert (ROOT / "reports" / "reference" / "run.json").read_text()
    (ROOT / "reports" / "reference").mkdir(exist_ok=True)
    (tmp_path / "reports" / "models").mkdir(parents=True)
    os.rename(tmp_path / "reports", tmp_path / "samples")
    monkeypatch.chdir(ROOT)  # where a removal, which names `models` from within its folder, must not be taken for the user's
    shutil.rmtree(tmp_path / "samples")
    (tmp_path / "link").symlink_to(ROOT / "reports" / "reference")
    with socket.socket() as server: server.bind(("127.0.0.1", 0))
