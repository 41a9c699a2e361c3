"""A real server on loopback: what it answers, what it refuses, and its page in a real browser."""

import asyncio
import base64
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from skimage import data
from torch import nn

from infra.config import ConfigError
from pipeline.admission import Admission, FullError
from pipeline.inference import LoadedModel, RestoreOptions, restore_array
from pipeline.pictures import Picture, encode_picture
from pipeline.samples import to_float, to_integers
from pipeline.serve import ServeConfig, make_app, serving
from tests.support.browser import open_tab
from training.export import save_export
from training.models import DyNetConfig, EDSRConfig, build_model

PHOTOGRAPH = np.ascontiguousarray(data.astronaut()[:96, 180:300])
CONFIG = ServeConfig(max_bytes=60_000, max_pixels=128 * 128, waiting=1, timeout=60, upload_timeout=1)


def png(pixels: np.ndarray) -> bytes:
    return encode_picture(Picture(to_float(pixels)), ".png")


@contextlib.contextmanager
def running(models: dict[str, LoadedModel], config: ServeConfig) -> Iterator[int]:
    """The port at which the models are served, by a server in a thread of this process."""
    server = uvicorn.Server(uvicorn.Config(make_app(models, config), port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


def ask(
    port: int, path: str = "/api/restore", body: Any = None, method: str = "POST", **headers: str
) -> tuple[int, bytes, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, answer.read(), {key.lower(): value for key, value in answer.getheaders()}
    finally:
        connection.close()


@pytest.fixture(scope="module")
def models() -> dict[str, LoadedModel]:
    configs = {
        "dynet": DyNetConfig(dim=8, refinement_blocks=1, variants={"small": (1, 1, 1, 1), "large": (1, 2, 2, 2)}),
        "edsr": EDSRConfig(blocks=2, features=16, scale=4),
    }
    torch.manual_seed(0)
    return {
        name: LoadedModel(build_model(config).eval().requires_grad_(False), config, {}, "0" * 64)
        for name, config in configs.items()
    }


@pytest.fixture(scope="module")
def port(models: dict[str, LoadedModel]) -> Iterator[int]:
    with running(models, CONFIG) as port:
        yield port


def test_a_picture_comes_back_as_ird_restore_makes_it(port: int, models: dict[str, LoadedModel]) -> None:
    for variant in ("small", "large"):
        expected = to_integers(restore_array(models["dynet"], to_float(PHOTOGRAPH), RestoreOptions(variant=variant)))
        status, body, headers = ask(port, f"/api/restore?model=dynet&variant={variant}", png(PHOTOGRAPH))
        assert (status, headers["content-type"], headers["x-ird-variant"]) == (200, "image/png", variant)
        assert (np.asarray(Image.open(io.BytesIO(body))) == expected).all()
        assert int(headers["x-ird-milliseconds"]) >= 0
    status, body, headers = ask(port, "/api/restore", png(PHOTOGRAPH), Accept="application/json")
    told = json.loads(body)
    assert (told["model"], told["variant"], told["width"], told["height"]) == ("dynet", "large", 120, 96)
    assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(told["picture"])))) == expected).all()
    status, body, headers = ask(port, "/api/restore?model=edsr&format=webp", png(PHOTOGRAPH[:20, :30]))
    assert (status, Image.open(io.BytesIO(body)).size, headers["content-type"]) == (200, (120, 80), "image/webp")
    listed = json.loads(ask(port, "/api/models", method="GET")[1])
    assert [(m["name"], m["variants"], m["scale"]) for m in listed["models"]] == [
        ("dynet", ["small", "large"], 1),
        ("edsr", ["default"], 4),
    ]
    assert json.loads(ask(port, "/healthz", method="GET")[1]) == {"status": "ok", "inside": 0}


