"""No rank outwaits one that is gone, the verdict names it, and nothing that only takes its time is taken for lost."""

import json
import socket
import subprocess
import sys

import pytest

from infra.launcher import LOST
from tests.support.dataset import REPOSITORY
from training.rendezvous import MeetingError, seconds_of
from training.watchdog import Watchdog


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], dict[str, str]]:
    """Exit codes and words of all pairs of ranks in ``watched_ranks``."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.watched_ranks", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    said = {log.stem: log.read_text() for log in folder.glob("*.log")}
    return json.loads((folder / "codes.json").read_text()), said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "codes", "rank_0_says", "rank_1_says"),
    [
        ("stopped", (LOST, LOST), "(rank 1) has not been heard of for 12 s", ""),
        ("first_killed", (-9, LOST), "", ""),
        ("stuck", (LOST, LOST), "(rank 1) is behind the others", ""),
        ("paused", (0, 0), "", ""),
        ("compiling", (0, 0), "", ""),
        ("ended_earlier", (0, 0), "", ""),
        ("failed", (1, 1), "rank 1 on {host} failed, and so all ranks end: ValueError: the reason", "Traceback"),
        ("refused", (2, 2), "", ""),
        ("broken_connection", (LOST, LOST), "rank 1 on {host} lost its connection to {host} (", "Traceback"),
    ],
)
def test_ranks_end_together_or_not_at_all(
    ranks: tuple[dict[str, int], dict[str, str]],
    scenario: str,
    codes: tuple[int, int],
    rank_0_says: str,
    rank_1_says: str,
) -> None:
    found, said = ranks
    assert (found[f"{scenario}-0"], found[f"{scenario}-1"]) == codes, said
    for rank, expected in enumerate((rank_0_says, rank_1_says)):
        assert expected.format(host=socket.gethostname()) in said[f"{scenario}-{rank}"]
    if codes == (0, 0):
        assert not said[f"{scenario}-0"] and not said[f"{scenario}-1"]


@pytest.mark.slow
def test_a_stuck_step_says_where_it_stands(ranks: tuple[dict[str, int], dict[str, str]]) -> None:
    _, said = ranks
    assert "no step ended for 8 s" in said["stuck-0"]
    assert "watched_ranks.py" in said["stuck-0"] and "forever" in said["stuck-0"]


@pytest.mark.slow
def test_a_refusal_is_said_without_a_traceback(ranks: tuple[dict[str, int], dict[str, str]]) -> None:
    both = ranks[1]["refused-0"] + ranks[1]["refused-1"]
    assert "not like this" in both and "Traceback" not in both


def test_one_rank_alone_is_not_watched() -> None:
    watchdog = Watchdog(None)
    with watchdog.paused():
        watchdog.beat()
    watchdog.close()
    assert not watchdog.watches and watchdog.blame(ValueError()) == 1


@pytest.mark.parametrize("text", ["soon", "-1", "inf", "nan"])
def test_a_timeout_that_is_no_number_of_seconds_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("IRD_STEP_TIMEOUT", text)
    with pytest.raises(MeetingError, match="IRD_STEP_TIMEOUT"):
        seconds_of("IRD_STEP_TIMEOUT", 600)
