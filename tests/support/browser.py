"""A page in a real headless Chromium."""

import subprocess
from pathlib import Path

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
