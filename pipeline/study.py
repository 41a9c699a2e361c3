"""``ird study co-pretraining``: do weight-shared variants, trained together, save compute?

Every recipe, and the two variants each trained for itself (the twins), gets the same budget of floating-point
operations, over several seeds. The learning rate is constant, so that the state at half the budget is what a run of
half the budget would have reached.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from infra.config import Config, ConfigError, load_config
from infra.files import publish_atomically, write_atomically
from infra.launcher import read_marker, run_deepspeed
from training.config import Positive
from training.cotraining import CotrainingConfig, variants_of_step
from training.models import DyNet, build_model
from training.pretrain import PretrainConfig

TWINS = "separate"
_DRAWN = 1000  # steps over which the mean cost of a recipe is taken


class StudyConfig(Config):
    """Which recipes are compared, on what, for how long. See configs/pipeline/study_co_pretraining.yaml."""

    out: str
    train: str  # a configuration of training.pretrain; steps, seed and recipe are set by the study
    dataset: str
    pictures: str  # held-out pictures
    seeds: tuple[int, ...] = Field(min_length=1)
    budget: Positive  # steps of the large variant whose cost each recipe gets
    points: Positive = 4  # measurements along the way; an even number has one at half the budget
    ranks: Positive = 1  # of each run
    parallel: Positive = 1  # runs at a time
    recipes: dict[str, CotrainingConfig]


@dataclass(frozen=True)
class Run:
    """One training: a recipe (or one twin), a seed, and as many steps as the budget pays for."""

    recipe: str
    seed: int
    cotraining: CotrainingConfig
    steps: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.recipe}-{'-'.join(self.cotraining.trained)}-seed{self.seed}"


def study(config: StudyConfig, overrides: Sequence[str], say: Callable[[str], None]) -> Path:
    """Run what has not finished yet, and write ``study.json``, ``study.md`` and ``study.png`` below ``config.out``.

    Args:
        overrides: ``key=value`` for all trainings.

    Raises:
        ConfigError: the training's configuration has a schedule that is not constant, or no variants to share.
    """
    out = Path(config.out)
    base = _training(config, overrides, [])
    if base.schedule.kind != "constant":
        raise ConfigError(f"{config.train}: schedule.kind={base.schedule.kind}; half a budget is half a run: constant")
    runs = plan(config, base)
    waiting = [run for run in runs if read_marker(out / run.name) is None]
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} of them done before; {config.parallel} at a time")
    with ThreadPoolExecutor(config.parallel) as pool:
        try:
            for done in pool.map(partial(_train, config, overrides, say), waiting):
                say(f"{done} finished")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in psutil.Process().children(recursive=True):
                child.terminate()  # ranks save and end; the same command goes on from there
            raise
    rows = [row for run in runs for row in _rows(out, run)]
    results = {"config": config.model_dump(mode="json"), "overrides": list(overrides), "rows": rows}
    write_atomically(out / "study.json", json.dumps(results, indent=2).encode())
    write_atomically(out / "study.md", markdown(rows).encode())
    _plot(rows, out / "study.png")
    return out / "study.md"


def plan(config: StudyConfig, base: PretrainConfig) -> list[Run]:
    """All runs; every seed of a recipe costs the same, and both twins together cost as much as one recipe."""
    twins = [CotrainingConfig(mode="separate", variants=(variant,)) for variant in base.cotraining.variants]
    twin_costs = [flops_of_step(base, twin) for twin in twins]
    total = config.budget * twin_costs[-1]
    recipes = [(TWINS, twin, round(total / sum(twin_costs))) for twin in twins]
    recipes += [(name, recipe, round(total / flops_of_step(base, recipe))) for name, recipe in config.recipes.items()]
    return [Run(name, seed, recipe, steps) for seed in config.seeds for name, recipe, steps in recipes]


def flops_of_step(base: PretrainConfig, cotraining: CotrainingConfig) -> float:
    """Floating-point operations of a mean step on one patch, as torch counts the forward pass.

    The backward pass counts as two of them; torch 2.13's own count of it is ten times too high for depthwise
    convolutions.
    """
    with torch.random.fork_rng(devices=[]):
        model = build_model(base.model)
    image = torch.zeros(1, base.model.channels, base.data.patch, base.data.patch)

    def forward(variants: Sequence[Any]) -> int:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(image, variants[0]) if len(variants) == 1 else model(image, variants=variants)
        return counter.get_total_flops()

    if cotraining.mode in ("separate", "sandwich", "distill"):
        flops: float = 3 * forward(cotraining.trained)
        if cotraining.mode == "distill":
            flops += (1 - cotraining.teacher_from) * forward(cotraining.variants[-1:])
        return flops
    # A repeat of a level costs what it costs, so the mean depth over many steps says the mean cost.
    drawn = [variants_of_step(cotraining, base.model, 0, step)[0] for step in range(_DRAWN)]
    if not isinstance(model, DyNet):
        return 3 * float(np.mean([forward([variant]) for variant in drawn]))
    depths = np.array([model.depth_of(variant) for variant in drawn])
    ones = forward([(1, 1, 1, 1)])
    more = [forward([tuple(row)]) - ones for row in (np.eye(4, dtype=int) + 1).tolist()]
    return 3 * (ones + float((depths.mean(axis=0) - 1) @ more))


def _training(config: StudyConfig, overrides: Sequence[str], more: Sequence[str]) -> PretrainConfig:
    fixed = [f"data.dataset={config.dataset}", f"validation.pictures={config.pictures}"]
    return load_config(PretrainConfig, config.train, [*fixed, *overrides, *more])


def _train(config: StudyConfig, overrides: Sequence[str], say: Callable[[str], None], run: Run) -> str:
    every = -(-run.steps // config.points)
    settings = [f"data.dataset={config.dataset}", f"validation.pictures={config.pictures}", *overrides]
    settings += [f"seed={run.seed}", f"steps={run.steps}", f"validation.every={every}", f"log_every={every}"]
    settings += [f"checkpoint_every={every}", f"cotraining={json.dumps(run.cotraining.model_dump(mode='json'))}"]
    out = Path(config.out) / run.name

    def show(line: str) -> None:
        say(f"{run.name}: {line.removeprefix('pretrain').lstrip(': ')}")

    run_deepspeed("training.pretrain", Path(config.train), settings, out, ranks=config.ranks, show=show)
    return run.name


def _rows(out: Path, run: Run) -> Iterator[dict[str, Any]]:
    """One row a measurement: recipe, seed, variant, task, share of the budget, hours, PSNR."""
    for line in map(json.loads, (out / run.name / "validation.jsonl").read_text().splitlines()):
        for variant, tasks in line["psnr"].items():
            for task, psnr in tasks.items():
                yield {
                    "recipe": run.recipe,
                    "seed": run.seed,
                    "variant": variant,
                    "task": task,
                    "step": line["step"],
                    "share": line["step"] / run.steps,
                    "hours": line["device_hours"],
                    "psnr": psnr,
                }


def read_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of a finished study."""
    rows: list[dict[str, Any]] = json.loads((out / "study.json").read_text())["rows"]
    return rows