def bomb(width: int, height: int) -> bytes:
    """A sound PNG of some 1,000 bytes whose header claims a size that would take gigabytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


HOSTILE: dict[str, tuple[int, str, bytes, dict[str, str], str]] = {
    "nothing": (400, "", b"", {}, "expected a picture"),
    "text": (400, "", b"<svg onload=alert(1)>", {}, "not a picture"),
    "cut": (400, "", png(PHOTOGRAPH)[:5000], {}, "damaged"),
    "animated": (400, "", animated(), {}, "animated"),
    "bomb": (413, "", bomb(10_000, 10_000), {}, "10000x10000 pixels; at most 16,384"),
    "larger bomb": (413, "", bomb(60_000, 60_000), {}, "decompression bomb"),
    "wide": (413, "", bomb(16_385, 1), {}, "16385x1 pixels"),
    "large result": (413, "?model=edsr", png(PHOTOGRAPH), {}, "at most 4,096"),
    "many bytes": (413, "", bytes(60_001), {}, "at most 60,000 bytes"),
    "unknown parameter": (400, "?varient=small", b"x", {}, "unknown parameters varient"),
    "path as model": (404, "?model=../../etc/passwd", b"x", {}, "there are: dynet, edsr"),
    "folder as model": (404, "?model=/tmp", b"x", {}, "no model of that name"),
    "unknown variant": (400, "?variant=huge", b"x", {}, "there are: small, large"),
    "endless depth": (400, "?variant=[9999999,1,1,1]", png(PHOTOGRAPH), {}, "there are: small, large"),
    "unknown format": (400, "?format=exe", b"x", {}, "png, jpg, webp, tif"),
    "another page": (403, "", b"x", {"Origin": "https://evil.example"}, "pages of other places"),
    "another host": (400, "", b"x", {"Host": "evil.example"}, "Invalid host"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_hostile_or_wrong_is_refused(port: int, name: str) -> None:
    status, query, body, headers, complaint = HOSTILE[name]
    found, answer, answered = ask(port, f"/api/restore{query}", body, **headers)
    assert (found, complaint in answer.decode()) == (status, True), answer
    assert ask(port, "/healthz", method="GET")[1] == b'{"status":"ok","inside":0}'
    assert "/work" not in answer.decode() and "Traceback" not in answer.decode()
    assert name == "another host" or answered["x-content-type-options"] == "nosniff"


def test_a_body_without_a_length_and_one_that_never_comes(port: int) -> None:
    pieces = (bytes(1000) for _ in range(70))
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server had seen enough
        assert ask(port, body=pieces)[0] == 413
    with socket.create_connection(("127.0.0.1", port), timeout=30) as slow:
        slow.sendall(b"POST /api/restore HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\nabc")
        assert b" 408 " in slow.recv(1000).splitlines()[0]
    for path in ("/../../etc/passwd", "/templates/serve.html", "/%2e%2e/%2e%2e/etc/passwd"):
        assert ask(port, path, method="GET")[0] == 404


class Gate(nn.Module):
    """A network that takes as long as the test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.open = threading.Event()
        self.entered = threading.Semaphore(0)

    def forward(self, image: torch.Tensor, variant: str) -> torch.Tensor:
        self.entered.release()
        assert self.open.wait(60)
        return image.repeat_interleave(2, -1).repeat_interleave(2, -2)


def test_who_finds_no_room_is_told_when_to_come_again() -> None:
    gate = Gate()
    model = LoadedModel(gate, EDSRConfig(scale=2), {}, "0" * 64)
    picture = png(PHOTOGRAPH[:16, :16])
    config = CONFIG.model_copy(update={"timeout": 1.0})
    with running({"gate": model}, config) as port, ThreadPoolExecutor(4) as clients:
        try:
            first = clients.submit(ask, port, body=picture)
            assert gate.entered.acquire(timeout=30)
            second = clients.submit(ask, port, body=picture)  # waits, and is given up
            while json.loads(ask(port, "/healthz", method="GET")[1])["inside"] < 2:
                time.sleep(0.01)
            status, body, headers = ask(port, body=picture)
            assert (status, "too many requests" in body.decode()) == (429, True)
            assert int(headers["retry-after"]) >= 1
            for waited in (first, second):
                status, body, headers = waited.result(30)
                assert (status, "not done within 1 s" in body.decode()) == (503, True)
                assert int(headers["retry-after"]) >= 1
        finally:
            gate.open.set()
        while json.loads(ask(port, "/healthz", method="GET")[1])["inside"]:
            time.sleep(0.01)
        assert not gate.entered.acquire(timeout=0)  # the second was never begun
        assert ask(port, body=picture)[0] == 200


