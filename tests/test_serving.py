"""The service as clients meet it: under load, under attack, on its way out; its page in a browser; its container's steps."""

import asyncio
import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from conftest import ROOT, executable, missing
from PIL import Image, ImageDraw
from playwright.sync_api import expect

from mnist_nb.data import load_digits
from mnist_nb.inference import Predictor, has_mnist_form
from mnist_nb.serving import write_demo

MODEL = ROOT / "reports" / "reference" / "model.int8.onnx"
RUNTIME = ROOT / "build" / "npm" / "node_modules" / "onnxruntime-web" / "dist"
STROKES = json.loads((ROOT / "tests" / "strokes.json").read_text())


@contextmanager
def serving(*words, port=0, log=subprocess.DEVNULL, **environment):
    "A service on a port of its own; killed at the end."
    process = subprocess.Popen([executable("mnist-serve"), "--model", str(MODEL), "--port", str(port), *words], stdout=log,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
    try:
        line = process.stderr.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+)\S* serves", line)
        assert found, line
        process.port = int(found[1])
        threading.Thread(target=process.stderr.read, daemon=True).start()  # a full pipe would stop the service
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def service():
    with serving(MNIST_NB_RECEIVE_SECONDS="0.3", MNIST_NB_MAX_BODY="1000000") as process: yield process


@pytest.fixture(scope="module")
def png() -> bytes:
    "A seven of the test set."
    Image.fromarray(load_digits("test").images[0]).save(file := io.BytesIO(), "png")
    return file.getvalue()


def head(length: int, kind: str = "image/png", path: str = "/v1/predict", more: str = "") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{more}\r\n".encode()


async def answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    "Status, headers and body of the next answer on a connection."
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
    if headers.get("transfer-encoding") == "chunked": body = await reader.read()
    elif "content-length" in headers: body = await reader.readexactly(int(headers["content-length"]))
    else: body = await reader.read()
    return int(first.split()[1]), headers, body


async def ask(port: int, *sent: bytes, pause: float = 0) -> tuple[int, dict[str, str], bytes]:
    "Sends a request, in parts, on a connection of its own."
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in sent:
            writer.write(part)
            try: await writer.drain()
            except ConnectionError: break  # it was refused already: the answer is there
            if pause: await asyncio.sleep(pause)
        return await asyncio.wait_for(answer(reader), 30)
    finally: writer.close()


async def get(port: int, path: str) -> tuple[int, dict[str, str], bytes]:
    return await ask(port, f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())


def run(coroutine):
    "Runs it in a thread of its own: Playwright keeps an event loop in this one."
    with ThreadPoolExecutor(1) as pool: return pool.submit(asyncio.run, coroutine).result()


def post(port: int, content: bytes, **words) -> tuple[int, dict[str, str], bytes]:
    return run(ask(port, head(len(content), **words) + content))


def digit_of(found) -> int: return json.loads(found[2])["predictions"][0]["digit"]


def test_no_torch_in_the_process(service):
    assert not re.search("libtorch|site-packages/(scipy|pandas)/", Path(f"/proc/{service.pid}/maps").read_text())


async def load(port: int, request: bytes, connections: int, stop: threading.Event) -> list[int | str]:
    "What 32 clients get that ask again and again until told to stop; they reconnect when the service closes a connection."
    results = []
    async def client():
        reader = writer = None
        while not stop.is_set():
            if writer is None: reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(request)
                status, headers, _ = await answer(reader)
                results.append(status)
                if headers.get("connection") == "close": writer = writer.close()
            except (OSError, asyncio.IncompleteReadError) as error: return results.append(repr(error))
    await asyncio.gather(*(client() for _ in range(connections)))
    return results


def test_a_request_that_is_still_arriving_is_answered_after_sigterm(png):
    async def upload(process):
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port)
        writer.write(head(len(png)) + png[:50])
        await asyncio.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.5)  # the service takes no more requests by now
        process.send_signal(signal.SIGTERM)  # said twice is as good as once
        await asyncio.sleep(0.5)
        writer.write(png[50:])
        return await answer(reader)
    with serving(MNIST_NB_DRAIN_SECONDS="0.05") as process:
        found = run(upload(process))
        assert found[0] == 200 and digit_of(found) == 7 and process.wait(10) == 0


def test_requests_in_flight_finish_on_sigterm(png):
    stop = threading.Event()
    with serving() as process:
        def end():
            time.sleep(1)
            stop.set()  # nothing is asked after the signal
            process.send_signal(signal.SIGTERM)
        threading.Thread(target=end).start()
        results = run(load(process.port, head(len(png)) + png, 32, stop))
        assert set(results) == {200} and len(results) > 64
        assert process.wait(10) == 0


