"""Where the archives come from when the package is not in a checkout."""

import shutil

import pytest
from conftest import ROOT
from torchvision.datasets import MNIST

from mnist_nb import data
from mnist_nb.data import SHA256, download_archives, find_data, has_archives
from mnist_nb.runs import InputError


def test_environment_variable_comes_first(monkeypatch, tmp_path):
    monkeypatch.setenv("MNIST_NB_DATA", str(tmp_path))
    with pytest.raises(InputError, match="lacks some of"): find_data()
    for name in SHA256: shutil.copy(ROOT / "data" / "mnist" / f"{name}.gz", tmp_path)
    assert find_data() == tmp_path


def test_outside_a_checkout_the_cache_is_filled_once(monkeypatch, tmp_path):
    monkeypatch.delenv("MNIST_NB_DATA", raising=False)
    monkeypatch.setattr(data, "project_root", lambda: None)
    monkeypatch.setattr(data, "user_cache_path", lambda name: tmp_path / "cache" / name)
    monkeypatch.setattr(MNIST, "mirrors", [f"file://{tmp_path}/nowhere/", f"file://{ROOT}/data/mnist/"])  # the first one fails
    folder = find_data()
    assert folder == tmp_path / "cache" / "mnist_nb" and has_archives(folder)
    assert len(data.load_digits("test").labels) == 10_000
    monkeypatch.setattr(MNIST, "mirrors", [])
    assert find_data() == folder  # no second download


def test_a_wrong_download_never_reaches_the_cache(monkeypatch, tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    for name in SHA256: (mirror / f"{name}.gz").write_text("<html>not found</html>")
    monkeypatch.setattr(MNIST, "mirrors", [f"file://{mirror}/"])
    with pytest.raises(InputError, match="MNIST could not be downloaded(.|\n)*MNIST_NB_DATA"): download_archives(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
