"""The loop under the real ``deepspeed`` launcher: exact against plain torch, exact on resume, clear on refusal."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from torch.nn import functional

from datagen.degradations import load_recipe
from infra.config import load_config
from infra.launcher import end_session, free_port, session_processes
from tests.support.dataset import REPOSITORY
from training.checkpoint import load_checkpoint
from training.corruption import degrade_by_recipe
from training.cotraining import variants_of_step
from training.data.handover import handover
from training.data.loader import make_loader
from training.data.plan import StreamState
from training.data.shards import ShardReader
from training.entry import run_from_command_line
from training.export import load_export
from training.models import build_model
from training.optimization import MovingAverage, learning_rate, make_optimizer, set_learning_rate
from training.pretrain import PretrainConfig, pretrain

CONFIG = REPOSITORY / "configs/training/pretrain_demo.yaml"
SMALL = ["model.dim=8", "data.patch=16", "data.batch=4", "data.crops_per_sample=2", "steps=6", "log_every=2"]
QUIET = ["tracking.enabled=false"]
STEADY = ["schedule.kind=constant", "checkpoint_every=1", "log_every=1"]


def overrides(dataset: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL, *QUIET, f"data.dataset={dataset}", f"out={out}", *more]


def command(settings: list[str], ranks: int) -> list[str]:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launch = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*launch, "--module", "training.pretrain", "--config", str(CONFIG), *settings]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def launch(settings: list[str], ranks: int) -> subprocess.CompletedProcess[str]:
    return run(command(settings, ranks))


def without_launcher(settings: list[str]) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "training.pretrain", "--config", str(CONFIG), *settings])


_started: list[int] = []


@pytest.fixture(autouse=True)
def nothing_goes_on_training() -> Iterator[None]:
    """Whatever became of a test: its ranks would take the cores from all that come after."""
    yield
    while _started:
        end_session(_started.pop(), patience=5)


def start(settings: list[str], log: Path, until: Path) -> subprocess.Popen[bytes]:
    """Start two ranks in a session of their own, and come back when ``until`` is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as said:
        process = subprocess.Popen(
            command(settings, 2), cwd=REPOSITORY, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    _started.append(process.pid)
    deadline = time.monotonic() + 200
    while not until.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return process


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The training processes below a launcher, without the launcher's own."""
    members = [(p, p.cmdline()) for p in session_processes(process.pid)]
    return [p for p, line in members if "training.pretrain" in line and not any("deepspeed" in part for part in line)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(out / "checkpoints")
    assert saved is not None
    return saved[0]["model"]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def plain_torch(settings: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same run written straight down, without launcher, engine or checkpoints: weights and their average."""
    config = load_config(PretrainConfig, CONFIG, settings)
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    reader = ShardReader(config.data.dataset)
    model = build_model(config.model)
    optimizer = make_optimizer(model, config.optimizer)
    average = MovingAverage(model, config.ema_decay)
    state = StreamState(reader.dataset_id, config.seed, 0)
    corrupt = partial(degrade_by_recipe, load_recipe(config.recipe))
    take = handover(torch.device("cpu"), corrupt=corrupt, seed=config.seed)
    loader = make_loader(reader, config.data, state=state, steps=config.steps, corrupt=corrupt)
    for step, batch in enumerate(map(take, loader)):
        set_learning_rate(optimizer, learning_rate(step, config.steps, config.optimizer.lr, config.schedule))
        optimizer.zero_grad()
        losses = [
            functional.l1_loss(model(batch["degraded"], variant=variant), batch["clean"])
            for variant in variants_of_step(config.cotraining, config.seed, step)
        ]
        torch.stack(losses).sum().backward()
        if config.optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        optimizer.step()
        average.update(model)
    return model.state_dict(), average.weights


def assert_equals_plain_torch(out: Path, settings: list[str]) -> None:
    """SGD-like exactness is asked of the weights after six Adam steps, so the tolerance is Adam's, not the gradient's:
    where a gradient is nearly zero, its rounding decides Adam's sign, and a step is up to the learning rate."""
    reference, average = plain_torch(settings)
    trained = weights(out)
    differences = torch.cat([(trained[n] - reference[n]).abs().flatten() for n in reference])
    assert float(differences.mean()) < 1e-6
    assert float((differences > 1e-5).float().mean()) < 1e-3
    exported, _, _ = load_export(out / "export")
    exported_weights = dict(exported.named_parameters())
    assert torch.cat([(exported_weights[n] - average[n]).abs().flatten() for n in average]).mean() < 1e-6


@pytest.fixture(scope="module")
def whole(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder and the settings of a run that nothing disturbed. For reading only."""
    out = tmp_path_factory.mktemp("whole")
    settings = overrides(small_dataset, out, *STEADY, "cotraining.mode=alternate")
    done = launch(settings, ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, settings


@pytest.mark.slow
def test_two_ranks_equal_plain_torch(whole: tuple[Path, list[str]], small_dataset: Path) -> None:
    assert_equals_plain_torch(*whole)
    _, _, metadata = load_export(whole[0] / "export")
    assert metadata["dataset_id"] == ShardReader(str(small_dataset)).dataset_id


@pytest.mark.slow
def test_two_ranks_of_all_variants_at_once_with_clipping_equal_plain_torch(small_dataset: Path, tmp_path: Path) -> None:
    more = ["cotraining.mode=sandwich", "optimizer.gradient_clipping=0.05"]
    settings = overrides(small_dataset, tmp_path / "out", *more)
    result = launch(settings, ranks=2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert_equals_plain_torch(tmp_path / "out", settings)


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_gives_the_same_weights(
    whole: tuple[Path, list[str]], tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    settings = [*whole[1], f"out={killed}"]
    process = start(settings, tmp_path / "log", until=killed / "checkpoints" / "latest")
    for member in list(session_processes(process.pid)):
        member.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (killed / "finished.json").exists()
    again = launch(settings, ranks=2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming at step" in again.stdout
    assert largest_difference(weights(whole[0]), weights(killed)) == 0
    a, b = (load_export(out / "export")[0].state_dict() for out in (whole[0], killed))
    assert largest_difference(a, b) == 0


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_75_and_another_world_size_goes_on(small_dataset: Path, tmp_path: Path) -> None:
    settings = overrides(small_dataset, tmp_path / "out", "steps=400", "log_every=1", "schedule.kind=constant")
    process = start(settings, tmp_path / "log", until=tmp_path / "out" / "metrics.jsonl")
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGTERM)
    code = process.wait(60)
    assert code == 75, (tmp_path / "log").read_text()
    saved = load_checkpoint(tmp_path / "out" / "checkpoints")
    assert saved is not None
    stopped_at = saved[1]["step"]
    assert 0 < stopped_at < 400 and saved[1]["loader"]["samples_consumed"] == stopped_at * 2
    settings[settings.index("steps=400")] = f"steps={stopped_at + 2}"
    shorter = without_launcher(settings)
    assert shorter.returncode == 0, shorter.stdout + shorter.stderr
    assert f"resuming at step {stopped_at}" in shorter.stdout


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["deepspeed alone", "deepspeed and the node's launcher"])
def test_ranks_do_not_outlive_a_killed_launcher(small_dataset: Path, tmp_path: Path, killed: str) -> None:
    settings = overrides(small_dataset, tmp_path / "out", "steps=100000", "log_every=1")
    process = start(settings, tmp_path / "log", until=tmp_path / "out" / "metrics.jsonl")
    ranks = ranks_of(process)
    launchers = set(session_processes(process.pid)) - set(ranks)
    for launcher in [process] if killed == "deepspeed alone" else launchers:
        launcher.send_signal(signal.SIGKILL)
    process.wait(60)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for orphan in alive:
        orphan.kill()
    assert alive == []
    assert load_checkpoint(tmp_path / "out" / "checkpoints") is not None  # they saved before they went
    assert not (tmp_path / "out" / "finished.json").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["model.dimm=8"], "did you mean 'dim'"),
        (["cotraining.variants=[small, huge]"], "'huge'"),
        (["recipe=dynet_pretrian"], "dynet_pretrain"),
    ],
)
def test_bad_configuration_is_refused_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    expected: str,
) -> None:
    arguments = ["--config", str(CONFIG), *overrides(tmp_path / "dataset", tmp_path / "out", *more)]
    monkeypatch.setattr(sys, "argv", ["pretrain", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_from_command_line("training.pretrain", None, PretrainConfig, pretrain)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and expected in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_folder_with_another_run_is_refused(whole: tuple[Path, list[str]]) -> None:
    out, settings = whole
    other = without_launcher([*settings, "optimizer.lr=0.5"])
    assert other.returncode == 2 and "another configuration (changed: optimizer" in other.stderr
    assert "Traceback" not in other.stderr
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in history] == list(range(1, 7)) and history[0]["loss"] > 0


@pytest.mark.slow
def test_a_finished_run_is_not_done_again(whole: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(load_config(PretrainConfig, CONFIG, whole[1])) == 0
    assert "already finished" in capsys.readouterr().out