def test_a_service_that_stops_says_so_first(png):
    with serving(MNIST_NB_DRAIN_SECONDS="3") as process:
        assert run(ask(process.port, b"GET /readyz HTTP/1.1\r\nHost: test\r\n\r\n"))[0] == 200
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        status, headers, _ = run(ask(process.port, b"GET /readyz HTTP/1.1\r\nHost: test\r\n\r\n"))
        assert (status, headers["connection"], headers["retry-after"]) == (503, "close", "1")
        assert digit_of(post(process.port, png)) == 7


def test_after_a_kill_the_same_port_serves_again(png):
    with serving() as process: port = process.port
    assert process.returncode == -signal.SIGKILL
    with serving(port=port): assert digit_of(post(port, png)) == 7


def test_a_port_that_is_taken_is_an_error(service):
    result = subprocess.run([executable("mnist-serve"), "--model", str(MODEL), "--port", str(service.port)], capture_output=True, text=True)
    assert result.returncode == 2 and "Give another port" in result.stderr and "Traceback" not in result.stderr


def test_more_requests_than_allowed_are_sent_away_for_a_moment(png):
    async def together(port):
        slow = [asyncio.create_task(ask(port, head(len(png)), png, pause=1.0)) for _ in range(3)]
        await asyncio.sleep(0.4)
        sent_away = await ask(port, head(len(png)) + png)
        asked = [await get(port, path) for path in ("/healthz", "/readyz")]
        return sent_away, asked, [await task for task in slow], await get(port, "/readyz")
    with serving(MNIST_NB_MAX_IN_FLIGHT="3") as process:
        (status, headers, body), (alive, ready), slow, after = run(together(process.port))
    assert (status, headers["retry-after"], headers["content-type"]) == (429, "1", "application/problem+json")
    assert json.loads(body[body.index(b"{"):body.rindex(b"}") + 1])["status"] == 429
    assert alive[0] == 200 and [found[0] for found in slow] == [200] * 3
    assert (ready[0], ready[1]["retry-after"], after[0]) == (503, "1", 200)  # a balancer sends the next request elsewhere


def test_who_lacks_the_token_takes_no_place(png):
    async def crowd(port):
        without = [asyncio.create_task(ask(port, head(1000), b"x")) for _ in range(5)]
        await asyncio.sleep(0.3)
        found = await ask(port, head(len(png), more="Authorization: bearer secret\r\n") + png)
        return found, [(await task)[0] for task in without]
    with serving(MNIST_NB_TOKEN="secret", MNIST_NB_MAX_IN_FLIGHT="2") as process:
        found, refused = run(crowd(process.port))
    assert digit_of(found) == 7 and refused == [401] * 5


def test_bodies_are_bounded_together_and_held_for_predictions_only(png):
    async def crowd(port):
        slow = [asyncio.create_task(ask(port, head(900_000), b"x" * 800_000, b"x" * 100_000, pause=1.0)) for _ in range(4)]
        elsewhere = await ask(port, head(7_000_000, path="/nowhere"), b"x" * 1_000_000)
        await asyncio.sleep(0.3)
        return [(await task)[0] for task in slow], elsewhere[0], await ask(port, head(len(png)) + png)
    with serving(MNIST_NB_MAX_HELD="2000000") as process: statuses, elsewhere, found = run(crowd(process.port))
    assert sorted(statuses) == [422, 422, 429, 429] and elsewhere == 404 and digit_of(found) == 7


def test_a_busy_service_says_so(png):
    Image.new("L", (5000, 4900), 255).save(file := io.BytesIO(), "png")
    async def crowd(port):
        large = [asyncio.create_task(ask(port, head(len(file.getvalue())) + file.getvalue())) for _ in range(20)]
        await asyncio.sleep(0.2)
        ready = await ask(port, b"GET /readyz HTTP/1.1\r\nHost: test\r\n\r\n")
        return ready, [await task for task in large], await ask(port, head(len(png)) + png)
    with serving(MNIST_NB_ANSWER_SECONDS="1") as process: ready, found, after = run(crowd(process.port))
    statuses = {status for status, _, _ in found}  # how many are answered in time depends on the machine
    assert ready[0] == 200 and 503 in statuses <= {200, 503}  # their size costs nobody else a place
    assert all(headers["retry-after"] == "1" for status, headers, _ in found if status == 503) and digit_of(after) == 7


