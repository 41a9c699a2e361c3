"""Load on ``ird serve``, on loopback alone: requests a second, p95, memory over many requests, hostile inputs.

    python -m benchmarks.serve_load --export runs/demo/finetune/out/export --requests 1000

Starts a server of its own on a free port and ends it. Bounded in requests and in seconds.
"""

import argparse
import contextlib
import http.client
import io
import json
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

from infra.launcher import end_session, free_port


def main() -> None:
    """Print one line a phase."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--export", type=Path, required=True, help="export folder of the model to serve")
    parser.add_argument("--variant", default="", help="default: the model's last")
    parser.add_argument("--side", type=int, default=48, help="of the pictures, pixels")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=300, help="no request is begun after that")
    given = parser.parse_args()
    port = free_port()
    ird = str(Path(sys.executable).with_name("ird"))
    command = [ird, "serve", "--model", str(given.export), "--port", str(port), "--max-pixels", "1000000"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while ask(port, "GET", "/healthz")[0] != 200:
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit("the server did not start; run it by hand to see why: " + " ".join(command))
            time.sleep(0.2)
        path = "/api/restore" + (f"?variant={given.variant}" if given.variant else "")
        small = picture(given.side)
        process = psutil.Process(server.pid)
        load(port, path, small, 50, given.clients, given.seconds)  # threads, pools and arenas are there after this
        before = process.memory_info().rss
        seconds, latencies, codes = load(port, path, small, given.requests, given.clients, given.seconds)
        after = process.memory_info().rss
        p50, p95 = (statistics.quantiles(latencies, n=100)[q] for q in (49, 94))
        print(
            f"{given.clients} clients, {given.side}x{given.side}: {sum(codes.values())} requests in {seconds:.1f} s, "
            f"{codes[200] / seconds:.1f}/s, p50 {1000 * p50:.0f} ms, p95 {1000 * p95:.0f} ms, {dict(codes)}; "
            f"memory {before / 2**20:.0f} -> {after / 2**20:.0f} MiB"
        )
        seconds, _, codes = load(port, path, small, 200, 40, given.seconds)
        print(f"40 clients at once: 200 requests in {seconds:.1f} s, {dict(codes)} (429: told when to come again)")
        started, answers = time.monotonic(), Counter[str]()
        for name, body in hostile().items():
            for _ in range(50):
                answers[f"{name} {ask(port, 'POST', path, body)[0]}"] += 1
        last = process.memory_info().rss
        print(
            f"hostile: {sum(answers.values())} requests in {time.monotonic() - started:.1f} s, {dict(answers)}; "
            f"memory {last / 2**20:.0f} MiB, peak {peak(server.pid) / 2**20:.0f} MiB"
        )
        print(f"afterwards: {ask(port, 'POST', path, small)[0]} {json.loads(ask(port, 'GET', '/healthz')[1])}")
    finally:
        end_session(server.pid)


def ask(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """Status and body; status 0 when the connection was closed without an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused before all was sent
            connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        return 0, b""
    finally:
        connection.close()


def load(
    port: int, path: str, body: bytes, requests: int, clients: int, seconds: float
) -> tuple[float, list[float], Counter[int]]:
    """Seconds in all, seconds of each request that got its picture, and how often each status came."""
    started, lock = time.monotonic(), threading.Lock()
    latencies: list[float] = []
    codes: Counter[int] = Counter()

    def one(_: int) -> None:
        begun = time.monotonic()
        if begun - started > seconds:
            return
        status, _ = ask(port, "POST", path, body)
        with lock:
            codes[status] += 1
            if status == 200:
                latencies.append(time.monotonic() - begun)

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(one, range(requests)))
    return time.monotonic() - started, latencies, codes


def picture(side: int) -> bytes:
    """A PNG of smooth noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), "PNG")


def hostile() -> dict[str, bytes]:
    """What a server must refuse at no cost."""
    large = encoded(Image.new("L", (9000, 9000)), "PNG")
    return {
        "text": b"GIF89a" + bytes(100),
        "cut": picture(64)[:3000],
        "9000x9000": large,
        "21 MiB": bytes(21 << 20),
        "nothing": b"",
    }


def encoded(image: Image.Image, kind: str) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def peak(pid: int) -> int:
    """The most memory that a process has had, bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
