"""Where the archives come from when the package is not in a checkout; the split, and what augmentation does to an image."""

import shutil
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy.ndimage import affine_transform
from torchvision.datasets import MNIST

from mnist_nb import data
from mnist_nb.data import (SHA256, Augmentation, Digits, affine_matrices, augment, cut_out, download_archives, extract_samples, find_data,
                           has_archives, is_data_here, load_digits, photo_of, split_digits, to_unit, warp)
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


def test_the_split_shares_no_image_and_keeps_images_with_their_labels():
    number = np.arange(3000)
    images = np.zeros((3000, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = number // 256, number % 256
    train, valid = split_digits(Digits(images, number % 10), 1000, 500, seed=4)
    parts = [part.images[:, 0, 0].astype(int) * 256 + part.images[:, 0, 1] for part in (train, valid)]
    assert len(set(parts[0])) == 1000 and len(set(parts[1])) == 500 and not set(parts[0]) & set(parts[1])
    for numbers, part in zip(parts, (train, valid)):
        np.testing.assert_array_equal(part.labels, numbers % 10)
        assert (np.bincount(part.labels) == len(numbers) // 10).all() and (np.diff(numbers) < 0).any()


def blob(row, column):
    "An image of a small bright square."
    image = torch.zeros(1, 1, 28, 28)
    image[..., row - 1:row + 2, column - 1:column + 2] = 1
    return image


def centre(images):
    "Row and column of the centre of the ink."
    rows = torch.arange(28.0)
    ink = images[:, 0].sum((1, 2))
    return torch.stack([(images[:, 0].sum(2) * rows).sum(1) / ink, (images[:, 0].sum(1) * rows).sum(1) / ink], 1)


@pytest.mark.parametrize(("change", "place", "expected"), [
    ({"angle": 90.0}, (13, 20), (20, 14)),          # clockwise: what was on the right is at the bottom
    ({"shift": (3.0, 2.0)}, (13, 13), (15, 16)),    # right, down
    ({"factors": (2.0, 1.0)}, (13, 17), (13, 20.5)),  # wider about the centre, 13.5
    ({"factors": (1.0, 0.5)}, (7, 13), (10.25, 13)),
    ({"slant": 45.0}, (7, 13), (7, 19.5))])         # top to the right
def test_affine_maps_go_the_way_they_say(change, place, expected):
    words = {"angle": 0.0, "factors": (1.0, 1.0), "slant": 0.0, "shift": (0.0, 0.0)} | change
    matrices = affine_matrices(*(torch.tensor([words[name]]) for name in ("angle", "factors", "slant", "shift")))
    np.testing.assert_allclose(centre(warp(blob(*place), matrices))[0], expected, atol=0.4)


def test_affine_maps_agree_with_scipy():
    image = load_digits("train").images[0] / 255
    matrices = affine_matrices(torch.tensor([20.0]), torch.tensor([[1.2, 0.9]]), torch.tensor([10.0]), torch.tensor([[1.5, -2.0]]))
    ours = warp(torch.from_numpy(image)[None, None].float(), matrices)[0, 0].numpy()
    angle, slope = np.deg2rad(20), np.tan(np.deg2rad(10))
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(rotation @ [[1, -slope], [0, 1]] @ np.diag([1.2, 0.9]))[::-1, ::-1]  # scipy counts rows first
    offset = 13.5 - inverse @ (13.5 + np.array([-2.0, 1.5]))
    np.testing.assert_allclose(ours, affine_transform(image, inverse, offset, order=1), atol=1e-4)


def test_every_image_of_a_batch_is_augmented_in_its_own_way():
    "Amounts are drawn anew for each image, from both sides, up to the limit."
    torch.manual_seed(0)
    batch = blob(13, 20).expand(500, 1, 28, 28)
    none = {"rotation": 0, "scale": 0, "translation": 0, "noise": 0}
    for change in ({"rotation": 20}, {"translation": 3}, {"elastic": 2}, {"noise": 0.2}, {"cutout": 8}, {"scale": 0.3}, {"stretch": 0.3}):
        varied = augment(batch, Augmentation(**none | change))
        assert len({image.numpy().tobytes() for image in varied}) > (20 if "cutout" in change else 450), change
        assert varied.shape == batch.shape and 0 <= varied.min() and varied.max() <= 1
    moved = centre(augment(batch, Augmentation(**none | {"translation": 3}))) - centre(batch)
    assert -3.01 < moved.min() < -2.8 and 2.8 < moved.max() < 3.01 and moved.mean(0).abs().max() < 0.3
    assert abs(np.corrcoef(moved[:, 0], moved[:, 1])[0, 1]) < 0.2
    turned = centre(augment(batch, Augmentation(**none | {"rotation": 20}))) - 13.5
    angles = torch.rad2deg(torch.atan2(turned[:, 0], turned[:, 1])) + 4.4  # the blob lies 4.4 degrees above the right
    assert -20.5 < angles.min() < -18.5 and 18.5 < angles.max() < 20.5


def test_each_image_has_a_hole_of_its_own():
    holes = cut_out(torch.ones(400, 1, 28, 28), 6, torch.Generator().manual_seed(0))[:, 0] == 0
    assert len({hole.numpy().tobytes() for hole in holes}) > 250
    inner = [hole for hole in holes if not (hole[0].any() or hole[-1].any() or hole[:, 0].any() or hole[:, -1].any())]
    assert len(inner) > 150 and all(hole.sum() == 36 for hole in inner)
    middles = torch.stack([hole.nonzero().float().mean(0) for hole in inner])
    assert middles.std(0).min() > 5 and abs(np.corrcoef(*middles.T)[0, 1]) < 0.25


def test_light_ink_on_dark_paper_becomes_one_and_zero():
    unit = to_unit(torch.tensor([[[0, 51], [255, 102]]], dtype=torch.uint8))
    assert unit.shape == (1, 1, 2, 2) and unit.dtype == torch.float32
    np.testing.assert_allclose(unit[0, 0], [[0, 0.2], [1, 0.4]])


def test_samples_are_what_their_names_say(tmp_path):
    digits = load_digits("test")
    paths = extract_samples(digits, tmp_path, per_digit=3, seed=1)
    for path in paths:
        _, label, _, index = path.stem.split("_")
        assert digits.labels[int(index)] == int(label)
    assert len({path.name for path in paths}) == 30 and {path.name for path in paths} != {
        path.name for path in extract_samples(digits, tmp_path / "other", per_digit=3, seed=2)}
    assert photo_of(digits.images[0], np.random.default_rng(1)) != photo_of(digits.images[0], np.random.default_rng(2))
