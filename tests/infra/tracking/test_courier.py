"""One spool, sent with a crash at any moment of any try: the run holds every event once."""

import math
from pathlib import Path
from typing import Any

import pytest

from infra.tracking import TrackingConfig, connect, experiment_id
from infra.tracking.courier import Courier, backoff
from infra.tracking.spool import Delivery, Spool, line_of
from tests.infra.tracking.conftest import only_run, points
from tests.support.faulty_proxy import faulty_proxy
from tests.support.mlflow_server import MlflowServer


class Crash(BaseException):
    """What no code of ours catches, as a kill."""


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database without a server."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/db.sqlite"
    connect(TrackingConfig(uri=uri)).search_experiments()
    return uri


def start(
    spool: Spool, experiment: str, *, session: str = "one", gpus: int = 0, at: int = 1_000, parent: str = ""
) -> None:
    body = {"session": session, "key": f"ird-{experiment}", "name": "run", "experiment": experiment, "parent": parent}
    append(spool, line_of(at, "start", body | {"uri": "", "host": "here", "pid": 1, "born": 0.0, "gpus": gpus}))


def end(spool: Spool, status: str = "FINISHED", *, session: str = "one", at: int = 9_000) -> None:
    append(spool, line_of(at, "end", {"session": session, "status": status, "exit": status.lower()}))


def append(spool: Spool, line: bytes) -> None:
    spool.folder.mkdir(parents=True, exist_ok=True)
    with open(spool.path, "ab") as file:
        file.write(line)


def deliver_all(courier: Courier, tries: int = 200) -> None:
    while not courier.is_done:
        courier.deliver()
        tries -= 1
        assert tries > 0, courier.delivery.error


class DyingSpool(Spool):
    """Crashes instead of writing the note, once: the server has what the note does not know of."""

    def __init__(self, folder: Path, survives: int) -> None:
        super().__init__(folder)
        self._survives = survives

    def note(self, delivery: Delivery) -> None:
        if self._survives == 0:
            raise Crash
        self._survives -= 1
        super().note(delivery)


def test_a_crash_between_any_request_and_its_note_doubles_nothing(uri: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "crash")
    start(spool, "crash")
    append(spool, line_of(1_001, "params", {"lr": "1", "dim": "8"}))
    for step in range(1, 31):
        values = {"loss": 1 / step, "odd": None if step % 5 else 0.1 * step}
        append(spool, line_of(1_000 + step, "metrics", values, step))
        if step % 10 == 0:
            append(spool, line_of(1_000 + step, "tags", {"step": str(step)}))
    end(spool)
    crashes = 0
    for survived in (0, 1, 0, 2, 1, 0, 3, 0):
        courier = Courier(DyingSpool(tmp_path / "crash", survived), uri)
        courier._batch = 4
        with pytest.raises(Crash):
            deliver_all(courier)
        crashes += 1
    assert crashes == 8 and not spool.delivery().offset > spool.size()
    deliver_all(Courier(spool, uri))
    run = only_run(uri, "crash")
    assert points(uri, run.info.run_id, "loss") == [(step, 1 / step) for step in range(1, 31)]
    odd = points(uri, run.info.run_id, "odd")
    assert [step for step, _ in odd] == list(range(1, 31))
    assert all(math.isnan(value) == bool(step % 5) for step, value in odd)
    assert run.data.params == {"lr": "1", "dim": "8"} and run.data.tags["step"] == "30"
    assert run.info.status == "FINISHED" and run.info.end_time == 9_000


def test_everything_sent_twice_is_there_once(uri: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "twice")
    start(spool, "twice")
    for step in range(1, 11):
        append(spool, line_of(1_000 + step, "metrics", {"loss": 0.1 * step}, step))
    end(spool)
    deliver_all(Courier(spool, uri))
    spool.note(Delivery())  # all knowledge of the delivery is lost, the run id too
    (tmp_path / "twice" / "mlflow.json").unlink()
    deliver_all(Courier(spool, uri))
    run = only_run(uri, "twice")
    assert points(uri, run.info.run_id, "loss") == [(step, 0.1 * step) for step in range(1, 11)]


def test_faults_of_the_way_to_the_server_neither_lose_nor_double(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "faults")
    start(spool, "faults")
    append(spool, line_of(1_001, "params", {"lr": "1"}))
    for step in range(1, 41):
        append(spool, line_of(1_000 + step, "metrics", {"loss": 1 / step}, step))
    end(spool)
    with faulty_proxy(mlflow_server.uri) as proxy:
        proxy.inject("lost_answer", method="POST", path="runs/create")
        proxy.inject("lost_answer", method="POST", path="runs/log-batch", times=3, skip=1)
        proxy.inject("status", method="POST", path="runs/log-batch", status=502, times=2)
        proxy.inject("status", method="POST", path="runs/log-batch", status=400, times=1, skip=3)
        proxy.inject("reset", method="POST", path="runs/update")
        proxy.inject("status", method="POST", path="runs/update", status=403)
        courier = Courier(spool, proxy.endpoint)
        courier._batch = 8
        deliver_all(courier)
        outcomes = {request.outcome for request in proxy.requests}
    assert outcomes >= {"lost_answer", "status", "reset", "ok"}
    run = only_run(mlflow_server.uri, "faults")  # the one whose making was not answered
    assert points(mlflow_server.uri, run.info.run_id, "loss") == [(step, 1 / step) for step in range(1, 41)]
    assert run.info.status == "FINISHED" and not spool.refused.exists()


