"""The loop under the real ``deepspeed`` launcher: exact against plain torch, exact on resume, clear on refusal."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.nn import functional

from datagen.degradations import degrade, load_recipe
from datagen.picture.region import decode_whole
from datagen.source.embedded import materialise
from infra.config import load_config
from infra.launcher import end_session, free_port, session_processes
from infra.storage import open_store
from tests.support.dataset import REPOSITORY
from training.checkpoint import load_checkpoint
from training.corruption import degrade_by_recipe
from training.cotraining import teacher_share, variants_of_step
from training.data.handover import handover
from training.data.loader import make_loader
from training.data.plan import StreamState
from training.data.shards import ShardReader
from training.entry import run_from_command_line
from training.evaluate import read_pictures, to_picture
from training.export import load_export
from training.metrics import compare
from training.models import build_model
from training.optimization import MovingAverage, learning_rate, make_optimizer, set_learning_rate
from training.pretrain import PretrainConfig, pretrain

CONFIG = REPOSITORY / "configs/training/pretrain_demo.yaml"
SMALL = ["model.dim=8", "data.patch=16", "data.batch=4", "data.crops_per_sample=1", "steps=6", "log_every=2"]
QUIET = ["tracking.enabled=false", "checkpoint_every=1000"]
# Where a gradient is nearly zero its rounding decides the sign of Adam's step, whatever its size; a larger epsilon
# makes the step follow the gradient there, so that weights can be compared to the last digits.
EXACT = ["optimizer.eps=0.001", "schedule.kind=constant"]

# Every mode of the loop, some together, each against the same run written straight down in plain torch.
MODES = {
    "alternate": ["cotraining.mode=alternate"],
    "sandwich, clipping, stage 1": ["cotraining.mode=sandwich", "optimizer.gradient_clipping=0.05", "zero_stage=1"],
    "distill, accumulation, stage 2": [
        *("cotraining.mode=distill", "cotraining.teacher_from=0.2", "cotraining.teacher_share=1.0"),
        *("accumulate=2", "zero_stage=2", "steps=4"),
    ],
    "random depth, growing patches": [
        "cotraining.mode=random_depth",
        "data.progressive=[{from_step: 2, patch: 24, batch: 2}]",
    ],
    "moments of each variant": ["cotraining.separate_moments=true", "optimizer.name=adamw"],
    "per-variant gains, separate": ["cotraining.mode=separate", "model.variant_gains=true", "steps=3"],
    "cosine": ["schedule.kind=cosine", "optimizer.name=adamw", "optimizer.weight_decay=0.1", "zero_stage=1"],
}
POISONED = [3, 1]  # step, rank
VALIDATED = ["every=3", "crop=24", "limit=3", "grid=1", "recipe=study_tasks"]


def overrides(dataset: Path, out: Path, *more: str) -> list[str]:
    return [*SMALL, *QUIET, f"data.dataset={dataset}", f"out={out}", *more]


def under_launcher(ranks: int, module: str, *arguments: str) -> list[str]:
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    launch = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return [*launch, "--module", module, *arguments]


def command(settings: list[str], ranks: int) -> list[str]:
    return under_launcher(ranks, "training.pretrain", "--config", str(CONFIG), *settings)


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=500)


def launch(settings: list[str], ranks: int) -> subprocess.CompletedProcess[str]:
    return run(command(settings, ranks))


def without_launcher(settings: list[str]) -> subprocess.CompletedProcess[str]:
    return run([sys.executable, "-m", "training.pretrain", "--config", str(CONFIG), *settings])


def launch_all(runs: Sequence[dict[str, Any]], folder: Path) -> list[Any]:
    """Runs one after the other on two ranks; what became of each: its exit code, or why it was refused."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "runs.json").write_text(json.dumps([{"config": str(CONFIG), **one} for one in runs]))
    done = run(under_launcher(2, "tests.training.scenarios", str(folder / "runs.json")))
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = [json.loads((folder / f"outcomes-{rank}.json").read_text()) for rank in range(2)]
    assert outcomes[0] == outcomes[1]
    return list(outcomes[0])


_started: list[int] = []


@pytest.fixture(autouse=True)
def nothing_goes_on_training() -> Iterator[None]:
    """Whatever became of a test: its ranks would take the cores from all that come after."""
    yield
    while _started:
        end_session(_started.pop(), patience=5)


