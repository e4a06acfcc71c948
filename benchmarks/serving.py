"""How much the service answers, how fast, and in how much memory: posts from a second process on the same machine.

With --attack: how fast it answers 32 clients while 20 others post pictures that take long to decode, again and again.
"""

import argparse
import asyncio
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from mnist_nb.data import load_test_digits, photo_of
from mnist_nb.runs import available_cores

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "reports" / "reference" / "model.int8.onnx"
CONNECTIONS = 32
ATTACKERS = 20
ALONE = """from mnist_nb import serving
async def single(self, picture): return (await self.several([picture]))[0]
serving.Worker.single = single"""  # each picture a task of its own, instead of gathered


@contextmanager
def service(before: str = "", port: int = 0):
    "A service in a process of its own, that runs `before` first."
    code = f"{before}\nimport sys; from mnist_nb.cli import serve; sys.exit(serve(['--model', {str(MODEL)!r}, '--port', '{port}']))"
    start = time.perf_counter()
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=nowhere, stderr=subprocess.PIPE, text=True)
    try:
        process.port = int(re.search(r":(\d+) serves", process.stderr.readline())[1])
        asyncio.run(until_ready(process.port))
        process.seconds_to_ready = time.perf_counter() - start
        yield process
    finally:
        process.kill()
        process.communicate()


async def until_ready(port: int) -> None:
    while True:
        try:
            if (await ask(*await asyncio.open_connection("127.0.0.1", port), b"GET /readyz HTTP/1.1\r\nHost: a\r\n\r\n")) == 200: return
        except OSError: pass
        await asyncio.sleep(0.01)


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
    "The status of the answer to a request."
    writer.write(request)
    head = await reader.readuntil(b"\r\n\r\n")
    await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
    return int(head.split(maxsplit=2)[1])


def as_request(picture: bytes) -> bytes:
    "A post of one picture, in a form."
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\n' + picture + b"\r\n--x--\r\n"
    return (f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=x\r\n"
            f"Content-Length: {len(form)}\r\n\r\n").encode() + form


def as_png(image: np.ndarray) -> bytes:
    Image.fromarray(image).save(file := io.BytesIO(), "png")
    return file.getvalue()


async def load(port: int, requests: list[bytes], seconds: float) -> tuple[list[float], int]:
    "Milliseconds of each request of all connections, and how many failed."
    times, failed, end = [], 0, time.perf_counter() + seconds
    async def client(first):
        nonlocal failed
        connection, number = await asyncio.open_connection("127.0.0.1", port), first
        while (start := time.perf_counter()) < end:
            failed += await ask(*connection, requests[number % len(requests)]) != 200
            times.append(1000 * (time.perf_counter() - start))
            number += CONNECTIONS
    await asyncio.gather(*map(client, range(CONNECTIONS)))
    return times, failed


def summary(times: list[float], failed: int, seconds: float) -> dict[str, float]:
    return {"requests": len(times), "failed": failed, "per_second": len(times) / seconds,
            **{f"p{share}_ms": float(np.percentile(times, share)) for share in (50, 99)}, "longest_ms": max(times)}


async def measure(process: subprocess.Popen, requests: list[bytes], seconds: float) -> dict[str, float]:
    "A load, with the memory of the service meanwhile."
    memory, watched = [], psutil.Process(process.pid)
    async def watch():
        while True:
            memory.append(watched.memory_info().rss / 1e6)
            await asyncio.sleep(0.1)
    watching = asyncio.create_task(watch())
    result = summary(*await load(process.port, requests, seconds), seconds)
    watching.cancel()
    second, last = (float(np.mean(part)) for part in np.array_split(memory, 3)[1:])
    return {**result, "megabytes_second_third": second, "megabytes_last_third": last}


