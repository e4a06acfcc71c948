"""From any picture to a digit: commands as typed, bad input of all kinds, and exports that are the model they were made from."""

import csv
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zlib
from itertools import count
from pathlib import Path

import matplotlib
import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, command
from onnx import TensorProto, helper
from PIL import Image, ImageDraw, ImageFont

from mnist_nb import cli
from mnist_nb.data import load_digits, load_test_digits, photo_of
from mnist_nb.inference import InputError, Predictor

MODEL = ROOT / "reports" / "reference" / "model.int8.onnx"


@pytest.fixture(scope="module")
def predictor() -> Predictor: return Predictor(MODEL)


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    path = tmp_path_factory.mktemp("picture") / "seven.png"
    Image.fromarray(load_digits("test").images[0]).save(path)
    return path


def picture(digit: int) -> Image.Image:
    "The first test image of a digit, which the model reads."
    digits = load_digits("test")
    return Image.fromarray(digits.images[np.flatnonzero(digits.labels == digit)[0]])


def predict(*words, **more): return command("mnist-predict", "--model", MODEL, "--image", *words, **more)


def test_predict_needs_no_torch(seven):
    words = ["--image", str(seven), "--model", str(MODEL)]
    code = (f"import sys; from mnist_nb.cli import predict; predict({words}); "
            "print([name for name in ('torch', 'scipy', 'pandas') if name in sys.modules])")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    answer, modules = result.stdout.splitlines()
    assert answer.startswith(f"{seven}: 7 ") and modules == "[]"


def test_three_forms_say_the_same(seven):
    forms = [], ["--confidence"], ["--json"], ["--csv"]
    plain, confident, lines, table = (predict(seven, "--top_k", 2, *words).stdout for words in forms)
    answer, row = json.loads(lines), next(csv.DictReader(io.StringIO(table)))
    first, second = answer["top_k"]
    assert answer["digit"] == first["digit"] == 7 and answer["warnings"] == [] and first["probability"] > 0.9
    assert plain == f"{seven}: 7 (or {second['digit']})\n"
    assert confident == f"{seven}: 7 {first['probability']:.1%} (or {second['digit']} {second['probability']:.1%})\n"
    assert (row["image"], row["digit_1"], float(row["probability_2"]), row["warnings"]) == (str(seven), "7", second["probability"], "")


def test_samples_and_photos_of_them_are_recognised(tmp_path):
    assert command("mnist-extract", "--output_dir", tmp_path / "plain", "--per_digit", 2).returncode == 0
    assert command("mnist-extract", "--output_dir", tmp_path / "photos", "--per_digit", 2, "--photos").returncode == 0
    result = predict(tmp_path, "--json")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert result.returncode == 0 and len(answers) == 40 and not result.stderr
    right = [answer["digit"] == int(answer["image"].split("digit_")[1][0]) for answer in answers]
    assert sum(right) >= 38
    assert [answer["image"] for answer in answers] == sorted(answer["image"] for answer in answers)


def test_standard_input(seven):
    words = ["mnist-predict", "--model", str(MODEL), "--image", "-"]
    result = subprocess.run([sys.executable, "-c", "import sys; from mnist_nb.cli import predict; sys.exit(predict(sys.argv[2:]))", *words],
                            input=seven.read_bytes(), capture_output=True)
    assert result.returncode == 0 and result.stdout.startswith(b"-: 7 ")


def test_one_bad_picture_does_not_stop_the_others(seven, tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "nothing").mkdir()
    result = predict(tmp_path / "empty.png", tmp_path / "nothing", tmp_path / "missing.png", seven)
    assert result.returncode == 1 and result.stdout.startswith(f"{seven}: 7")
    assert [line.split(": ", 1)[0] for line in result.stderr.splitlines()] == ["mnist-predict"] * 3
    for name, reason in {"empty.png": "is empty", "nothing": "holds no pictures", "missing.png": "No such file"}.items():
        assert f"{tmp_path / name}: " in result.stderr and reason in result.stderr