def test_a_run_that_a_frozen_server_made_after_all_is_removed(uri: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "late")
    start(spool, "late")
    courier = Courier(spool, uri)
    deliver_all(courier)
    client = connect(TrackingConfig(uri=uri))
    experiment = experiment_id(client, TrackingConfig(uri=uri, experiment="late"))
    late = client.create_run(experiment, 500, {"ird.run_key": "ird-late"}, "run")
    append(spool, line_of(1_001, "metrics", {"loss": 1.0}, 1))
    end(spool)
    deliver_all(courier)
    run = only_run(uri, "late")
    assert run.info.run_id != late.info.run_id and run.data.metrics == {"loss": 1.0}
    assert client.get_run(late.info.run_id).data.tags["ird.duplicate_of"] == run.info.run_id


def test_what_the_server_will_never_take_is_set_aside_alone(uri: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "refused")
    start(spool, "refused")
    append(spool, line_of(1_001, "metrics", {"loss": 1.0, "a bad name?": 2.0}, 1))
    append(spool, line_of(1_002, "metrics", {"loss": 0.5}, 2))
    append(spool, line_of(1_003, "artifact", {"path": str(tmp_path / "never there"), "folder": ""}))
    end(spool)
    deliver_all(Courier(spool, uri))
    run = only_run(uri, "refused")
    assert points(uri, run.info.run_id, "loss") == [(1, 1.0), (2, 0.5)] and run.info.status == "FINISHED"
    refused = spool.refused.read_text().splitlines()
    assert len(refused) == 2 and "a bad name?" in refused[0] and "never there" in refused[1]


def test_a_run_that_was_deleted_is_made_again_with_all_its_points(uri: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "deleted")
    start(spool, "deleted")
    append(spool, line_of(1_001, "metrics", {"loss": 1.0}, 1))
    deliver_all(Courier(spool, uri))
    first = only_run(uri, "deleted").info.run_id
    connect(TrackingConfig(uri=uri)).delete_run(first)
    append(spool, line_of(1_002, "metrics", {"loss": 0.5}, 2))
    deliver_all(Courier(spool, uri))
    again = only_run(uri, "deleted")
    assert again.info.run_id != first
    assert points(uri, again.info.run_id, "loss") == [(1, 1.0), (2, 0.5)]


def test_a_session_that_was_found_dead_after_the_next_began_does_not_end_the_run(uri: str, tmp_path: Path) -> None:
    spool = Spool(tmp_path / "sessions")
    hour = 3_600_000
    start(spool, "sessions", session="one", gpus=8)
    append(spool, line_of(1_000 + hour, "metrics", {"loss": 1.0}, 1))
    start(spool, "sessions", session="two", gpus=2, at=1_000 + 2 * hour)
    end(spool, "FAILED", session="one", at=1_001 + 2 * hour)
    courier = Courier(spool, uri)
    deliver_all(courier)
    assert only_run(uri, "sessions").info.status == "RUNNING"
    end(spool, "KILLED", session="two", at=1_000 + 4 * hour)
    deliver_all(courier)
    tags = only_run(uri, "sessions").data.tags
    assert only_run(uri, "sessions").info.status == "KILLED" and tags["ird.exit"] == "killed"
    # The first lasted until its last event: an hour of eight devices; the second two hours of two.
    assert float(tags["ird.hours"]) == 3 and float(tags["ird.gpu_hours"]) == 12 and tags["ird.starts"] == "2"


def test_a_parent_that_is_made_later_is_named_then(uri: str, tmp_path: Path) -> None:
    child, parent = Spool(tmp_path / "child"), Spool(tmp_path / "parent")
    start(child, "family", parent="ird-family-parent")
    courier = Courier(child, uri)
    deliver_all(courier)
    client = connect(TrackingConfig(uri=uri))
    experiment = experiment_id(client, TrackingConfig(uri=uri, experiment="family"))
    made = client.create_run(experiment, 500, {"ird.run_key": "ird-family-parent"}, "parent")
    end(child)
    deliver_all(courier)
    run = client.get_run(child.delivery().run_id)
    assert run.data.tags["mlflow.parentRunId"] == made.info.run_id and not parent.path.exists()


def test_thousands_of_points_go_in_few_requests(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path / "many")
    start(spool, "many")
    for step in range(1, 501):
        append(spool, line_of(1_000 + step, "metrics", {f"m{n}": float(n) for n in range(5)}, step))
    append(spool, line_of(2_000, "params", {f"p{n}": "x" for n in range(250)}))
    courier = Courier(spool, uri)
    courier.deliver()
    sizes: list[int] = []
    log = courier._client.log_batch

    def counted(run_id: str, metrics: Any, params: Any, tags: Any) -> None:
        sizes.append(len(metrics) + len(params))
        log(run_id, metrics, params, tags)

    monkeypatch.setattr(courier._client, "log_batch", counted)
    deliver_all(courier)
    assert sum(sizes) == 2750 and max(sizes) <= 1000 and len(sizes) <= 6
    run = only_run(uri, "many")
    assert len(run.data.params) == 250 and len(points(uri, run.info.run_id, "m4")) == 500


def test_tries_are_further_and_further_apart_and_never_at_once() -> None:
    waits = [[backoff(failures) for _ in range(50)] for failures in range(12)]
    longest = [max(some) for some in waits]
    assert longest[0] < longest[2] < longest[4] <= 30 and max(longest) <= 30
    assert all(len(set(some)) == 50 for some in waits)
