"""What decides whether an export is kept: validation images, never test images."""

import numpy as np
import pytest
import torch

from mnist_nb import export
from mnist_nb.data import Digits
from mnist_nb.runs import InputError

LABELS = np.arange(200) % 10
IMAGES = np.zeros((200, 28, 28), np.uint8)
IMAGES[:, 0, 0] = LABELS                    # a pixel says which digit it is
VALID, TEST = (Digits(np.where(np.arange(28) == 1, mark, IMAGES).astype(np.uint8), LABELS) for mark in (1, 2))  # another, from which part


class Right(torch.nn.Module):
    "A model that reads the pixel."
    def forward(self, images): return torch.nn.functional.one_hot((images[:, 0, 0, 0] * 255).round().long(), 10).float()


def wrong_on(part: Digits):
    "An 8-bit file that is right everywhere but in one part."
    mark = part.images[0, 0, 1]
    return lambda images: np.eye(10, dtype=np.float32)[(images[:, 0, 0] + (images[:, 0, 1] == mark)) % 10]


@pytest.fixture
def export_int8(tmp_path, monkeypatch):
    "Exports the model, as a file that behaves as told."
    monkeypatch.setattr(export, "parts_of", lambda checkpoint: (VALID, VALID))
    for name in ("calibrate", "describe_model"): monkeypatch.setattr(export, name, lambda *_: {})
    monkeypatch.setattr(export, "add_card", lambda *_: None)
    def start(behaviour):
        monkeypatch.setitem(export.KINDS, ".int8.onnx", (lambda model, path, images: path.write_bytes(b"8 bits"), lambda path: behaviour))
        return export.export_model(Right(), {}, tmp_path / "model.int8.onnx", TEST)
    return start


def test_test_images_do_not_decide_whether_8_bits_are_accepted(export_int8, tmp_path):
    figures = export_int8(wrong_on(TEST))
    assert figures["accuracy"] == 0 and figures["original_accuracy"] == 1
    assert figures["valid_accuracy"] == figures["original_valid_accuracy"] == 1 and (tmp_path / "model.int8.onnx").exists()


def test_validation_images_decide_whether_8_bits_are_accepted(export_int8, tmp_path):
    with pytest.raises(InputError, match="8 bits cost too much: validation accuracy 0.00% instead of 100.00%"): export_int8(wrong_on(VALID))
    assert not list(tmp_path.iterdir())


def test_calibration_comes_from_validation_images(monkeypatch):
    train = Digits(IMAGES, LABELS)
    monkeypatch.setattr(export, "parts_of", lambda checkpoint: (train, VALID))
    seen = []
    def logits(images):
        seen.append(images)
        return np.linspace(0, 1, len(images))[:, None] * np.eye(10)[LABELS] * 20
    numbers = export.calibrate(logits, {"settings": {}})
    assert len(seen) == 1 and np.array_equal(seen[0], VALID.images)
    scores = export.log_sum_exp(logits(VALID.images))
    assert 0.01 <= (scores < numbers["unlike_below"]).mean() <= 0.02  # one in fifty
