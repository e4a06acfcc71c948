"""Damaged pictures without end: what reading them comes to, as JSON on stdout. For a process of its own, whose memory is measured."""

import argparse
import io
import json
import random
import re
import signal
import struct
import time
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from mnist_nb.inference import prepare
from mnist_nb.runs import InputError


def valid_files() -> dict[str, bytes]:
    "A small picture in each format and in several modes."
    generator = np.random.default_rng(0)
    gray = Image.fromarray(generator.integers(0, 256, (60, 80), dtype=np.uint8)).resize((80, 60), Image.Resampling.BICUBIC)
    deep = Image.fromarray(generator.integers(0, 65536, (60, 80), dtype=np.uint16))
    files = {}
    colours = gray.convert("RGB")
    for extension, image, words in [("png", gray, {}), ("png", gray.convert("RGBA"), {}), ("png", gray.convert("P"), {}), ("png", deep, {}),
                                    ("jpeg", gray, {}), ("jpeg", gray.convert("CMYK"), {}), ("jpeg", colours, {"progressive": True}),
                                    ("webp", colours, {}), ("webp", gray.convert("RGBA"), {"lossless": True}),
                                    ("gif", gray, {}), ("gif", gray, {"save_all": True, "append_images": [deep.convert("L")]}),
                                    ("bmp", colours, {}), ("tiff", gray, {"compression": "tiff_lzw"}), ("tiff", deep, {}),
                                    ("tiff", colours, {"compression": "jpeg"}), ("ppm", colours, {})]:
        file = io.BytesIO()
        image.save(file, extension, **words)
        files[f"{extension} {image.mode} {' '.join(words)}"] = file.getvalue()
    return files


def with_size(png: bytes, width: int, height: int) -> bytes:
    "A PNG file that says it has another size, with the right checksum for the lie."
    header = b"IHDR" + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


def damage(content: bytes, draw: random.Random) -> bytes:
    "A file with one to three kinds of damage."
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(content)) if draw.random() < 0.5 else draw.randrange(min(len(content), 64))  # headers more often
        kind = draw.choice(["cut", "flip", "flip", "flip", "delete", "insert", "repeat", "size"])
        if kind == "cut": content = content[:max(at, 1)]
        elif kind == "flip":
            changed = bytearray(content)
            for _ in range(draw.choice([1, 1, 4, 30])): changed[draw.randrange(at, len(changed))] = draw.randrange(256)
            content = bytes(changed)
        elif kind == "delete": content = content[:at] + content[at + draw.randint(1, 40):] or b"\0"
        elif kind == "insert": content = content[:at] + draw.randbytes(draw.randint(1, 40)) + content[at:]
        elif kind == "repeat": content = content[:at] + content[max(0, at - 200):]
        elif content[:4] == b"\x89PNG" and len(content) > 33:
            sizes = [0, 1, 7, 80, 6000, 20_000, 2 ** 31 - 1, draw.randrange(2 ** 32)]
            content = with_size(content, draw.choice(sizes), draw.choice(sizes))
    return content


def drawing(draw: random.Random) -> np.ndarray:
    "A picture of any proportions, with some rectangles in it."
    picture = np.full((draw.randint(8, 300), draw.randint(8, 300)), draw.randrange(256), np.uint8)
    for _ in range(draw.randint(0, 5)):
        top, left = draw.randrange(picture.shape[0]), draw.randrange(picture.shape[1])
        picture[top:top + draw.randint(1, 200), left:left + draw.randint(1, 200)] = draw.randrange(256)
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, originals = random.Random(options.seed), valid_files()
    def peak_megabytes(): return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    whole = {name: prepare(content) for name, content in originals.items() if "save_all" not in name}  # undamaged, all can be read
    counts, slowest, before = {"read": 0, "refused": 0}, 0.0, peak_megabytes()
    for mode in ("RGB", "RGBA"):  # as large as allowed
        file = io.BytesIO()
        Image.new(mode, (5000, 5000), "white").save(file, "png", compress_level=1)
        prepare(file.getvalue())
    for _ in range(options.files // 4):
        prepare(drawing(draw))
    for _ in range(options.files):
        content = damage(draw.choice([*originals.values()]), draw)
        signal.setitimer(signal.ITIMER_REAL, 1)  # a hang of a second ends the process
        start = time.perf_counter()
        try:
            assert prepare(content).image.shape == (28, 28)
            counts["read"] += 1
        except InputError as error:
            assert str(error) and "\n" not in str(error), error
            counts["refused"] += 1
        slowest = max(slowest, time.perf_counter() - start)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps({**counts, "formats": len(whole), "slowest_s": slowest, "megabytes_before": before, "megabytes": peak_megabytes()}))


if __name__ == "__main__": main()
