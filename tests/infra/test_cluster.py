import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from infra.cluster import ClusterError, connect, launch_directory, map_tasks, node_memory


@pytest.fixture(scope="module")
def resources() -> Iterator[dict[str, float]]:
    with connect(num_cpus=2) as found:
        yield found


def square(number: int) -> int:
    return number * number


def thread_counts(_: int) -> tuple[str | None, str | None]:
    return os.environ.get("OMP_NUM_THREADS"), os.environ.get("OPENCV_FOR_THREADS_NUM")


def priority(_: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, 0)


def fail_at_three(number: int) -> int:
    if number == 3:
        raise FileNotFoundError("number three")
    return number


def die_once(marker: Path) -> str:
    if not marker.exists():
        marker.touch()
        os._exit(1)
    return marker.name


def die(_: int) -> None:
    os._exit(1)


def die_at_odd(number: int) -> int:
    if number % 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def hang(_: int) -> None:
    time.sleep(1000)


def memory(_: int) -> int:
    return node_memory()


def test_a_local_cluster_has_the_cores_asked_for_and_pins_threads(resources: dict[str, float]) -> None:
    assert resources["CPU"] == 2
    assert set(map_tasks(thread_counts, range(4))) == {("1", "1")}


def test_workers_have_the_priority_of_who_waits_for_them(resources: dict[str, float]) -> None:
    assert list(map_tasks(priority, [0])) == [os.getpriority(os.PRIO_PROCESS, 0)]


def test_every_item_is_run_once(resources: dict[str, float]) -> None:
    assert sorted(map_tasks(square, range(30))) == [number * number for number in range(30)]
    assert list(map_tasks(square, [])) == []


def test_items_are_taken_only_as_cores_come_free(resources: dict[str, float]) -> None:
    taken = []
    results = map_tasks(square, (taken.append(i) or i for i in range(1000)), in_flight_per_cpu=2)
    next(results)
    assert len(taken) <= 2 * 2
    results.close()


def test_an_exception_of_the_task_arrives_as_it_was_raised(resources: dict[str, float]) -> None:
    with pytest.raises(FileNotFoundError, match="number three"):
        list(map_tasks(fail_at_three, range(5)))


def test_a_task_whose_worker_died_is_run_again(resources: dict[str, float], tmp_path: Path) -> None:
    assert list(map_tasks(die_once, [tmp_path / "marker"])) == ["marker"]


def test_a_task_that_always_kills_its_worker_is_given_up(resources: dict[str, float]) -> None:
    with pytest.raises(ClusterError, match="died 2 times"):
        list(map_tasks(die, [0], retries=1))


def test_what_on_death_gives_is_run_instead(resources: dict[str, float]) -> None:
    told = []

    def step_aside(number: int, why: str) -> list[int]:
        told.append((number, why))
        return [number - 1, number + 1] if number == 5 else []

    assert sorted(map_tasks(die_at_odd, [2, 5, 7, 8], retries=0, on_death=step_aside)) == [2, 4, 6, 8]
    assert sorted(number for number, _ in told) == [5, 7]
    assert all("died unexpectedly" in why for _, why in told)


class Told(BaseException):
    """What a signal handler raises."""


def test_a_signal_ends_the_wait_for_a_task_that_hangs(resources: dict[str, float]) -> None:
    def handler(*_: object) -> None:
        raise Told

    before = signal.signal(signal.SIGUSR1, handler)
    messenger = threading.Timer(2, os.kill, (os.getpid(), signal.SIGUSR1))
    messenger.start()
    try:
        with pytest.raises(Told):
            list(map_tasks(hang, [0]))
    finally:
        messenger.join(10)
        signal.signal(signal.SIGUSR1, before)


def test_every_task_has_its_tries_to_itself(resources: dict[str, float], tmp_path: Path) -> None:
    markers = [tmp_path / name for name in "abc"]
    assert sorted(map_tasks(die_once, markers, retries=1)) == ["a", "b", "c"]


def test_a_node_tells_the_memory_that_ray_offers(resources: dict[str, float]) -> None:
    assert list(map_tasks(memory, [0])) == [int(resources["memory"])]


def test_a_connection_that_is_there_is_used_and_left_open(resources: dict[str, float]) -> None:
    with connect(num_cpus=7) as found:
        assert found["CPU"] == 2
    assert ray.is_initialized()


SQUARES = """
import sys
sys.path.insert(0, {root!r})
from infra.cluster import connect, map_tasks
from tests.infra.test_cluster import square, thread_counts
with connect() as resources:
    print(resources["CPU"], sorted(map_tasks(square, range(3))), set(map_tasks(thread_counts, [0])))
"""


def test_ray_address_is_joined_and_not_shut_down(resources: dict[str, float]) -> None:
    address = ray.get_runtime_context().gcs_address
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", SQUARES.format(root=root)],
        env={**os.environ, "RAY_ADDRESS": address, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "2.0 [0, 1, 4] {('1', '1')}", done.stderr
    assert list(map_tasks(square, [5])) == [25]


LOST_NODE = """
import os, pathlib, sys, threading, time
import ray
from ray.cluster_utils import Cluster
from infra.cluster import map_tasks

size = {"object_store_memory": 80 * 1024**2}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **size})
doomed = cluster.add_node(num_cpus=1, **size)
ray.init(address=cluster.address, log_to_driver=False)
cluster.wait_for_nodes()
started = pathlib.Path(sys.argv[1])

def task(number):
    here = ray.get_runtime_context().get_node_id()
    (started / here).touch()
    # Until the doomed node has a task, both wait; then its task never ends by itself.
    while not (started / doomed_id).exists():
        time.sleep(0.05)
    while here == doomed_id:
        time.sleep(0.05)
    return number

doomed_id = doomed.node_id
def lose():
    while not (started / doomed_id).exists():
        time.sleep(0.05)
    cluster.remove_node(doomed, allow_graceful=False)
threading.Thread(target=lose).start()
print(sorted(map_tasks(task, range(3), retries=0)), flush=True)
ray.shutdown()
cluster.shutdown()
"""


def test_a_lost_node_costs_no_tries(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", LOST_NODE, str(tmp_path)],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert "[0, 1, 2]" in done.stdout, done.stderr


def test_no_token_is_left_in_the_home_folder(tmp_path: Path) -> None:
    code = "from infra.cluster import connect\nimport os\nwith connect(1): pass\nprint(os.environ.get('RAY_AUTH_MODE'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "None", done.stderr
    assert not (tmp_path / ".ray").exists()


def test_relative_paths_hold_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert launch_directory() == tmp_path


def launched_from(folder: Path) -> str:
    # What the driver of a Ray job sees: a copy of the working directory, below a raylet.
    copy = folder / "runtime_resources" / "working_dir_files"
    copy.mkdir(parents=True)
    os.chdir(copy)
    return str(launch_directory())


def test_in_a_jobs_copy_relative_paths_hold_from_where_ray_was_started(
    resources: dict[str, float], tmp_path: Path
) -> None:
    assert list(map_tasks(launched_from, [tmp_path])) == [str(Path.cwd())]
