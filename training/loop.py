"""The one training loop: every stage gives it a configuration, a corruption and an objective."""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from infra.config import ConfigError, config_hash, dump_config
from infra.files import write_atomically
from infra.launcher import MARKER, PROGRESS, read_marker
from infra.tracking import Tracker
from training.checkpoint import load_checkpoint, save_checkpoint
from training.config import StageConfig
from training.corruption import Corruption
from training.data.handover import handover
from training.data.loader import make_loader, samples_per_batch
from training.data.lost import LostSamples
from training.data.plan import StreamState
from training.data.shards import ShardReader
from training.distributed import PREEMPTED, Ranks, StopRequest, join, mean_over_ranks
from training.export import load_export, save_export
from training.models import build_model
from training.optimization import MovingAverage, learning_rate, make_optimizer, set_learning_rate

# objective(engine, batch, step) -> (loss, metrics). The loss is this rank's mean over its patches; metrics
# are detached scalars, with the same names on every rank at the same step.
Objective = Callable[[Any, dict[str, Any], int], tuple[torch.Tensor, dict[str, torch.Tensor]]]

# Changing these in the middle of a run does not change what it computes.
_FREE_TO_CHANGE = {"out", "log_every", "checkpoint_every", "keep_checkpoints", "tracking", "model.checkpoint_levels"}
_FREE_TO_CHANGE |= {f"data.{key}" for key in ("dataset", "workers", "fetch", "cache", "cache_gib", "on_damage")}