def progressive(scans: int) -> bytes:
    "A grey JPEG file of 5000 × 5000 pixels, whose last scan is repeated: each costs as much as the first, and some bytes."
    Image.new("L", (5000, 5000), 255).save(file := io.BytesIO(), "jpeg", progressive=True)
    content = file.getvalue()
    last = content.rindex(b"\xff\xda")
    return content[:last] + content[last:-2] * (scans - content.count(b"\xff\xda") + 1) + content[-2:]


def test_costly_pictures_are_refused_and_keep_nobody_waiting(png):
    obvious, legal = progressive(100), progressive(30)
    async def crowd(port):
        slow = [asyncio.create_task(ask(port, head(len(content)) + content)) for content in [obvious] * 6 + [legal] * 4]
        others = [await ask(port, head(len(png)) + png) for _ in range(20)]
        return others, await get(port, "/readyz"), [await task for task in slow]
    with serving(MNIST_NB_WORK_SECONDS="0.3") as process:
        others, ready, slow = run(crowd(process.port))
        counts = run(get(process.port, "/metrics"))[2].decode()
        photo = Image.new("L", (900, 900), 230)
        ImageDraw.Draw(photo).line([(300, 250), (600, 250), (420, 700)], fill=40, width=60, joint="curve")
        photo.save(file := io.BytesIO(), "jpeg")
        after = post(process.port, file.getvalue())
    assert {digit_of(found) for found in others} == {7} and ready[0] == 200
    assert [found[0] for found in slow] == [422] * 6 + [413] * 4
    assert b"more than 30 scans" in slow[0][2] and b"more than 0.3 s of processor time" in slow[-1][2]
    assert float(re.search(r"^mnist_decoders_ended_total (\S+)", counts, re.MULTILINE)[1]) >= 4  # they were not waited for
    assert digit_of(after) == 7  # others have taken the place of the processes that ended


def test_not_ready_where_nothing_can_be_decoded(monkeypatch, photo):
    from starlette.testclient import TestClient

    from mnist_nb import decoding, serving as module
    class Refused(decoding.Decoder):
        def __init__(self): raise BlockingIOError(11, "no more processes")
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "Decoder", Refused)
        client = TestClient(module.create_app(MODEL))
        client.__enter__()
        try:
            found = client.get("/readyz")
            assert found.status_code == 503 and "no more processes" in found.json()["detail"]
            asked = client.post("/v1/predict", content=photo, headers={"content-type": "image/jpeg"})
            assert (asked.status_code, asked.headers["retry-after"]) == (503, "1")
            patch.undo()  # there is room again
            asked = client.post("/v1/predict", content=photo, headers={"content-type": "image/jpeg"})
            assert asked.json()["predictions"][0]["digit"] == 2 and client.get("/readyz").status_code == 200
        finally: client.__exit__(None, None, None)


def test_idle_connections_stay_longer_than_those_of_load_balancers(monkeypatch):
    from mnist_nb import serving as module
    seen = []
    class Idle:
        def __init__(self, config, guard): seen.append(config)
        def run(self, sockets): sockets[0].close()
    monkeypatch.setattr(module, "Server", Idle)
    monkeypatch.setattr(module, "log_as_json", lambda: None)
    for limits in (module.Limits(), module.Limits(keep_alive_seconds=5)): module.serve(MODEL, "127.0.0.1", 0, limits)
    assert [config.timeout_keep_alive for config in seen] == [80, 5]


def test_an_idle_connection_is_closed_in_the_end():
    with serving(MNIST_NB_KEEP_ALIVE_SECONDS="1") as process, socket.create_connection(("127.0.0.1", process.port)) as connection:
        connection.settimeout(20)
        for _ in range(2):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n")
            received = b""
            while not received.endswith(b'{"status":"ok"}'): received += connection.recv(10_000) or pytest.fail("closed too early")
            time.sleep(0.3)
        assert connection.recv(100) == b""


def test_slow_heads_and_bodies_do_not_stay(service):
    status, _, body = run(ask(service.port, head(100), b"x", b"x", b"x", b"x", pause=0.2))
    assert status == 408 and b"did not arrive within 0.3 s" in body
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\nHost:")
        connection.settimeout(20)
        assert connection.recv(100) == b""  # closed


