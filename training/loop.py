"""The one training loop: every stage gives it a configuration, a corruption and an objective."""

import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from infra.config import ConfigError, config_hash, dump_config
from infra.files import write_atomically
from infra.launcher import MARKER, PROGRESS, read_marker
from infra.storage import Store, open_store
from infra.tracking import HostMetrics, Tracker
from training.agreement import from_main, state_from_main
from training.checkpoint import CheckpointWriter, Keep, load_checkpoint
from training.config import StageConfig
from training.corruption import Corruption
from training.data.handover import handover
from training.data.loader import batch_plan, make_loader
from training.data.lost import LostSamples
from training.data.plan import StreamState
from training.data.shards import ShardReader
from training.distributed import PREEMPTED, Ranks, StopRequest, join
from training.engine import make_engine
from training.evaluate import write_picture
from training.export import load_export, save_export
from training.guard import Guard
from training.learner import Learner, Objective
from training.meter import Meter, progress_line
from training.models import build_model, compile_blocks
from training.optimization import MovingAverage, learning_rate, set_learning_rate
from training.state import TrainingState
from training.validation import Scores, Task, Validator, flat, record

# Changing these in the middle of a run does not change what it computes, or only its rounding.
_FREE_TO_CHANGE = {"out", "log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "checkpoints", "tracking"}
_FREE_TO_CHANGE |= {"accumulate", "zero_stage", "compile", "validation", "guard", "model.checkpoint_levels"}
_FREE_TO_CHANGE |= {f"data.{key}" for key in ("dataset", "workers", "fetch", "cache", "cache_gib", "on_damage")}


def run_stage(
    stage: str,
    config: StageConfig,
    objective: Objective,
    corrupt: Corruption | None,
    export_facts: Mapping[str, Any] | None = None,
    *,
    tasks: Sequence[Task] = (),
    moments: tuple[Sequence[str], Callable[[int], str]] = (("",), lambda step: ""),
) -> int:
    """Train ``config.steps`` steps, resuming from the checkpoints if there are any; return an exit code.

    Each step is a pure function of the weights, the optimizer state and the step number: data, crops,
    degradations and variants are drawn from keys, and what draws from torch's global generator all the same finds it
    seeded by step and rank. A killed run that is started again therefore reaches the same weights, bit for bit, at
    the same world size; at another one, or with another ``zero_stage`` or ``accumulate``, up to rounding.

    Only rank 0 reads and writes ``out``, its checkpoints and ``init_from``: nodes need to share the dataset alone, and
    the pictures of ``config.validation``.

    Args:
        export_facts: what users of the export must know beyond its model's config.
        tasks: what ``config.validation`` measures.
        moments: the names of the sets of Adam's moments, and which of them a step uses.

    Returns:
        0 when finished (``out``/finished.json and ``out``/export are there), 75 when a signal asked to
        stop and a checkpoint was saved.

    Raises:
        ConfigError: ``out`` holds a run of another configuration, or the dataset is missing or another one.
        Diverged: too many steps in a row had to be left out.
    """
    out = Path(config.out)
    ranks = join()
    if from_main(lambda: (read_marker(out) or {}).get("config_hash")) == config_hash(config):
        if ranks.is_main:
            _say(f"{stage}: already finished, see {out / MARKER}")
        return 0
    torch.manual_seed(config.seed)
    data, device = config.data, ranks.device
    reader = ShardReader(data.dataset, data.cache, data.cache_gib, data.fetch, on_damage=data.on_damage)
    plan = batch_plan(data, ranks.world_size, config.accumulate)
    validator = Validator(config.validation, tasks, config.seed, device) if config.validation.pictures else None
    model = build_model(config.model)
    from_main(lambda: _start_from(model, config.init_from))  # the engine sends the weights of rank 0 to all
    if config.compile:
        compile_blocks(model)
    engine = make_engine(model, config, ranks)
    average = MovingAverage(engine.module, config.ema_decay) if config.ema_decay else None
    guard = Guard(config.guard, engine, out, device)
    state = TrainingState(engine, average, guard, moments[0])

    store = open_store(config.checkpoints or out / "checkpoints")
    found: list[dict[str, Any]] = []
    manifest = from_main(lambda: _last_checkpoint(store, config, found))
    if manifest is not None:
        state.restore(state_from_main(found.pop() if found else None, device))
    first_step = manifest["step"] if manifest else 0
    loader_state = StreamState(**manifest["loader"]) if manifest else StreamState(reader.dataset_id, config.seed, 0)
    loader = make_loader(
        reader,
        data,
        state=loader_state,
        steps=config.steps,
        corrupt=corrupt,
        rank=ranks.rank,
        world_size=ranks.world_size,
        accumulate=config.accumulate,
    )
    lost = LostSamples(out, ranks.rank, manifest["samples_lost"] if manifest else 0)
    run = _Run(stage, config, ranks, state, reader.dataset_id, lost, store, dict(export_facts or {}))
    run.begin(first_step)
    take = handover(device, corrupt=corrupt, seed=config.seed, channels_last=data.channels_last)
    learner = Learner(engine, average, config.precision == "bf16")
    stop = StopRequest(device)
    meter, batches = run.meter, iter(loader)
    engine.train()
    gc.collect()
    gc.freeze()  # what is here stays: the collector need not look at it again and again
    ranks.watchdog.beat()
    try:
        for step in range(first_step, config.steps):
            torch.manual_seed(config.seed + step * ranks.world_size + ranks.rank)
            rate = learning_rate(step, config.steps, config.optimizer.lr, config.schedule)
            set_learning_rate(engine.optimizer, rate)
            state.use_moments(moments[1](step))
            for _ in range(config.accumulate):
                with meter.part("data_wait"):
                    batch = next(batches)
                lost.add(batch["lost"])
                batch = take(batch)
                with meter.part("forward"):
                    loss, metrics = objective(learner, batch, step)
                guard.look_at("+".join(metrics), loss)
                with meter.part("backward"):
                    engine.backward(loss)
                with meter.part("optimizer"):
                    engine.step()
                meter.add(metrics)
            if average is not None:
                average.update(engine.module)
            guard.after_step(step, batch)
            ranks.watchdog.beat()
            phase, done = plan.phase_of(step), step + 1
            meter.stepped(phase.samples * data.crops_per_sample)
            last = done == config.steps
            if done % config.log_every == 0 or last:
                run.log(done, {"lr": rate, "patch": phase.patch})
            if validator is not None and (done % config.validation.every == 0 or last):
                with ranks.watchdog.paused():
                    run.validate(done, validator)
            stopping = stop.agreed() and not last
            if stopping or last or done % config.checkpoint_every == 0:
                with ranks.watchdog.paused():
                    run.checkpoint(done, plan.samples_before(done))
            if stopping:
                run.writer.finish()
                run.end(
                    "KILLED", "preempted", f"stopped by a signal at step {done}, saved; run the same command to go on"
                )
                return PREEMPTED
        run.writer.finish()
        run.export()
    except BaseException as error:
        run.end("FAILED", f"failed: {type(error).__name__}: {error}")
        raise
    return 0


def _start_from(model: torch.nn.Module, export: str) -> None:
    if export:
        start, _, _ = load_export(Path(export))
        # Gains that the export has not got stay what they are at first, 1: the network is then the export's.
        gains = {name: weight for name, weight in model.state_dict().items() if name.startswith("gains.")}
        model.load_state_dict(gains | start.state_dict())


def _last_checkpoint(store: Store, config: StageConfig, found: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Manifest of the checkpoint to go on from, None for a new run; its state is put into ``found``."""
    loaded = load_checkpoint(store)
    if loaded is None:
        return None
    _refuse_other_config(store.uri, loaded[1]["config"], config)
    found.append(loaded[0])
    return loaded[1]


class _Run:
    """What a run tells and leaves: log lines, metrics, measurements, checkpoints, the export, the finished marker."""

    def __init__(
        self,
        stage: str,
        config: StageConfig,
        ranks: Ranks,
        state: TrainingState,
        dataset_id: str,
        lost: LostSamples,
        store: Store,
        export_facts: Mapping[str, Any],
    ) -> None:
        self._stage, self._config, self._ranks, self._state = stage, config, ranks, state
        self._dataset_id, self._lost, self._export_facts = dataset_id, lost, export_facts
        self._out = Path(config.out)
        self._samples_lost = 0
        self.meter = Meter(ranks.device, state.spent)
        self.writer = CheckpointWriter(store, Keep(config.keep_checkpoints, config.keep_every))

    def begin(self, first_step: int) -> None:
        """Open the run's folder and its record."""
        config, ranks = self._config, self._ranks
        self._first_step, self._started = first_step, time.perf_counter()
        if ranks.is_main:
            self._out.mkdir(parents=True, exist_ok=True)
        gpus = ranks.world_size if ranks.device.type == "cuda" else 0
        self._tracker = Tracker(config.tracking, self._stage, self._out, is_main=ranks.is_main, gpus=gpus)
        if os.environ["LOCAL_RANK"] == "0":
            HostMetrics(config.tracking, self._out)
        hosts: list[Any] = [None] * ranks.world_size
        dist.all_gather_object(hosts, platform.node())
        self._facts = {
            "stage": self._stage,
            "config": config.model_dump(mode="json"),
            "config_hash": config_hash(config),
            "code": code_version(),
            "dataset_id": self._dataset_id,
        }
        if not ranks.is_main:
            return
        (self._out / MARKER).unlink(missing_ok=True)  # of a shorter run: it must not speak for this one
        size = f"{_size(self._state.engine.module)} on {ranks.world_size} rank(s)"
        self._say(f"resuming at step {first_step}" if first_step else size)
        dump_config(config, self._out / "config.yaml")
        self._tracker.log_params(config.model_dump(mode="json", exclude={"tracking"}))
        tags: dict[str, Any] = {name: self._facts[name] for name in ("stage", "dataset_id", "config_hash", "code")}
        tags |= {"ranks": ranks.world_size, "hosts": ", ".join(sorted(set(hosts)))}
        self._tracker.set_tags({f"ird.{name}": value for name, value in tags.items()})

    def log(self, done: int, facts: Mapping[str, float]) -> None:
        """Say and record what the meter has gathered. A collective."""
        logged = {**self.meter.read(), **facts, "steps_skipped": float(self._state.guard.skipped)}
        if self._config.data.on_damage == "skip":
            logged["samples_lost"] = float(self._lost.total(self._ranks.device))
        if self._ranks.is_main:
            seconds = (time.perf_counter() - self._started) / (done - self._first_step)
            print(PROGRESS + progress_line(self._stage, done, self._config.steps, seconds, logged), flush=True)
            with open(self._out / "metrics.jsonl", "a") as history:
                history.write(json.dumps({"step": done, **logged}) + "\n")
            with self.meter.part("tracking"):
                self._tracker.log_metrics(logged, done)

    def validate(self, done: int, validator: Validator) -> None:
        """Measure on held-out pictures; keep the weights of each variant that is better than ever. A collective."""
        average = self._state.average
        with self.meter.paused():
            scores, grid = validator.measure(self._state.engine.module, average.weights if average else None)
        better = self._state.best.improved(scores)
        if not self._ranks.is_main:
            return
        record(self._out, done, scores, {"device_hours": self._state.spent.device_hours})
        self._tracker.log_metrics(flat(scores), done)
        self._say_scores(done, scores)
        for variant in better:
            self._export_to(self._out / "best" / variant, {"step": done, "psnr": scores[variant]})
        if grid is not None:
            path = self._out / "validation" / f"step-{done:08d}.png"
            write_picture(path, grid)
            self._tracker.log_artifact(path, "validation")

    def checkpoint(self, done: int, samples_consumed: int) -> None:
        """Begin to write a checkpoint. A collective."""
        # A collective of its own, so that only a run that may lose samples pays for it.
        if self._config.data.on_damage == "skip":
            self._samples_lost = self._lost.total(self._ranks.device)
        parts = self._state.capture()
        if self._ranks.is_main:
            loader = StreamState(self._dataset_id, self._config.seed, samples_consumed)
            facts = {**self._said(), "loader": asdict(loader), "samples_lost": self._samples_lost}
            self.writer.save(done, parts, facts)

    def export(self) -> None:
        """Leave the weights, their moving average where there is one, and the finished marker."""
        if not self._ranks.is_main:
            return
        export = self._out / "export"
        self._export_to(export, {})
        self._tracker.log_artifact(self._out / "config.yaml")
        self._tracker.finish()
        finished = {**self._said(), "step": self._config.steps, "export": str(export), "ranks": self._ranks.world_size}
        finished |= {"samples_lost": self._samples_lost, "steps_skipped": self._state.guard.skipped}
        finished["device_hours"] = self._state.spent.device_hours
        write_atomically(self._out / MARKER, json.dumps(finished, indent=2).encode())
        self._say(f"finished after {self._config.steps} steps; weights in {export}")

    def end(self, status: str, exit_state: str, message: str = "") -> None:
        """Close the record of a run that has not finished."""
        if self._ranks.is_main:
            self._tracker.finish(status, exit_state)
            if message:
                self._say(message)

    def _export_to(self, folder: Path, facts: Mapping[str, Any]) -> None:
        weights = dict(self._state.engine.module.state_dict())
        if self._state.average is not None:
            weights |= self._state.average.weights
        with torch.random.fork_rng(devices=[]):
            model = build_model(self._config.model)
        model.load_state_dict(weights)
        origin = {name: self._said()[name] for name in ("stage", "code", "run_id", "dataset_id")}
        save_export(model, self._config.model, folder, {**origin, **self._export_facts, **facts})

    def _said(self) -> dict[str, Any]:
        """The facts, and the run's id by now: a tracking server that was away at the start gives it later."""
        return {**self._facts, "run_id": self._tracker.run_id}

    def _say_scores(self, done: int, scores: Scores) -> None:
        for variant, tasks in scores.items():
            shown = "  ".join(f"{task} {value:.2f}" for task, value in tasks.items())
            self._say(f"{done}/{self._config.steps}  PSNR {variant}: {shown} dB")

    def _say(self, message: str) -> None:
        _say(f"{self._stage}: {message}")


def _refuse_other_config(where: str, saved: dict[str, Any], config: StageConfig) -> None:
    before, now = _flat(saved), _flat(config.model_dump(mode="json"))
    changed = sorted(key for key in now if not _free(key) and before.get(key) != now[key])
    if changed == ["steps"] and config.schedule.kind != "cosine":
        return  # a longer run of the same thing; a cosine would have another learning rate from its first step
    if changed:
        raise ConfigError(
            f"{where} holds a run of another configuration (changed: {', '.join(changed)}; see "
            f"{Path(config.out) / 'config.yaml'}). Choose another out=, or remove that folder to start anew"
        )


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``section.key``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _free(key: str) -> bool:
    return key in _FREE_TO_CHANGE or key.split(".")[0] in _FREE_TO_CHANGE


def _size(model: torch.nn.Module) -> str:
    count = sum(p.numel() for p in model.parameters())
    return f"{type(model).__name__} with {count:,} parameters"


def _say(message: str) -> None:
    print(f"{PROGRESS}{message}", flush=True)


def code_version() -> str:
    """Commit of the source tree with ``+changes`` when it is dirty, or the installed version outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty=+changes", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        described = None
    if described is not None and described.returncode == 0:
        return described.stdout.strip()
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"ird {version('ird')}"
    except PackageNotFoundError:
        return f"unknown (Python {sys.version_info.major}.{sys.version_info.minor})"