def run_stage(
    stage: str,
    config: StageConfig,
    objective: Objective,
    corrupt: Corruption | None,
    export_facts: Mapping[str, Any] | None = None,
) -> int:
    """Train ``config.steps`` steps, resuming from ``config.out`` if it holds checkpoints; return an exit code.

    Each step is a pure function of the weights, the optimizer state and the step number: data, crops,
    degradations and variants are drawn from keys, never from a global random state. A killed run that
    is started again therefore reaches the same weights, bit for bit, at the same world size.

    Args:
        export_facts: what users of the export must know beyond its model's config.

    Returns:
        0 when finished (``out``/finished.json and ``out``/export are there), 75 when a signal asked to
        stop and a checkpoint was saved.

    Raises:
        ConfigError: ``out`` holds a run of another configuration, or the dataset is missing or another one.
    """
    out = Path(config.out)
    marker = read_marker(out)
    if marker is not None and marker.get("config_hash") == config_hash(config):
        print(f"{PROGRESS}{stage}: already finished, see {out / MARKER}", flush=True)
        return 0
    ranks = join()
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    data = config.data
    reader = ShardReader(data.dataset, data.cache, data.cache_gib, data.fetch, on_damage=data.on_damage)
    model = build_model(config.model)
    if config.init_from:
        start_model, _, _ = load_export(Path(config.init_from))
        model.load_state_dict(start_model.state_dict())
    # Every rank reads before any writes; `join` and the collectives of the engine keep them in step.
    saved = load_checkpoint(out / "checkpoints")
    engine = _engine(model, config, ranks)
    average = MovingAverage(engine.module, config.ema_decay) if config.ema_decay else None
    state = StreamState(reader.dataset_id, config.seed, 0)
    first_step = samples_lost = 0
    if saved is not None:
        checkpoint, manifest = saved
        _refuse_other_config(out, manifest["config"], config)
        engine.module.load_state_dict(checkpoint["model"])
        engine.optimizer.load_state_dict(checkpoint["optimizer"])
        if average is not None:
            average.load_state_dict(checkpoint["average"])
        state = StreamState(**manifest["loader"])
        first_step, samples_lost = manifest["step"], manifest["samples_lost"]
    tracker = Tracker(config.tracking, stage, out, is_main=ranks.is_main)
    if ranks.is_main:
        (out / MARKER).unlink(missing_ok=True)  # of a shorter run: it must not speak for this one if this one is killed
        _say(
            f"{stage}: resuming at step {first_step}"
            if saved
            else f"{stage}: {_size(engine.module)} on {ranks.world_size} rank(s)"
        )
        dump_config(config, out / "config.yaml")
        tracker.log_params(config.model_dump(mode="json", exclude={"tracking"}))
        tracker.set_tags(
            {"ird.stage": stage, "ird.dataset_id": reader.dataset_id, "ird.config_hash": config_hash(config)}
        )
        tracker.set_tags({"ird.code": code_version(), "ird.ranks": ranks.world_size, "ird.host": platform.node()})

    facts = {
        "stage": stage,
        "config": config.model_dump(mode="json"),
        "config_hash": config_hash(config),
        "code": code_version(),
        "run_id": tracker.run_id,
        "dataset_id": reader.dataset_id,
    }

    lost = LostSamples(out, ranks.rank, samples_lost)

    def checkpoint_at(step: int, consumed: int) -> int:
        """Save; return the samples lost so far."""
        # A collective, so that only a run that may lose samples pays for it.
        total = lost.total(ranks.device) if data.on_damage == "skip" else samples_lost
        if ranks.is_main:
            parts = {"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}
            parts |= {"average": average.state_dict()} if average is not None else {}
            loader_state = {"dataset_id": reader.dataset_id, "seed": config.seed, "samples_consumed": consumed}
            save_checkpoint(
                out / "checkpoints",
                step,
                parts,
                {**facts, "loader": loader_state, "samples_lost": total},
                config.keep_checkpoints,
            )
        return total

    loader = make_loader(
        reader,
        data,
        state=state,
        steps=config.steps,
        corrupt=corrupt,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    take = handover(ranks.device, corrupt=corrupt, seed=config.seed, channels_last=data.channels_last)
    per_step = samples_per_batch(data, ranks.world_size)
    stop = StopRequest()
    meter = _Meter(stage, config, first_step)
    batches = iter(loader)
    engine.train()
    ranks.watchdog.beat()
    for step in range(first_step, config.steps):
        waited_from = time.perf_counter()
        batch = next(batches)
        meter.waited(time.perf_counter() - waited_from)
        lost.add(batch["lost"])
        batch = take(batch)
        set_learning_rate(engine.optimizer, learning_rate(step, config.steps, config.optimizer.lr, config.schedule))
        loss, metrics = objective(engine, batch, step)
        engine.backward(loss)
        engine.step()
        if average is not None:
            average.update(engine.module)
        meter.add(metrics)
        ranks.watchdog.beat()
        done = step + 1
        if done % config.log_every == 0 or done == config.steps:
            logged = meter.read(done)
            if data.on_damage == "skip":
                logged["samples_lost"] = lost.total(ranks.device)
            if ranks.is_main:
                _say(meter.line(done, logged))
                with open(out / "metrics.jsonl", "a") as history:
                    history.write(json.dumps({"step": done, **logged}) + "\n")
                tracker.log_metrics(logged, done)
                tracker.flush()
        stopping = stop.agreed(ranks.device)
        if stopping or done % config.checkpoint_every == 0 or done == config.steps:
            with ranks.watchdog.paused():
                samples_lost = checkpoint_at(done, done * per_step)
        if stopping and done < config.steps:
            if ranks.is_main:
                _say(f"{stage}: stopped by a signal at step {done}, saved; run the same command to go on")
                tracker.finish("KILLED")
            return PREEMPTED

    if ranks.is_main:
        if average is not None:
            engine.module.load_state_dict(average.weights, strict=False)
        export = out / "export"
        origin = {name: facts[name] for name in ("stage", "code", "run_id", "dataset_id")}
        save_export(engine.module, config.model, export, origin | dict(export_facts or {}))
        tracker.log_artifact(out / "config.yaml")
        tracker.finish()
        finished = {**facts, "step": config.steps, "export": str(export), "ranks": ranks.world_size}
        finished["samples_lost"] = samples_lost
        write_atomically(out / MARKER, json.dumps(finished, indent=2).encode())
        _say(f"{stage}: finished after {config.steps} steps; weights in {export}")
    return 0


def _engine(model: torch.nn.Module, config: StageConfig, ranks: Ranks) -> Any:
    """A DeepSpeed engine around ``model``. ZeRO stage 0: these nets have tens of millions of weights, so that
    partitioning their optimizer state would save little, and stage 0 checkpoints load at any world size."""
    import deepspeed

    settings = {
        "train_batch_size": config.data.batch,
        "train_micro_batch_size_per_gpu": config.data.batch // ranks.world_size,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},
        # Never left out: DeepSpeed clips to 1.0 when the key is absent.
        "gradient_clipping": config.optimizer.gradient_clipping,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, config.optimizer), config=settings)
    return engine


class _Meter:
    """Gathers what a log line says, without a device synchronisation in between."""

    def __init__(self, stage: str, config: StageConfig, first_step: int) -> None:
        self._stage, self._config = stage, config
        self._first_step = self._last_read = first_step
        self._started = self._window_started = time.perf_counter()
        self._data_wait = 0.0
        self._sums: dict[str, list[torch.Tensor]] = {}

    def waited(self, seconds: float) -> None:
        self._data_wait += seconds

    def add(self, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self._sums.setdefault(name, []).append(value)

    def read(self, done: int) -> dict[str, float]:
        """Means since the last reading, over steps and ranks; every rank must call it at the same step."""
        names = sorted(self._sums)
        means = mean_over_ranks(torch.stack([torch.stack(self._sums[name]).float().mean() for name in names])).tolist()
        now = time.perf_counter()
        elapsed = now - self._window_started
        logged = dict(zip(names, means))
        logged["images_per_second"] = (done - self._last_read) * self._config.data.batch / elapsed
        logged["data_wait_share"] = self._data_wait / elapsed
        logged["data_wait_ms"] = 1000 * self._data_wait / (done - self._last_read)
        logged["lr"] = learning_rate(done - 1, self._config.steps, self._config.optimizer.lr, self._config.schedule)
        self._sums, self._data_wait, self._window_started, self._last_read = {}, 0.0, now, done
        return logged

    def line(self, done: int, logged: dict[str, float]) -> str:
        """One progress line with the time that is left."""
        per_step = (time.perf_counter() - self._started) / (done - self._first_step)
        left = int(per_step * (self._config.steps - done))
        losses = "  ".join(f"{name} {value:.4f}" for name, value in logged.items() if name.startswith("loss"))
        rates = f"{logged['images_per_second']:.1f} patches/s  data wait {logged['data_wait_share']:.0%}"
        rates += f"  {logged['samples_lost']} samples lost" if logged.get("samples_lost") else ""
        return f"{self._stage} {done}/{self._config.steps}  {losses}  {rates}  {left // 60}m{left % 60:02d}s left"


def _refuse_other_config(out: Path, saved: dict[str, Any], config: StageConfig) -> None:
    before, now = _flat(saved), _flat(config.model_dump(mode="json"))
    changed = sorted(key for key in now if not _free(key) and before.get(key) != now[key])
    if changed == ["steps"] and config.schedule.kind != "cosine":
        return  # a longer run of the same thing; a cosine would have another learning rate from its first step
    if changed:
        raise ConfigError(
            f"{out} holds a run of another configuration (changed: {', '.join(changed)}; see {out / 'config.yaml'}). "
            f"Choose another out=, or remove that folder to start anew"
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
