"""Progress in a log, on a terminal, and for who watches."""

import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest

from datagen.progress import Progress, Standing, followed, spoken
from tests.support.processes import ended_within

ROOT = Path(__file__).parents[2]
_STEP = """
import sys, time
from datagen.progress import Progress, followed
with followed():
    progress = Progress("scan", 26, "images")
    for _ in range(13):
        time.sleep(0.05)
        progress.advance(2, notes="8.1 MP/s, 95.2% measured")
        if len(sys.argv) > 1:
            sys.exit("error: no disk")
    progress.finish()
"""


def on_a_terminal(*arguments: str, terminal: str = "xterm") -> str:
    """What a step writes on a terminal of 120 columns."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": terminal, "COLUMNS": "120"}
    done = subprocess.Popen([sys.executable, "-c", _STEP, *arguments], stderr=slave, cwd=ROOT, env=environment)
    os.close(slave)
    written = b""
    try:
        while select.select([master], [], [], 60)[0] and (piece := os.read(master, 65536)):
            written += piece
    except OSError:  # Linux says so when the other side has closed.
        pass
    finally:
        os.close(master)
        ended_within(60, done)
    return written.decode()


def test_a_log_has_whole_lines_from_the_start() -> None:
    done = subprocess.run([sys.executable, "-c", _STEP], stderr=subprocess.PIPE, cwd=ROOT, check=True, timeout=60)
    assert b"\r" not in done.stderr and b"\x1b" not in done.stderr
    first, *_, last = done.stderr.decode().splitlines()
    assert first == "[scan] 0/26 images"
    assert re.fullmatch(r"\[scan\] 26/26 images, [\d.]+ images/s, 8\.1 MP/s, 95\.2% measured", last)


def test_a_log_tells_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress("scan", 10_000, "images")
    now = progress._start
    monkeypatch.setattr("datagen.progress.time.monotonic", lambda: now + 6)
    progress.advance(12)
    assert capsys.readouterr().err.splitlines()[-1] == "[scan] 12/10000 images, 2.0 images/s, 1 h 23 min left"


def test_a_log_tells_what_is_done_before_anything_is_counted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress("select", 100, "images")
    now = progress._start
    monkeypatch.setattr("datagen.progress.time.monotonic", lambda: now + 6)
    progress.advance(0, notes="looking for copies")
    assert capsys.readouterr().err.splitlines()[-1] == "[select] 0/100 images, looking for copies"
    monkeypatch.setattr("datagen.progress.time.monotonic", lambda: now + 16)
    progress.advance(20)
    assert progress.finish() == 16
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "[select] 20/100 images, 2.0 images/s, looking for copies, 40 s left"
    )


def test_what_was_found_done_has_no_part_in_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress = Progress("scan", 100, "images")
    now = progress._start
    monkeypatch.setattr("datagen.progress.time.monotonic", lambda: now + 10)
    progress.advance(50, fresh=False)
    progress.advance(10)
    assert progress.finish() == 10
    assert capsys.readouterr().err.splitlines()[-1] == "[scan] 60/100 images, 1.0 images/s, 40 s left"


def test_a_terminal_shows_a_bar_and_gets_its_cursor_back() -> None:
    shown = on_a_terminal()
    assert "\r" in shown and "━" in shown and "26/26" in shown and "95.2% measured" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_step_that_fails_leaves_no_bar_over_its_error() -> None:
    shown = on_a_terminal("fail")
    assert shown.index("\x1b[?25h") < shown.index("error: no disk")
    assert shown.rstrip().endswith("error: no disk")


def test_a_terminal_that_cannot_be_drawn_upon_gets_lines() -> None:
    shown = on_a_terminal(terminal="dumb")
    assert "[scan] 26/26 images" in shown and "\x1b" not in shown


def test_a_watcher_is_told_of_every_step_within() -> None:
    told: list[Standing] = []
    with followed(told.append):
        progress = Progress("scan", 3, "images")
        progress.advance(1, figures={"measured_share": 0.5})
        progress.advance(2)
        progress.finish()
    Progress("pack", 1, "samples").finish()
    assert [(standing.step, standing.done, standing.total, standing.unit) for standing in told] == [
        ("scan", 1, 3, "images"),
        ("scan", 3, 3, "images"),
        ("scan", 3, 3, "images"),
    ]
    assert told[-1].rate > 0 and told[-1].figures == {"measured_share": 0.5}


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (125, "2 min 05 s"), (3600, "1 h 00 min"), (90000, "25 h 00 min")],
)
def test_times_are_spoken_as_people_do(seconds: float, words: str) -> None:
    assert spoken(seconds) == words