def summary(rows: Sequence[Mapping[str, Any]], share: float) -> list[dict[str, Any]]:
    """A row a recipe: at ``share`` of the budget, hours and PSNR of each variant and task, means over the seeds, and
    under ``spread`` the standard deviation over the seeds of a variant's mean over the tasks."""
    recipes = list(dict.fromkeys(row["recipe"] for row in rows))
    summaries = []
    for recipe in recipes:
        own = [row for row in rows if row["recipe"] == recipe]
        places = sorted({row["share"] for row in own})
        near = min(abs(place - share) for place in places)
        at = [row for row in own if abs(row["share"] - share) <= near + 0.01]
        psnr: dict[str, dict[str, float]] = {}
        spread: dict[str, float] = {}
        for variant in dict.fromkeys(row["variant"] for row in at):
            mine = [row for row in at if row["variant"] == variant]
            tasks = dict.fromkeys(row["task"] for row in mine)
            psnr[variant] = {task: float(np.mean([r["psnr"] for r in mine if r["task"] == task])) for task in tasks}
            by_seed = [np.mean([r["psnr"] for r in mine if r["seed"] == seed]) for seed in {r["seed"] for r in mine}]
            psnr[variant]["mean"] = float(np.mean(by_seed))
            spread[variant] = float(np.std(by_seed, ddof=1)) if len(by_seed) > 1 else 0.0
        hours = _hours(at)
        summaries.append({"recipe": recipe, "share": share, "hours": hours, "psnr": psnr, "spread": spread})
    return summaries