def progressive(scans: int) -> bytes:
    "A grey JPEG file of 5000 × 5000 pixels, whose last scan is repeated: each costs as much as the first, and some bytes."
    Image.new("L", (5000, 5000), 255).save(file := io.BytesIO(), "jpeg", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (scans - content.count(b"\xff\xda") + 1) + content[-2:]


async def attack(port: int, picture: bytes, requests: list[bytes], seconds: float) -> dict:
    "A load beside clients that post one picture again and again; what those get, and what `/readyz` says each second."
    request = (f"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nConnection: close\r\n"
               f"Content-Length: {len(picture)}\r\n\r\n").encode() + picture
    statuses, ready = Counter(), Counter()
    async def again_and_again(asked, counted, pause):
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try: counted[str(await ask(reader, writer, asked))] += 1
            finally: writer.close()
            await asyncio.sleep(pause)
    others = [asyncio.create_task(again_and_again(request, statuses, 0)) for _ in range(ATTACKERS)]
    others.append(asyncio.create_task(again_and_again(b"GET /readyz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", ready, 1)))
    result = summary(*await load(port, requests, seconds), seconds)
    for task in others: task.cancel()
    for task in await asyncio.gather(*others, return_exceptions=True):
        if not isinstance(task, asyncio.CancelledError): raise task  # an attacker that has failed would make the others' life easier
    return {**result, "bytes": len(picture), "statuses": dict(statuses), "ready": dict(ready)}


def attacks(requests: list[bytes], seconds: float) -> dict[str, dict]:
    "Attacks by a file that is refused before it is decoded, and by one that is not."
    found = {}
    with service() as process:
        asyncio.run(load(process.port, requests, 3))
        found["nobody"] = summary(*asyncio.run(load(process.port, requests, seconds)), seconds)
        for name, scans in (("refused before decoding", 100), ("decoded until the limit", 30)):
            found[name] = asyncio.run(attack(process.port, progressive(scans), requests, seconds))
    for name, one in found.items():
        print(f"{name}: {one['per_second']:,.0f} requests a second, {one['failed']} of {one['requests']:,} failed, 99% in "
              f"{one['p99_ms']:.0f} ms, the longest {one['longest_ms']:.0f} ms"
              + (f"; {one['bytes'] / 1000:.0f} kB, statuses {one['statuses']}, /readyz {one['ready']}" if "bytes" in one else ""))
    return found


def sentences(result: dict) -> str:
    "What the README says."
    digits, alone, photos, ready = result["digits"], result["digits_not_gathered"], result["photos"], result["seconds_to_ready"]
    growth = digits["megabytes_last_third"] / digits["megabytes_second_third"] - 1
    return (f"With {result['connections']} connections that post MNIST images as PNG files, one a request, from a second process on "
            f"the same two cores, for {result['seconds']:.0f} s: {digits['per_second']:,.0f} requests a second, "
            f"{digits['failed']} of {digits['requests']:,} failed, 99% within {digits['p99_ms']:.0f} ms, "
            f"memory {digits['megabytes_last_third']:.0f} MB ({growth:+.1%} from the second third to the last). "
            f"Without gathering: {alone['per_second']:,.0f} a second. Photos of some hundred pixels: {photos['per_second']:,.0f} a second. "
            f"Killed and started again, it was ready after {ready:.1f} s.")


def attack_sentences(found: dict) -> str:
    "What the README says of attacks."
    nobody, refused, decoded = found["nobody"], found["refused before decoding"], found["decoded until the limit"]
    def said(one): return f"{one['per_second']:,.0f} requests a second, {one['failed']} failed, 99% within {one['p99_ms']:.0f} ms"
    return (f"While {found['attackers']} others post a JPEG file of 5000×5000 pixels and {refused['bytes'] / 1000:.0f} kB again and again, "
            f"in which the last scan is repeated a hundred times, the same {found['connections']} connections get {said(refused)}; "
            f"where the file has as few scans as are decoded, {said(decoded)}; without the others, {said(nobody)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="serving.json")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--attack", action="store_true", help="measure attacks, and nothing else")
    options = parser.parse_args()
    digits = load_test_digits(200).images
    posts = [as_request(as_png(image)) for image in digits]
    if options.attack:
        found = {"connections": CONNECTIONS, "attackers": ATTACKERS, "seconds": options.seconds, **attacks(posts, options.seconds)}
        Path(options.output).write_text(json.dumps(found, indent=1) + "\n")
        return
    generator = np.random.default_rng(0)
    photos = [as_request(photo_of(image, generator)) for image in digits[:50]]
    result = {"connections": CONNECTIONS, "seconds": options.seconds, "cores": available_cores()}
    with service() as process:
        asyncio.run(load(process.port, posts, 3))  # imports, caches
        result["digits"] = asyncio.run(measure(process, posts, options.seconds))
        port = process.port
        process.send_signal(signal.SIGKILL)
        process.wait()
    with service(port=port) as process:
        result["seconds_to_ready"] = process.seconds_to_ready
        result["photos"] = asyncio.run(measure(process, photos, options.seconds / 3))
    with service(ALONE) as process: result["digits_not_gathered"] = asyncio.run(measure(process, posts, options.seconds / 3))
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n")
    print(sentences(result))


if __name__ == "__main__": main()