def test_a_body_that_is_too_large_gets_its_answer(service):
    for declared in (1_000_001, 1_500_000):
        status, headers, body = post(service.port, b"x" * declared)
        assert status == 413 and headers["connection"] == "close" and b"1,000,000 bytes" in body
    chunks = b"POST /v1/predict HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert run(ask(service.port, chunks, *[b"10000\r\n" + b"x" * 65536 + b"\r\n"] * 20, b"0\r\n\r\n"))[0] == 413


def test_log_has_a_line_of_json_for_each_request(png, tmp_path):
    with open(tmp_path / "log", "w") as log, serving(log=log) as process:
        post(process.port, png)
        post(process.port, b"secret", path="/v1/predict?key=secret")
    first, second = map(json.loads, (tmp_path / "log").read_text().splitlines())
    assert first.items() >= {"method": "POST", "path": "/v1/predict", "status": 200, "bytes": len(png), "client": "127.0.0.1"}.items()
    assert second["status"] == 422 and "secret" not in json.dumps(second)


def malformed(kind: int, draw: np.random.Generator, png: bytes) -> list[bytes]:
    "A request that nobody should send, in the parts to send."
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + png + b"\r\n--x--\r\n"
    multipart, noise = "multipart/form-data; boundary=x", draw.integers(0, 256, int(draw.integers(1, 300)), dtype=np.uint8).tobytes()
    def whole(body, kind="application/json"): return [head(len(body), kind) + body]
    def bomb(width, height):  # a small file that says it is a large picture
        return png[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:]
    def cut(content): return content[:int(draw.integers(0, len(content) - 1))]
    depth = int(draw.integers(1_000, 50_000))
    return [
        lambda: whole(cut(form[:-2]), multipart),
        lambda: whole(form.replace(b"files", noise), multipart),
        lambda: whole(form, f"multipart/form-data; boundary={draw.integers(1e9)}"),
        lambda: whole(noise, multipart),
        lambda: whole(noise, str(draw.choice(["", "text/plain", "video/mp4", "application/xml", "multipart/mixed", "x" * 1000]))),
        lambda: whole(noise, "image/png"),
        lambda: whole(cut(png)[:60], "application/octet-stream"),
        lambda: whole(bomb(60_000, 60_000), "image/png"),
        lambda: whole(bomb(0, 2 ** 31 - 1), "image/png"),
        lambda: whole(b"[" * depth + b"]" * depth),
        lambda: whole(b'{"images": ' + b"[" * depth + b"]" * depth + b"}"),
        lambda: whole(b'{"a":' * depth),
        lambda: whole(json.dumps({"images": [["a", None, {}, [1e400, -5]][int(draw.integers(4))]]}).encode()),
        lambda: whole(b'{"images": [' + b"1," * depth + b"1]}"),
        lambda: whole(json.dumps({"images": [base64.b64encode(noise).decode()]}).encode()),
        lambda: whole(noise, "application/json"),
        lambda: [head(10, more=f"X-Large: {'x' * int(draw.integers(70_000, 300_000))}\r\n") + b"x" * 10],
        lambda: [head(10, more="".join(f"X-{i}: 1\r\n" for i in range(12_000))) + b"x" * 10],
        lambda: [noise.replace(b"\n", b"") + b"\r\n\r\n"],
        lambda: [head(5, path="/" + "%00%ff/../" * 50) + b"x" * 5],
        lambda: [b"POST /v1/predict HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n" + noise],
        lambda: [head(10, more="Content-Length: 11\r\n") + b"x" * 11],
        lambda: [head(2_000_000) + noise],
        lambda: [b"PUT" + head(3)[4:] + b"abc"],
        lambda: [head(3, path="/v1/predict?top_k=99999999999999999999") + b"abc"],
        lambda: [head(50), b"slow"],
    ][kind]()


@pytest.mark.slow
def test_ten_thousand_malformed_requests(service, png):
    draw, kinds = np.random.default_rng(0), 26
    process = psutil.Process(service.pid)
    async def attack():
        statuses, room = {}, asyncio.Semaphore(24)
        async def one(kind):
            async with room:
                status, _, _ = await ask(service.port, *malformed(kind, draw, png))
                statuses.setdefault(kind, set()).add(status)
        for hundred in range(100):
            slow = [one(kinds - 1)] if hundred % 4 == 0 else [one(0)]  # some are slow
            await asyncio.gather(*(one((hundred * 100 + number) % (kinds - 1)) for number in range(99)), *slow)
            assert digit_of(await ask(service.port, head(len(png)) + png)) == 7, f"after {100 * hundred + 100} requests"
        return statuses
    post(service.port, png)
    before = process.memory_info().rss
    statuses = run(attack())
    expected = {0: {400}, 1: {400, 422}, 4: {415}, 13: {413}, 16: {400, 422}, 19: {404}, 22: {413}, 23: {405}, 25: {408},
                **dict.fromkeys((2, 3, 15, 17, 18, 20, 21), {400}), **dict.fromkeys((5, 6, 7, 8, 9, 10, 11, 12, 14, 24), {422})}
    assert {kind: found - expected[kind] for kind, found in statuses.items()} == dict.fromkeys(range(kinds), set())
    assert process.memory_info().rss - before < 150e6