def png_of_size(width: int, height: int) -> bytes:
    "A PNG file that says it has this size, and has no pixels."
    chunks = [b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0), b"IDAT"]
    framed = [struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def saved(image: Image.Image, extension: str, **words) -> bytes:
    file = io.BytesIO()
    image.save(file, extension, **words)
    return file.getvalue()


GRAY = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60), dtype=np.uint8))
TIFF = saved(GRAY, "tiff", compression="tiff_lzw")
BAD = {"empty.png": (b"", "is empty"), "text.png": (b"once upon a time", "is not a picture"),
       "cut.png": (saved(GRAY, "png")[:900], "is damaged"), "cut.jpg": (saved(GRAY, "jpeg")[:900], "is damaged"),
       "torn.tiff": (TIFF[:40] + b"\xff" * 400 + TIFF[440:], "is damaged"),  # libtiff would complain, too
       "nothing.png": (png_of_size(0, 0), ""), "point.png": (saved(GRAY.resize((1, 1)), "png"), "1 × 1 pixels: give at least 8"),
       "line.png": (saved(GRAY.resize((10_000, 1)), "png"), "10,000 × 1 pixels"),
       "large.png": (png_of_size(10_000, 10_000), "10,000 × 10,000 pixels, more than the 25,000,000 allowed"),
       "bomb.png": (png_of_size(20_000, 20_000), "has more than 178,000,000 pixels"),
       "film.gif": (saved(GRAY, "gif", save_all=True, append_images=[GRAY.rotate(90)]), "holds several pictures"),
       "phone.HEIC": (b"\0\0\0\x18ftypheic", "HEIC or AVIF photo: save it as JPEG")}


def test_bad_pictures_are_a_line_each(tmp_path):
    for name, (content, _) in BAD.items(): (tmp_path / name).write_bytes(content)
    result = predict(tmp_path)
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and not result.stdout and len(lines) == len(BAD)
    for line, (name, (_, reason)) in zip(lines, sorted(BAD.items())):
        assert line.startswith(f"mnist-predict: {tmp_path / name}: ") and reason in line


@pytest.mark.parametrize("progressive", [False, True])
def test_a_photo_of_a_new_phone_is_read_at_reduced_size(predictor, progressive):
    "48 million pixels. A progressive file has to be decoded as a whole, so it is refused, by the name of what allows it."
    photo = Image.new("RGB", (8000, 6000), (225, 220, 210))
    ImageDraw.Draw(photo).line([(3200, 1800), (5000, 1800), (3800, 4600)], fill=(40, 40, 90), width=330, joint="curve")
    photo.save(file := io.BytesIO(), "jpeg", progressive=progressive)
    if not progressive: assert predictor.predict(file.getvalue()).digits[0] == 7
    else:
        with pytest.raises(InputError, match="8,000 × 6,000 pixels.*raise max_pixels"): predictor.predict(file.getvalue())


def test_the_limit_of_pixels_can_be_set(predictor):
    picture = saved(Image.new("L", (300, 300), 255), "png")
    assert predictor.predict(picture).warnings == ("blank: no ink found",)
    with pytest.raises(InputError, match="300 × 300 pixels, more than the 80,000 allowed"):
        Predictor(MODEL, max_pixels=80_000).predict(picture)