def start(settings: list[str], log: Path, until: Callable[[], bool]) -> subprocess.Popen[bytes]:
    """Start two ranks in a session of their own, and come back when ``until`` says so."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(log, "wb") as said:
        process = subprocess.Popen(
            command(settings, 2), cwd=REPOSITORY, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    _started.append(process.pid)
    deadline = time.monotonic() + 300
    while not until():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return process


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The training processes below a launcher, without the launcher's own."""
    members = [(p, p.cmdline()) for p in session_processes(process.pid)]
    return [p for p, line in members if "training.pretrain" in line and not any("deepspeed" in part for part in line)]


def last_checkpoint(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    saved = load_checkpoint(open_store(out / "checkpoints"))
    assert saved is not None
    return saved


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def plain_torch(
    settings: list[str], left_out: Sequence[int] = ()
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same run written straight down, without launcher, engine or checkpoints: weights and their average."""
    config = load_config(PretrainConfig, CONFIG, settings)
    torch.manual_seed(config.seed)
    torch.set_num_threads(1)
    reader = ShardReader(config.data.dataset)
    model = build_model(config.model)
    optimizers = {name: make_optimizer(model, config.optimizer) for name in ("", *config.cotraining.variants)}
    average = MovingAverage(model, config.ema_decay)
    state = StreamState(reader.dataset_id, config.seed, 0)
    corrupt = partial(degrade_by_recipe, load_recipe(config.recipe))
    take = handover(torch.device("cpu"), corrupt=corrupt, seed=config.seed)
    loader = make_loader(reader, config.data, state=state, steps=config.steps, corrupt=corrupt)
    for step, batch in enumerate(map(take, loader)):
        variants = variants_of_step(config.cotraining, config.model, config.seed, step)
        optimizer = optimizers[str(variants[0]) if config.cotraining.separate_moments else ""]
        set_learning_rate(optimizer, learning_rate(step, config.steps, config.optimizer.lr, config.schedule))
        optimizer.zero_grad()
        # In as many parts as two ranks make of it: feature maps of a few pixels amplify the rounding of other kernels.
        parts = 2 * config.accumulate
        for degraded, clean in zip(batch["degraded"].chunk(parts), batch["clean"].chunk(parts)):
            total = torch.zeros(())
            for variant in variants:
                target = clean
                share = teacher_share(config.cotraining, step / config.steps)
                if share and variant != variants[-1]:
                    with torch.no_grad():
                        taught = torch.func.functional_call(model, average.weights, (degraded, variants[-1]))
                    target = (1 - share) * target + share * taught
                total = total + functional.l1_loss(model(degraded, variant=variant), target)
            (total / parts).backward()
        if config.optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clipping)
        if step not in left_out:
            optimizer.step()
        average.update(model)
    return model.state_dict(), average.weights


@pytest.fixture(scope="module")
def runs(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str], Any]]:
    """Folder, settings and outcome of two-rank runs that nothing disturbed, by name. For reading only."""
    root = tmp_path_factory.mktemp("runs")
    settings = {name: overrides(small_dataset, root / name, *EXACT, *more) for name, more in MODES.items()}
    materialise(root / "corpus")
    settings["cosine"] += [f"validation.{one}" for one in (f"pictures={root / 'corpus' / 'held_out'}", *VALIDATED)]
    settings["poisoned"] = overrides(small_dataset, root / "poisoned", *EXACT)
    settings["diverging"] = overrides(
        small_dataset, root / "diverging", "optimizer.lr=1.0e+12", "guard.patience=3", "steps=40"
    )
    settings["first steps"] = overrides(small_dataset, root / "elastic", *EXACT, "steps=2", "zero_stage=1")
    poison = {"poisoned": POISONED}
    outcomes = launch_all([{"settings": s, "poison": poison.get(name)} for name, s in settings.items()], root / "all")
    return {
        name: (root / ("elastic" if name == "first steps" else name), s, outcome)
        for (name, s), outcome in zip(settings.items(), outcomes)
    }


Runs = dict[str, tuple[Path, list[str], Any]]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_equal_plain_torch(runs: Runs, mode: str) -> None:
    out, settings, outcome = runs[mode]
    assert outcome == 0
    reference, average = plain_torch(settings)
    assert largest_difference(last_checkpoint(out)[0]["model"], reference) < 1e-6
    exported = dict(load_export(out / "export")[0].named_parameters())
    assert largest_difference({name: exported[name].detach() for name in average}, average) < 1e-6


@pytest.mark.slow
def test_the_export_names_its_dataset(runs: Runs, small_dataset: Path) -> None:
    _, _, metadata = load_export(runs["alternate"][0] / "export")
    assert metadata["dataset_id"] == ShardReader(str(small_dataset)).dataset_id


@pytest.mark.slow
def test_held_out_pictures_are_measured_and_the_best_of_each_variant_is_kept(runs: Runs) -> None:
    out = runs["cosine"][0]
    lines = [json.loads(line) for line in (out / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6] and lines[1]["device_hours"] > lines[0]["device_hours"] > 0
    recipe = load_recipe("study_tasks")
    labels = [chain.label for chain in recipe.chains]
    assert {name: list(tasks) for name, tasks in lines[0]["psnr"].items()} == {"small": labels, "large": labels}
    pictures = dict(list(read_pictures(out.parent / "corpus" / "held_out", 24).items())[:3])
    for variant in ("small", "large"):
        means = [sum(line["psnr"][variant].values()) / len(labels) for line in lines]
        best, _, facts = load_export(out / "best" / variant)
        assert facts["step"] == lines[means.index(max(means))]["step"]
        alone = recipe.model_copy(update={"chains": [recipe.chains[1]]})
        found = []
        for name, clean in pictures.items():
            degraded, _ = degrade(clean, alone, seed=1, epoch=0, keys=[name])
            with torch.no_grad():
                found.append(compare(to_picture(best(degraded, variant)), to_picture(clean))["psnr"])
        assert sum(found) / 3 == pytest.approx(facts["psnr"][labels[1]], abs=1e-3)
    grid = decode_whole((out / "validation" / "step-00000006.png").read_bytes())
    assert grid.shape == (4 * 24, 4 * 24, 3)  # tasks x (degraded, small, large, clean)


@pytest.mark.slow
def test_a_loss_that_is_no_number_on_one_rank_leaves_the_step_out_on_all(runs: Runs) -> None:
    out, settings, outcome = runs["poisoned"]
    assert outcome == 0
    reference, _ = plain_torch(settings, left_out=[POISONED[0]])
    state, _ = last_checkpoint(out)
    assert largest_difference(state["model"], reference) < 1e-6
    assert state["guard"]["skipped"] == 1 and json.loads((out / "finished.json").read_text())["steps_skipped"] == 1
    for rank in range(2):
        shown = out / "bad" / f"step-{POISONED[0]:08d}-rank{rank}"
        assert {"0-clean.png", "0-degraded.png", "meta.json"} <= {path.name for path in shown.iterdir()}
        assert json.loads((shown / "meta.json").read_text())[0]["recipe"] == "dynet_pretrain"


@pytest.mark.slow
def test_a_run_that_diverges_stops_and_says_where_its_batches_are(runs: Runs) -> None:
    out, _, outcome = runs["diverging"]
    assert "3 steps in a row" in outcome and str(out / "bad") in outcome
    assert len(list((out / "bad").iterdir())) == 3 * 2 and not (out / "finished.json").exists()


@pytest.mark.slow
def test_another_number_of_ranks_and_another_zero_stage_take_up_the_run(runs: Runs, tmp_path: Path) -> None:
    """Two ranks (stage 1), then one in two parts (stage 0), then two again (stage 2), as one undisturbed run."""
    out, settings, outcome = runs["first steps"]
    assert outcome == 0
    once = without_launcher([*settings, "steps=4", "zero_stage=0", "accumulate=2"])
    assert once.returncode == 0 and "resuming at step 2" in once.stdout, once.stdout + once.stderr
    again = launch([*settings, "steps=6", "zero_stage=2"], ranks=2)
    assert again.returncode == 0 and "resuming at step 4" in again.stdout, again.stdout + again.stderr
    whole, _ = last_checkpoint(runs["alternate"][0])
    elastic, manifest = last_checkpoint(out)
    assert manifest["step"] == 6
    assert largest_difference(whole["model"], elastic["model"]) < 1e-6
    assert largest_difference(whole["average"]["weights"], elastic["average"]["weights"]) < 1e-6
    for name, moments in whole["optimizer"][""].items():
        assert largest_difference(moments, elastic["optimizer"][""][name]) < 1e-6


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_gives_the_same_weights(runs: Runs, tmp_path: Path) -> None:
    killed = tmp_path / "killed"
    settings = [*runs["alternate"][1], f"out={killed}", "checkpoint_every=1"]
    process = start(settings, tmp_path / "log", until=(killed / "checkpoints" / "latest").exists)
    for member in list(session_processes(process.pid)):
        member.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (killed / "finished.json").exists()
    again = launch(settings, ranks=2)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "resuming at step" in again.stdout
    whole, resumed = last_checkpoint(runs["alternate"][0])[0], last_checkpoint(killed)[0]
    assert largest_difference(whole["model"], resumed["model"]) == 0
    assert largest_difference(whole["average"]["weights"], resumed["average"]["weights"]) == 0
    for name, moments in whole["optimizer"][""].items():
        assert largest_difference(moments, resumed["optimizer"][""][name]) == 0
    a, b = (load_export(out / "export")[0].state_dict() for out in (runs["alternate"][0], killed))
    assert largest_difference(a, b) == 0


@pytest.mark.slow
def test_sigterm_saves_and_ends_with_75_and_a_single_rank_goes_on(small_dataset: Path, tmp_path: Path) -> None:
    settings = overrides(small_dataset, tmp_path / "out", "steps=400", "log_every=1", "schedule.kind=constant")
    process = start(settings, tmp_path / "log", until=(tmp_path / "out" / "metrics.jsonl").exists)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGTERM)
    code = process.wait(60)
    assert code == 75, (tmp_path / "log").read_text()
    stopped_at = last_checkpoint(tmp_path / "out")[1]["step"]
    loader = last_checkpoint(tmp_path / "out")[1]["loader"]
    assert 0 < stopped_at < 400 and loader["samples_consumed"] == stopped_at * 4
    settings[settings.index("steps=400")] = f"steps={stopped_at + 2}"
    shorter = without_launcher(settings)
    assert shorter.returncode == 0, shorter.stdout + shorter.stderr
    assert f"resuming at step {stopped_at}" in shorter.stdout


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["deepspeed alone", "deepspeed and the node's launcher"])
def test_ranks_do_not_outlive_a_killed_launcher(small_dataset: Path, tmp_path: Path, killed: str) -> None:
    settings = overrides(small_dataset, tmp_path / "out", "steps=100000", "log_every=1")
    process = start(settings, tmp_path / "log", until=(tmp_path / "out" / "metrics.jsonl").exists)
    ranks = ranks_of(process)
    launchers = set(session_processes(process.pid)) - set(ranks)
    for launcher in [process] if killed == "deepspeed alone" else launchers:
        launcher.send_signal(signal.SIGKILL)
    process.wait(60)
    _, alive = psutil.wait_procs(ranks, timeout=60)
    for orphan in alive:
        orphan.kill()
    assert alive == []
    last_checkpoint(tmp_path / "out")  # they saved before they went
    assert not (tmp_path / "out" / "finished.json").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["model.dimm=8"], "did you mean 'dim'"),
        (["cotraining.variants=[small, huge]"], "'huge'"),
        (["recipe=dynet_pretrian"], "dynet_pretrain"),
        (["zero_stage=3"], "gradient of an earlier step"),
        (["cotraining.separate_moments=true", "cotraining.mode=sandwich"], "one variant a step"),
        (["cotraining.mode=distill", "ema_decay=0.0"], "moving average"),
        (["data.progressive=[{from_step: 9, patch: 8, batch: 4}, {from_step: 3, patch: 8, batch: 4}]"], "must rise"),
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
def test_another_run_in_the_same_folder_is_refused_and_a_finished_one_is_not_done_again(runs: Runs) -> None:
    out, settings, _ = runs["alternate"]
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    other = without_launcher([*settings, "optimizer.lr=0.5"])
    assert other.returncode == 2 and "another configuration (changed: optimizer" in other.stderr
    assert "Traceback" not in other.stderr
    again = without_launcher(settings)
    assert again.returncode == 0 and "already finished" in again.stdout
    assert [point["step"] for point in history] == [2, 4, 6] and history[0]["loss"] > 0
    assert json.loads((out / "finished.json").read_text())["device_hours"] > 0
    parts = ("data_wait_ms", "forward_ms", "backward_ms", "optimizer_ms", "step_ms", "images_per_second")
    last = history[-1]
    assert all(last[name] > 0 for name in parts) and last["peak_memory_mib"] > 0
    assert last["step_ms"] > last["forward_ms"] + last["backward_ms"] + last["optimizer_ms"] + last["data_wait_ms"]