def test_work_of_one_request_is_bounded(png):
    noisy = np.random.default_rng(0).integers(0, 256, (400, 400), dtype=np.uint8)
    Image.fromarray(noisy).save(file := io.BytesIO(), "png", compress_level=0)
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + file.getvalue() + b"\r\n"
    with serving(MNIST_NB_WORK_SECONDS="0.2") as process:
        status, _, body = post(process.port, part * 40 + b"--x--\r\n", kind="multipart/form-data; boundary=x")
        assert status == 413 and b"take more than 0.2 s" in body
        assert digit_of(post(process.port, png)) == 7


def test_the_service_keeps_to_its_own_description(service, tmp_path):
    (tmp_path / "schemathesis.toml").write_text(
        "[checks.positive_data_acceptance]\n"  # bytes of the right kind need not be a picture
        "expected-statuses = [200, 413, 422]\n")
    words = ["--config-file", tmp_path / "schemathesis.toml", "run", f"http://127.0.0.1:{service.port}/openapi.json",
             "--max-examples", "60", "--seed", "1", "--generation-database", "none", "--no-color"]
    result = subprocess.run([executable("schemathesis"), *map(str, words)], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-1000:]
    assert re.search(r"Selected: 5/5\s+Tested: 5", result.stdout) and "Unresolvable" not in result.stdout


# The page

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    "The address of the page without a service."
    if not RUNTIME.is_dir(): missing("no onnxruntime-web: make demo")
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder / "demo", MODEL, RUNTIME)
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_): pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/demo/"
    server.shutdown()


@pytest.fixture
def page(browser, service):
    "The page of the service; errors in it and requests elsewhere are errors of the test."
    troubles, context = [], browser.new_context(viewport={"width": 1000, "height": 900})
    page = context.new_page()
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("console", lambda line: line.type == "error" and troubles.append(line.text))
    page.on("request", lambda request: request.url.startswith(("http://127.0.0.1", "blob:", "data:")) or troubles.append(request.url))
    page.goto(f"http://127.0.0.1:{service.port}/")
    yield page
    context.close()
    assert not troubles


def draw(page, strokes: list) -> None:
    "Draws with the mouse; points are hundredths of the pad."
    page.click("#clear")
    expect(page.locator("#digit")).to_have_text("?")
    pad = page.locator("#pad").bounding_box()
    for stroke in strokes:
        for number, (x, y) in enumerate(stroke):
            page.mouse.move(pad["x"] + x / 100 * pad["width"], pad["y"] + y / 100 * pad["height"])
            if number == 0: page.mouse.down()
        page.mouse.up()


SHOWN = """() => { const pixels = document.getElementById("seen").getContext("2d").getImageData(0, 0, 28, 28).data;
  return { digit: document.getElementById("digit").textContent, pixels: Array.from({ length: 784 }, (_, i) => pixels[4 * i]),
           shares: Array.from(document.querySelectorAll("#bars .bar"), bar => +bar.style.getPropertyValue("--share")) }; }"""


def shown(page) -> dict:
    "What the page says, once all that was asked is answered."
    expect(page.locator(".rest[aria-busy=false]")).to_be_attached()
    return page.evaluate(SHOWN)


def test_drawn_digits_are_recognised_with_and_without_a_service(page, demo):
    static = page.context.new_page()
    static.goto(demo)
    right, predictor = 0, Predictor(MODEL)
    for digit, styles in STROKES.items():
        for strokes in styles:
            found = []
            for place in (page, static):
                place.bring_to_front()
                draw(place, strokes)
                found.append(shown(place))
            here, there = found
            image = np.array(here["pixels"], np.uint8).reshape(28, 28)
            assert here["digit"] == there["digit"] and here["pixels"] == there["pixels"] and has_mnist_form(image)
            assert np.abs(np.array(here["shares"]) - there["shares"]).max() < 1e-3
            assert np.abs(predictor.judge(image[None])[0][0] - here["shares"]).max() < 1e-5
            right += here["digit"] == digit
    assert right >= 18