def _hours(rows: Sequence[Mapping[str, Any]]) -> float:
    """Hours of one seed, of both twins where there are two."""
    once = {(row["seed"], row["variant"] if row["recipe"] == TWINS else ""): row["hours"] for row in rows}
    return sum(once.values()) / len({seed for seed, _ in once})


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the study: every recipe at the whole and at half of the budget."""
    tasks = [*dict.fromkeys(row["task"] for row in rows), "mean"]
    lines = ["| recipe | budget | hours | variant | " + " | ".join(tasks) + " |"]
    lines.append("| --- | ---: | ---: | --- |" + " ---: |" * len(tasks))
    for share in (1.0, 0.5):
        for one in summary(rows, share):
            for variant, psnr in one["psnr"].items():
                cells = [f"{psnr[task]:.2f}" for task in tasks[:-1]]
                cells.append(f"{psnr['mean']:.2f} ± {one['spread'][variant]:.2f}")
                lines.append(
                    f"| {one['recipe']} | {share:.0%} | {one['hours']:.3f} | {variant} | " + " | ".join(cells) + " |"
                )
    return "\n".join(lines) + "\n"


def show(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """The means as a table in the terminal."""
    table = Table(title="PSNR in dB, mean over tasks ± spread over seeds")
    for heading in ("recipe", "variant", "half the budget", "whole budget", "hours"):
        table.add_column(heading, justify="left" if heading in ("recipe", "variant") else "right")
    halves = {one["recipe"]: one for one in summary(rows, 0.5)}
    for one in summary(rows, 1.0):
        half = halves[one["recipe"]]
        for variant in one["psnr"]:
            cells = [f"{s['psnr'][variant]['mean']:.2f} ± {s['spread'][variant]:.2f}" for s in (half, one)]
            table.add_row(one["recipe"], variant, *cells, f"{one['hours']:.3f}")
    console.print(table)


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Mean PSNR over the tasks against hours, a panel a variant; bars are the spread over the seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    variants = list(dict.fromkeys(row["variant"] for row in rows))
    figure, axes = pyplot.subplots(1, len(variants), figsize=(5.5 * len(variants), 4.2), sharey=True, squeeze=False)
    shares = sorted({round(row["share"], 2) for row in rows if row["recipe"] == TWINS})
    for axis, variant in zip(axes[0], variants):
        for recipe in dict.fromkeys(row["recipe"] for row in rows):
            points = [one for share in shares for one in summary(rows, share) if one["recipe"] == recipe]
            axis.errorbar(
                [point["hours"] for point in points],
                [point["psnr"][variant]["mean"] for point in points],
                yerr=[point["spread"][variant] for point in points],
                label="separate twins" if recipe == TWINS else recipe.replace("_", " "),
                linestyle="--" if recipe == TWINS else "-",
                marker="o",
                capsize=3,
            )
        axis.set(title=f"{variant} variant", xlabel="hours of all devices, both variants")
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("PSNR in dB, mean over tasks")
    axes[0][-1].legend(loc="lower right")
    figure.tight_layout()
    with publish_atomically(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)
