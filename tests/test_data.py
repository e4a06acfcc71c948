"""Where the archives come from when the package is not in a checkout."""

import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from conftest import ROOT
from torchvision.datasets import MNIST

from mnist_nb import data
from mnist_nb.data import SHA256, download_archives, find_data, has_archives, is_data_here
from mnist_nb.runs import InputError


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_): pass


@pytest.fixture
def mirror(tmp_path):
    "A mirror on this machine: its address, and the folder that it serves."
    folder = tmp_path / "mirror"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", folder
    server.shutdown()
    server.server_close()


def test_environment_variable_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("MNIST_NB_DATA", str(tmp_path))
    with pytest.raises(InputError, match="lacks some of"): find_data()
    for name in SHA256: shutil.copy(ROOT / "data" / "mnist" / f"{name}.gz", tmp_path)
    assert find_data() == tmp_path


def test_outside_a_checkout_the_cache_is_filled_once(monkeypatch, tmp_path, mirror, capsys):
    address, served = mirror
    for name in SHA256: shutil.copy(ROOT / "data" / "mnist" / f"{name}.gz", served)
    monkeypatch.delenv("MNIST_NB_DATA", raising=False)
    monkeypatch.setattr(data, "project_root", lambda: None)
    monkeypatch.setattr(data, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.chdir(tmp_path)
    (served / "wrong").mkdir()
    for name in SHA256: (served / "wrong" / f"{name}.gz").write_text("<html>moved</html>")
    monkeypatch.setattr(MNIST, "mirrors", [f"{address}nowhere/", f"{address}wrong/", address])  # only the third one is right
    assert not is_data_here()
    folder = find_data()
    assert folder == tmp_path / "cache" / "mnist_nb" and has_archives(folder) and is_data_here()
    notice = capsys.readouterr().err  # a download is announced
    assert "MNIST is neither in data/mnist of the working folder" in notice and f"downloading it to {folder}" in notice
    assert len(data.load_digits("test").labels) == 10_000
    monkeypatch.setattr(MNIST, "mirrors", [])
    assert find_data() == folder  # no second download
    assert not capsys.readouterr().err


def test_installed_elsewhere_the_working_folders_data_is_found(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("MNIST_NB_DATA", raising=False)
    monkeypatch.setattr(data, "project_root", lambda: None)
    monkeypatch.setattr(data, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(data, "download_archives", lambda folder: pytest.fail("no download is needed"))
    folder, deep = tmp_path / "clone" / "data" / "mnist", tmp_path / "clone" / "nbs" / "deep"
    for path in (folder, deep): path.mkdir(parents=True)
    for name in SHA256: (folder / f"{name}.gz").touch()
    for here in (tmp_path / "clone", deep):
        monkeypatch.chdir(here)
        assert is_data_here() and find_data() == folder
    monkeypatch.chdir(tmp_path)
    assert not is_data_here()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert not is_data_here() and not capsys.readouterr().err


def test_a_wrong_download_never_reaches_the_cache(monkeypatch, tmp_path, mirror):
    address, served = mirror
    for name in SHA256: (served / f"{name}.gz").write_text("<html>not found</html>")
    monkeypatch.setattr(MNIST, "mirrors", [address])
    with pytest.raises(InputError, match="MNIST could not be downloaded(.|\n)*MNIST_NB_DATA"): download_archives(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