def test_bars_follow_the_pen(page):
    pad = page.locator("#pad").bounding_box()
    page.mouse.move(pad["x"] + 100, pad["y"] + 50)
    page.mouse.down()
    page.mouse.move(pad["x"] + 100, pad["y"] + 250, steps=10)
    assert shown(page)["digit"] == "1"  # the pen is still down
    page.mouse.up()
    page.click("#undo")
    expect(page.locator("#digit")).to_have_text("?")


def test_cautions_are_spoken(page):
    draw(page, [[[10, 10], [90, 90]], [[90, 10], [10, 90]], [[50, 5], [50, 95]], [[5, 50], [95, 50]]])  # a star
    expect(page.locator("#spoken")).to_have_text(re.compile("unlike any digit"))


@pytest.mark.parametrize("served", [True, False])
def test_several_digits_get_a_warning(page, demo, served):
    if not served: page.goto(demo)
    seven = [[[60, 25], [85, 25], [70, 75]], [[63, 50], [82, 50]]]  # with a bar of its own
    draw(page, seven)
    expect(page.locator("#warnings")).not_to_contain_text("separate digits")
    draw(page, [[[30, 25], [30, 75]], *seven])
    shown(page)
    expect(page.locator("#warnings")).to_contain_text("2 separate digits: they were read as one")
    expect(page.locator("#spoken")).to_have_text(re.compile("2 separate digits"))


def test_drawing_by_keyboard(page):
    page.focus("#pad")
    keys = ["ArrowLeft"] * 6 + [" "] + ["ArrowRight"] * 10 + ["ArrowDown", "ArrowDown", "ArrowLeft"] * 8 + [" "]
    for key in keys: page.keyboard.press(key)
    assert shown(page)["digit"] == "7"
    expect(page.locator("#spoken")).to_have_text(re.compile("^7, "))
    page.keyboard.press("Escape")
    expect(page.locator("#digit")).to_have_text("?")


def test_drawing_by_touch_on_a_phone(browser, service):
    context = browser.new_context(viewport={"width": 375, "height": 667}, has_touch=True, is_mobile=True, color_scheme="dark")
    page = context.new_page()
    page.goto(f"http://127.0.0.1:{service.port}/")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    pad, touch = page.locator("#pad").bounding_box(), context.new_cdp_session(page)
    def send(kind, *points): touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y} for x, y in points]})
    points = [(pad["x"] + 0.5 * pad["width"], pad["y"] + part * pad["height"]) for part in np.linspace(0.2, 0.8, 12)]
    send("touchStart", points[0])
    for point in points[1:]: send("touchMove", point)
    send("touchEnd")
    assert shown(page)["digit"] == "1"
    assert page.evaluate("scrollY") == 0 and page.locator("#digit").bounding_box()["y"] < 667  # in sight while drawing
    context.close()


@pytest.fixture(scope="module")
def photo() -> bytes:
    "A two on paper."
    picture = Image.new("RGB", (320, 240), (225, 220, 210))
    points = [(x * 1.4 + 80, y * 1.4 + 40) for stroke in STROKES["2"][0] for x, y in stroke]
    ImageDraw.Draw(picture).line(points, fill=(40, 40, 90), width=12, joint="curve")
    picture.save(file := io.BytesIO(), "jpeg")
    return file.getvalue()


CARRY = """([name, content]) => { const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(atob(content), letter => letter.charCodeAt(0))], "photo.jpg", { type: "image/jpeg" }));
  const event = name === "paste" ? new ClipboardEvent(name, { clipboardData: transfer, bubbles: true })
    : new DragEvent(name, { dataTransfer: transfer, bubbles: true, cancelable: true });
  document.body.dispatchEvent(event); }"""


@pytest.mark.parametrize("way", ["choose", "drop", "paste"])
def test_pictures(page, photo, way):
    if way == "choose": page.set_input_files("#file", {"name": "photo.jpg", "mimeType": "image/jpeg", "buffer": photo})
    else: page.evaluate(CARRY, [way, base64.b64encode(photo).decode()])
    found = shown(page)
    assert found["digit"] == "2" and page.locator("#picture").is_visible()
    assert found["pixels"] == Predictor(MODEL).predict(photo).image.ravel().tolist()