def test_admission_counts_what_enters_and_leaves() -> None:
    admission, gate = Admission(workers=1, waiting=1), threading.Event()

    def work() -> tuple[int, float]:
        gate.wait(30)
        return 1, 10.0

    first, second = admission.enter(work), admission.enter(work)
    with pytest.raises(FullError) as full:
        admission.enter(work)
    assert full.value.retry_after == 2  # two inside, a second each until something else is known
    assert second.cancel()
    assert admission.inside == 1
    gate.set()
    assert first.result(30) == (1, 10.0)
    admission.close()
    assert admission.inside == 0


def test_models_are_named_without_their_place(tmp_path: Path) -> None:
    config = EDSRConfig(blocks=1, features=8)
    save_export(build_model(config), config, tmp_path / "finetune" / "export", {})
    given = {"host": "127.0.0.1", "port": 0}
    models, served = serving([str(tmp_path / "finetune" / "export")], ["ird.example"], "1G", given)
    assert list(models) == ["finetune"]
    assert "ird.example" in served.hosts and served.memory == 1 << 30
    with pytest.raises(ConfigError, match="there is a model finetune already"):
        serving([str(tmp_path / "finetune" / "export")] * 2, [], "", given)
    with pytest.raises(ConfigError, match="waiting: Input should be greater"):
        serving([], [], "", {**given, "waiting": -1})


DROP = """
(() => {
  const bytes = Uint8Array.from(atob("%s"), c => c.charCodeAt(0)), transfer = new DataTransfer();
  transfer.items.add(new File([bytes], "noisy.png", {type: "image/png"}));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: transfer, bubbles: true}));
})()
"""
# The corner pixels of what the page shows as restored.
PIXELS = """
(() => {
  const image = document.getElementById("after"), canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return Array.from(context.getImageData(0, 0, canvas.width, canvas.height).data);
})()
"""


def test_the_page_in_a_browser(port: int, models: dict[str, LoadedModel], chromium: str, tmp_path: Path) -> None:
    async def visit() -> dict[str, Any]:
        async with open_tab(chromium, f"http://127.0.0.1:{port}/", tmp_path) as tab:
            seen: dict[str, Any] = {
                "options": await tab.run("[...document.querySelectorAll('option')].map(o => o.value)")
            }
            await tab.run("document.getElementById('variant').value = 'small'")
            await tab.run(DROP % base64.b64encode(png(PHOTOGRAPH)).decode())
            await tab.until("document.body.dataset.state == 'done'")
            seen["status"] = await tab.run("document.getElementById('status').textContent")
            seen["pixels"] = await tab.run(PIXELS)
            slide = "const s = document.getElementById('slide'); s.value = 30; s.dispatchEvent(new Event('input'))"
            await tab.run(slide)
            seen["clip"] = await tab.run("getComputedStyle(document.getElementById('before')).clipPath")
            await tab.screenshot(tmp_path / "page.png")
            await tab.run(DROP % base64.b64encode(b"no picture").decode())
            await tab.until("document.getElementById('status').className == 'bad'")
            seen["refusal"] = await tab.run("document.getElementById('status').textContent")
            return seen

    seen = asyncio.run(visit())
    assert seen["options"] == ["dynet", "edsr", "small", "large"]
    assert seen["status"].startswith("small: ") and "120 x 96 pixels" in seen["status"]
    shown = np.array(seen["pixels"], np.uint8).reshape(96, 120, 4)
    expected = to_integers(restore_array(models["dynet"], to_float(PHOTOGRAPH), RestoreOptions(variant="small")))
    assert (shown[..., :3] == expected).all()
    assert seen["clip"] == "inset(0px 70% 0px 0px)" or "70" in seen["clip"]
    assert "not a picture" in seen["refusal"]
    screenshot = np.asarray(Image.open(tmp_path / "page.png"))
    assert screenshot.shape[1] == 1100 and screenshot.std() > 10
