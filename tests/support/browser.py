"""A page in a real headless Chromium."""

import asyncio
import base64
import subprocess
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from infra.launcher import end_session

_QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=5000",
]


def open_page(chromium: str, page: Path, folder: Path, width: int = 1280, height: int = 4000) -> tuple[str, Path]:
    """Open ``page``; return its DOM after scripts have run, and the path of a screenshot in ``folder``."""
    screenshot = folder / "screenshot.png"
    common = [chromium, *_QUIET, f"--window-size={width},{height}"]
    subprocess.run(
        [*common, f"--user-data-dir={folder / 'shot'}", f"--screenshot={screenshot}", page.as_uri()],
        check=True,
        capture_output=True,
        timeout=180,
    )
    dumped = subprocess.run(
        [*common, f"--user-data-dir={folder / 'dump'}", "--dump-dom", page.as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=180,
    )
    return dumped.stdout, screenshot


class Tab:
    """A page of a headless Chromium that a test acts on, by the DevTools protocol."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._number = 0

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command; its result."""
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json(timeout=60)
            if message.get("id") == self._number:
                assert "error" not in message, message
                return dict(message["result"])

    async def run(self, script: str) -> Any:
        """Value of a JavaScript expression; a promise is waited for."""
        done = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    async def until(self, condition: str, seconds: float = 60) -> None:
        """Wait until a JavaScript expression is true."""
        for _ in range(int(10 * seconds)):
            if await self.run(condition):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never true: {condition}; the page says: {await self.run('document.body.innerText')}")

    async def screenshot(self, path: Path) -> None:
        """Save what is seen as PNG."""
        path.write_bytes(base64.b64decode((await self.call("Page.captureScreenshot"))["data"]))


@asynccontextmanager
async def open_tab(chromium: str, url: str, folder: Path, width: int = 1100, height: int = 900) -> AsyncIterator[Tab]:
    """Open ``url`` in a Chromium of the test's own, whose profile lies in ``folder``."""
    profile = folder / "profile"
    quiet = [option for option in _QUIET if not option.startswith("--virtual-time")]
    command = [chromium, *quiet, f"--window-size={width},{height}", f"--user-data-dir={profile}"]
    process = await asyncio.create_subprocess_exec(
        *command, "--remote-debugging-port=0", "about:blank", stdout=DEVNULL, stderr=DEVNULL, start_new_session=True
    )
    try:
        note = profile / "DevToolsActivePort"
        for _ in range(600):
            if note.exists() and "\n" in note.read_text():
                break
            assert process.returncode is None, "Chromium ended at once"
            await asyncio.sleep(0.1)
        port = note.read_text().split()[0]
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                address = (await answer.json())["webSocketDebuggerUrl"]
            async with session.ws_connect(address, max_msg_size=0) as socket:
                tab = Tab(socket)
                await tab.call("Page.navigate", url=url)
                await tab.until("document.readyState == 'complete' && location.href != 'about:blank'")
                yield tab
    finally:
        end_session(process.pid, patience=3)
        await process.wait()