def test_a_file_that_is_no_picture_is_explained(browser, service):
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{service.port}/")
    draw(page, STROKES["7"][0])
    assert shown(page)["digit"] == "7"
    page.set_input_files("#file", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"no picture"})
    expect(page.locator("#problem")).to_contain_text("is not a picture")
    expect(page.locator("#digit")).to_have_text("?")  # not the answer to what was there before
    page.close()


def test_a_token_is_asked_for(browser):
    with serving(MNIST_NB_TOKEN="se+c/ret==") as process:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{process.port}/")
        page.fill("#secret", "se+c/ret==")
        page.click("#token button")
        expect(page.locator("#about")).to_contain_text("test images")
        draw(page, STROKES["7"][0])
        assert shown(page)["digit"] == "7"
        page.close()


@pytest.mark.parametrize("path", ["", "docs"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_are_accessible(page, service, axe, path, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(f"http://127.0.0.1:{service.port}/{path}")
    if not path: draw(page, STROKES["3"][0])
    page.evaluate(axe.read_text())  # not as a script element: the policy of the page allows none
    found = page.evaluate("axe.run().then(result => result.violations.map(item => [item.id, item.nodes.map(node => node.html)]))")
    assert not found


# The container, without an engine

@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    "Instructions and their words; those of the last stage come after the last FROM."
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text())
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line and not line.startswith("#")]


def python_for_all() -> str:
    "A Python that other users may run, too."
    for path in map(Path, ("/usr/bin/python3", sys.executable)):
        if path.exists() and all(folder.stat().st_mode & 1 for folder in path.resolve().parents): return str(path)
    missing("no Python here that another user may run: install Debian's python3")


def test_the_steps_of_the_container(dockerfile, png, tmp_path):
    app, source, pip = tmp_path / "app", tmp_path / "source", [sys.executable, "-m", "pip"]
    def here(words): return words.replace("/app", str(app)).replace("/source", str(source))
    for what, words in dockerfile:
        *given, target = words.split()
        if what == "COPY" and "/source" in target:
            for name in given:
                destination = Path(here(target)) / name if target.endswith("/") else Path(here(target))
                destination.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, destination)
        elif what == "RUN" and "pip" in words:
            if "venv" in words: subprocess.run([python_for_all(), "-m", "venv", "--without-pip", app], check=True)
            installed = here(words.split("/build/bin/pip ")[-1])
            result = subprocess.run([*pip, "--quiet", *shlex.split(installed)], capture_output=True, text=True)
            if "No matching distribution" in result.stderr: missing(f"pip has no network here: {result.stderr[-300:]}")
            assert result.returncode == 0, result.stderr
    last = dict(dockerfile[max(index for index, (what, _) in enumerate(dockerfile) if what == "FROM"):])
    shutil.copyfile(ROOT / last["ARG"].partition("=")[2], app / "model.onnx")

    size = sum(path.stat().st_size for path in app.rglob("*") if path.is_file() and not path.is_symlink())
    assert size < 220e6  # below 350 MB with Debian's slim image and its Python, 112 MB
    assert not list(app.rglob("torch")) and not list(app.rglob("pip"))

    user, group = map(int, last["USER"].split(":"))
    root, port = os.geteuid() == 0, 18080 + os.getpid() % 10_000
    assert user != 0
    subprocess.run(["chmod", "-R", "a-w,a+rX", app], check=True)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's own are closed to others
        if folder.owner() == Path.home().owner() and "pytest" in str(folder): folder.chmod(0o755)
    as_user = {"user": user, "group": group, "extra_groups": []} if root else {}
    variables = dict(pair.split("=") for pair in last["ENV"].split())
    words = [word.replace("8080", str(port)) for word in json.loads(here(last["CMD"]))]
    process = subprocess.Popen(words, cwd="/", env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **as_user)
    try:
        assert "serves" in (line := process.stderr.readline()), line
        healthy = [word.replace("8080", str(port)) for word in json.loads(here(last["HEALTHCHECK"].partition("CMD ")[2]))]
        proxy = {"http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}  # of the network: not for this
        subprocess.run(healthy, cwd="/", env={**variables, **proxy}, check=True, **as_user)
        assert digit_of(post(port, png)) == 7
        if root: assert psutil.Process(process.pid).uids().real == user
    finally:
        process.terminate()
        assert process.wait(20) == 0
        process.stderr.close()
        subprocess.run(["chmod", "-R", "u+w", app], check=True)
    assert subprocess.run(healthy, cwd="/", env=variables, capture_output=True).returncode != 0  # nothing is left to be healthy


def test_compose_is_as_closed_as_the_container(dockerfile):
    service = yaml.safe_load((ROOT / "compose.yml").read_text())["services"]["mnist"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert service["ports"] == ["127.0.0.1:8080:8080"] and dict(dockerfile)["EXPOSE"] == "8080"


def test_every_limit_is_described_and_can_be_given_to_the_container():
    from dataclasses import fields

    from mnist_nb.serving import Limits, variable
    described = dict(re.findall(r"^\| `(MNIST_NB_\w+)` \| (\S+) \|", (ROOT / "docs" / "deploy.md").read_text(), re.MULTILINE))
    names = {variable(own.name): own.default for own in fields(Limits)}
    assert set(described) == {*names, "MNIST_NB_TOKEN_FILE"}
    assert {name: described[name] for name in names} == {name: f"{value:g}" if isinstance(value, float) else str(value) or "none"
                                                         for name, value in names.items()}
    service = yaml.safe_load((ROOT / "compose.yml").read_text())["services"]["mnist"]
    assert set(service["environment"]) == set(names)


def test_the_image_has_versions_that_the_package_admits():
    from packaging.requirements import Requirement
    required = re.findall(r"^requirements = (.*?)\n(?!    )", (ROOT / "settings.ini").read_text(), re.MULTILINE | re.DOTALL)[0].split()
    ranges = {own.name: own.specifier for own in map(Requirement, required)}
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "requirements-service.txt").read_text().replace("_", "-"), re.MULTILINE))
    shared = set(pinned) & set(ranges)
    assert shared >= {"numpy", "pillow", "onnxruntime", "fastapi", "uvicorn", "python-multipart", "prometheus-client"}
    assert all(ranges[name].contains(pinned[name]) for name in shared)