def foreign_model(path, kind=TensorProto.FLOAT, shape=("N", 3, 224, 224)) -> None:
    "An ONNX file of another kind of model."
    ends = [helper.make_tensor_value_info(name, kind, shape) for name in ("in", "out")]
    graph = helper.make_graph([helper.make_node("Identity", ["in"], ["out"])], "g", ends[:1], ends[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


def test_models_that_are_none(seven, tmp_path):
    foreign_model(tmp_path / "other.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    (tmp_path / "text.pth").write_text("no model")
    foreign_model(tmp_path / "one.onnx", TensorProto.UINT8, (1, 28, 28))
    for name, reason, code in [("other.onnx", "not uint8 images (N, 28, 28)", 1), ("one.onnx", "[1, 28, 28], not uint8 images (N", 1),
                               ("text.onnx", "is not an ONNX model", 1), ("text.pth", "text.pth", 1),
                               ("none.onnx", "there is no such file", 2), ("model.h5", "unknown extension '.h5'", 2)]:
        result = command("mnist-predict", "--image", seven, "--model", tmp_path / name)
        assert result.returncode == code and not result.stdout and reason in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == 1, result.stderr


@pytest.mark.parametrize("words", [["--top_k", "0"], ["--top_k", "11"], ["--top_k", "x"], ["--cpu", "--gpu"], ["--json", "--csv"],
                                   ["--imag"]])
def test_what_is_typed_wrongly_is_exit_code_2(seven, words):
    result = predict(seven, *words)
    assert result.returncode == 2 and "Traceback" not in result.stderr


def test_a_reader_that_goes_away(seven):
    program = f"{sys.executable} -c 'from mnist_nb.cli import predict; predict()'"
    pictures = " ".join([str(seven)] * 200)
    result = subprocess.run(f"{program} --model {MODEL} --image {pictures} | head -1", shell=True, capture_output=True, text=True)
    assert result.stdout.startswith(f"{seven}: 7") and not result.stderr


def test_damaged_files_are_read_or_refused():
    "2,000 damaged pictures: an answer or one line, never another exception; nothing hangs, and the memory stays small."
    result = subprocess.run([sys.executable, ROOT / "tests" / "fuzz.py"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout)
    assert outcome["read"] + outcome["refused"] == 2000 and min(outcome["read"], outcome["refused"]) > 100
    assert outcome["megabytes"] < 500, outcome


def page(draw_on, size=(300, 300), paper=230) -> np.ndarray:
    "A sheet of paper with a printed 5 or 7, and what else is drawn on it."
    image = Image.new("RGB", size, (paper,) * 3)
    draw_on(ImageDraw.Draw(image))
    return np.asarray(image)


def digit(pen, text="7", at=(150, 150), size=130):
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
    pen.text(at, text, fill=(20, 20, 60), font=font, anchor="mm")


def lines(pen):
    for y in range(20, 300, 40): pen.line([(0, y), (300, y)], fill=(170, 170, 190), width=2)


NOISE = np.random.default_rng(0).normal(0, 4, (1000, 1000, 3))
DOWN, RIGHT = np.mgrid[:300, :300]
TROUBLES = {
    "noise, small": (page(lambda pen: digit(pen, at=(550, 500)), (1000, 1000), 215) + NOISE).clip(0, 255).astype(np.uint8),
    "ruled paper": page(lambda pen: (lines(pen), digit(pen))),
    "a sheet on a table": page(lambda pen: (pen.polygon([(60, 40), (250, 60), (240, 270), (50, 250)], fill=(225,) * 3),
                                            digit(pen, size=110)), paper=60),
    "edge of a scan": page(lambda pen: (pen.rectangle([0, 0, 25, 300], fill=(40,) * 3), digit(pen, at=(170, 150)))),
    "dark corner": page(lambda pen: (pen.polygon([(0, 0), (120, 0), (0, 120)], fill=(100,) * 3), digit(pen, at=(190, 190)))),
    "soft shadow": (page(digit) * (1 - 0.45 / (1 + np.exp(-(RIGHT + 0.3 * DOWN - 180) / 30)))[:, :, None]).astype(np.uint8),
    "red on green": page(lambda pen: (pen.rectangle([0, 0, 300, 300], fill=(60, 150, 60)),
                                      pen.line([(100, 80), (200, 80), (130, 230)], fill=(190, 90, 60), width=14))),
    "light on dark": 255 - page(digit),
    "a thin pen": page(lambda pen: pen.line([(60, 40), (240, 44), (120, 260)], fill=(20, 20, 60), width=3)),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_seven_in_all_kinds_of_pictures(predictor, name):
    result = predictor.predict(TROUBLES[name])
    assert result.digits[0] == 7 and result.probabilities[0] > 0.8 and not result.warnings, result


def test_what_is_no_digit_is_said_to_be_none(predictor):
    two = page(lambda pen: (digit(pen, at=(80, 150)), digit(pen, "5", at=(220, 150))))
    assert predictor.predict(two).warnings == ("2 separate digits: only the largest was read",)
    assert predictor.predict(page(lambda pen: pen.line([(0, 150), (300, 140)], fill=0, width=8))).warnings[0].startswith("reaches across")
    for shape in ((8, 400), (400, 8), (9, 3000)): assert predictor.predict(np.zeros(shape, np.uint8)).warnings == ("blank: no ink found",)
    dots = np.full((200, 200), 230, np.uint8)
    dots[40:160:3, 40:160:3] = 30
    assert "30 separate digits" in predictor.predict(dots).warnings[0]


def test_a_name_that_is_not_utf8(tmp_path):
    bad = os.fsencode(tmp_path) + b"/a\xff.png"
    with open(bad, "wb"): pass
    words = [sys.executable, "-c", "import sys; from mnist_nb.cli import predict; sys.exit(predict())", "--model", MODEL, "--image", bad]
    result = subprocess.run(words, capture_output=True)
    assert result.returncode == 1 and result.stderr.endswith(b"is empty.\n") and len(result.stderr.splitlines()) == 1


def test_photos_lose_little(predictor):
    test = load_test_digits(500)
    photos = [photo_of(image, np.random.default_rng(number)) for number, image in enumerate(test.images)]
    results = [result for _, result in predictor.predict_many(photos, 1)]
    clean = predictor.judge(test.images)[0].argmax(1)
    assert np.mean([result.digits[0] for result in results] == test.labels) > np.mean(clean == test.labels) - 0.006
    assert np.mean([bool(result.warnings) for result in results]) < 0.04


def test_a_true_image_passes_unchanged(predictor):
    test = load_test_digits(200)
    assert all((result.image == image).all() for (_, result), image in zip(predictor.predict_many(test.images), test.images))


def test_pictures_are_read_a_batch_at_a_time(predictor):
    "An endless stream of pictures is answered, and no more of it is held than a batch."
    taken = count()
    endless = (np.full((9, 9), next(taken) % 2, np.uint8) for _ in count())
    answers = predictor.predict_many(endless, batch_size=5)
    for _ in range(7): next(answers)
    assert next(taken) == 10


def test_exports_are_the_model(small_run, seven, tmp_path, capsys):
    checkpoint, images = small_run / "checkpoints" / "best_model.pth", load_test_digits(500).images
    def probabilities(predictor): return predictor.judge(images)[0]
    original = Predictor(checkpoint, "cpu")
    for name, words in {"a.onnx": [], "b.onnx": ["--quantize"], "c.int8.onnx": [], "d.pt2": []}.items():
        assert cli.optimize(["--model", str(checkpoint), "--output", str(tmp_path / name), "--test_images=500", *words]) == 0
        printed = capsys.readouterr()
        assert printed.out.startswith(f"{tmp_path / name}: ") and not printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "c.int8.onnx", "d.pt2"]
    exact, small = Predictor(tmp_path / "a.onnx"), Predictor(tmp_path / "c.int8.onnx")
    assert np.abs(probabilities(exact) - probabilities(original)).max() < 1e-4
    assert abs(exact.temperature - original.temperature) < 1e-3 and abs(exact.unlike_below - original.unlike_below) < 1e-3
    assert np.mean(probabilities(small).argmax(1) == probabilities(original).argmax(1)) > 0.98
    assert (tmp_path / "b.onnx").stat().st_size == (tmp_path / "c.int8.onnx").stat().st_size < (tmp_path / "a.onnx").stat().st_size / 3.5
    program = torch.export.load(tmp_path / "d.pt2").module()
    assert torch.equal(program(torch.from_numpy(images)).argmax(1), torch.from_numpy(probabilities(original).argmax(1)))
    result = command("mnist-predict", "--image", seven, "--model", checkpoint, "--cpu", "--json")
    assert json.loads(result.stdout)["digit"] == original.predict(seven).digits[0], result.stderr


def test_an_export_carries_its_card(small_run):
    card = Predictor(small_run / "model.int8.onnx").model.card
    metrics = json.loads((small_run / "export.json").read_text())["files"]["model.int8.onnx"]
    assert card["arch"] == "base" and card["labels"] == list(range(10)) and len(card["dataset_sha256"]) == 4
    assert card["metrics"]["test_accuracy"] == metrics["accuracy"] and card["metrics"]["test_images"] == 1000
    assert 0 < card["unlike_below"] < 5 and card["temperature"] == metrics["temperature"]


@pytest.mark.parametrize("name, words, reason", [
    ("m.tflite", [], "unknown extension '.tflite'"), ("m.pt2", ["--quantize"], "only .onnx"),
    ("m.onnx", ["--test_images=0"], "test_images=0"), ("m.onnx", ["--model=none.pth"], "none.pth")])
def test_nothing_is_exported_under_a_name_that_means_nothing(small_run, tmp_path, capsys, name, words, reason):
    checkpoint = small_run / "checkpoints" / "best_model.pth"
    with pytest.raises(SystemExit) as end: cli.optimize([f"--model={checkpoint}", f"--output={tmp_path / name}", *words])
    assert end.value.code == 2 and reason in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_folder_is_read_by_content_and_what_is_left_out_is_named(tmp_path, capsys):
    picture(3).save(tmp_path / "three.png")
    (tmp_path / "three.png").rename(tmp_path / "three.jfif")
    picture(7).save(tmp_path / "seven.png")
    (tmp_path / "seven.png").rename(tmp_path / "seven")
    (tmp_path / "labels.csv").write_text("three,3")
    assert cli.predict([str(tmp_path), "--model", str(MODEL), "--top-k", "1"]) == 0
    out, err = capsys.readouterr()
    assert [line.rpartition("/")[2] for line in out.splitlines()] == ["seven: 7", "three.jfif: 3"]
    assert "left out, since they are no pictures" in err and "labels.csv" in err and "three" not in err


def test_pictures_need_no_option_and_dashes_are_underscores(tmp_path, capsys):
    picture(3).save(tmp_path / "three.png")
    outputs = []
    for words in (["--image", str(tmp_path), "--top_k", "2"], [str(tmp_path), "--top-k=2"], ["--top-k", "2", "--", str(tmp_path)],
                  ["--max-pixels", "1000000", "--top_k=2", str(tmp_path)]):
        assert cli.predict([*words, "--model", str(MODEL)] if "--" not in words else ["--model", str(MODEL), *words]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0].count("(or ") == 1 and len(set(outputs)) == 1
    with pytest.raises(SystemExit) as end: cli.predict(["--model", str(MODEL)])
    assert end.value.code == 2 and "name pictures" in capsys.readouterr().err


def test_a_run_folder_is_a_model(tmp_path):
    with pytest.raises(InputError, match="holds neither model.int8.onnx nor model.onnx"): Predictor(tmp_path)
    shutil.copy(MODEL, tmp_path / "model.onnx")
    assert Predictor(tmp_path).predict(picture(3)).digits[0] == 3
    (tmp_path / "model.int8.onnx").write_bytes(b"not a model")
    with pytest.raises(InputError): Predictor(tmp_path)  # the one in 8 bits comes first


def test_a_predictor_pickles(tmp_path):
    predictor = Predictor(MODEL, threads=2, max_pixels=5000)
    again = pickle.loads(pickle.dumps(predictor))
    assert again.max_pixels == 5000 and again.temperature == predictor.temperature != 1
    np.testing.assert_array_equal(again.predict(picture(3)).probabilities, predictor.predict(picture(3)).probabilities)