@pytest.mark.parametrize("name, value, complaint", [
    ("MAX_BODY", "much", "MNIST_NB_MAX_BODY=much: give a whole number"), ("MAX_BODI", "1", "did you mean 'MNIST_NB_MAX_BODY'"),
    ("TOKEN", "", "MNIST_NB_TOKEN is empty"), ("TOKEN_FILE", "/nowhere", "cannot be read"), ("ROOT_PATH", "mnist", "such as /mnist")])
def test_the_environment_is_checked_first(name, value, complaint):
    result = subprocess.run([executable("mnist-serve"), "--port", "0"], env={**os.environ, f"MNIST_NB_{name}": value},
                            capture_output=True, text=True)
    assert result.returncode == 2 and complaint in result.stderr and "serves" not in result.stderr


def test_the_command_wants_a_model_without_torch(tmp_path):
    (tmp_path / "model.pth").touch()
    for given, complaint in (("model.pth", "make an .onnx file of it with mnist-optimize"), ("model.onnx", "there is no such file"),
                             (".", "holds neither model.int8.onnx nor model.onnx")):
        result = subprocess.run([executable("mnist-serve"), "--model", tmp_path / given], capture_output=True, text=True)
        assert result.returncode == 2 and complaint in result.stderr and ".pth, .onnx" not in result.stderr


def test_behind_a_proxy_that_adds_a_prefix(browser):
    with serving("--root_path", "/mnist") as process:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{process.port}/mnist")
        draw(page, STROKES["7"][0])
        assert shown(page)["digit"] == "7"
        page.goto(f"http://127.0.0.1:{process.port}/mnist/docs")
        expect(page.locator("pre")).to_contain_text(f"http://127.0.0.1:{process.port}/mnist/v1/predict")
        page.close()


def test_not_ready_with_a_model_that_sees_no_seven(tmp_path):
    from starlette.testclient import TestClient

    from mnist_nb import serving as module
    with TestClient(module.create_app(MODEL)) as client: assert client.get("/readyz").status_code == 200
    class Blind(Predictor):
        def judge(self, images): return np.full((len(images), 10), 0.1), np.ones(len(images), bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "Predictor", Blind)
        with TestClient(module.create_app(MODEL)) as client:
            found = client.get("/readyz")
            assert found.status_code == 503 and "seven" in found.json()["detail"] and client.get("/healthz").status_code == 200
            client.post("/v1/predict", content=(ROOT / "benchmarks" / "page_light.png").read_bytes(), headers={"content-type": "image/png"})
            assert "mnist_low_confidence_predictions_total 1.0" in client.get("/metrics").text


def test_readiness_by_urllib(service):
    with urllib.request.urlopen(f"http://127.0.0.1:{service.port}/readyz") as found: assert json.load(found) == {"status": "ready"}
