"""``ird demo``: the whole mission once through, from photographs to a picture restored by a pulled model."""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from infra.config import Config, ConfigError, load_config
from infra.errors import without_password
from infra.launcher import run_deepspeed, run_supervised
from infra.tracking import Tracker, TrackingConfig, tracking_uri
from pipeline.pictures import find_pictures, read_picture
from pipeline.stages import Stage, run_stages

REPOSITORY = Path(__file__).resolve().parent.parent


class StageFile(Config):
    """The config file of a stage, relative to the repository, and what the demo changes in it."""

    file: str
    overrides: tuple[str, ...] = ()


class DemoConfig(Config):
    """The chain that ``ird demo`` runs."""

    source: str = ""  # folder of pictures; empty: the photographs that come with the dependencies
    out: str = "runs/demo"
    held_out: int = Field(default=3, ge=1)  # pictures of ``source`` that are kept for evaluation
    ranks: int = Field(default=2, ge=1)
    model_name: str = "ird-demo"
    alias: str = "demo"
    datagen: StageFile
    pretrain: StageFile
    finetune: StageFile
    edsr: StageFile
    mzsr_large_scale: StageFile
    mzsr_meta: StageFile
    evaluate: StageFile
    tracking: TrackingConfig = TrackingConfig(experiment="ird-demo")


def run_demo(config: DemoConfig, say: Callable[[str], None]) -> Path:
    """Run the chain, resuming what an earlier run left; return the path of the report.

    Raises:
        ConfigError: ``source`` holds too few readable pictures.
        StageFailed: a stage failed; running again resumes at that stage.
    """
    root = Path(config.out).absolute()
    root.mkdir(parents=True, exist_ok=True)
    # The restoring processes and the trainers must see the same database from wherever they run.
    os.environ.setdefault("MLFLOW_TRACKING_URI", tracking_uri(config.tracking))
    parent = Tracker(config.tracking, "demo", root)
    parent.log_params(config.model_dump(mode="json", exclude={"tracking"}))
    status = "FAILED"
    try:
        records = run_stages(_stages(config, root, parent.reference, say), root, say)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):
        status = "KILLED"
        raise
    finally:
        parent.finish(status)
    return Path(records["report"]["report"])


def _stages(config: DemoConfig, root: Path, parent_run_id: str, say: Callable[[str], None]) -> list[Stage]:
    tracking = [f"tracking.experiment={config.tracking.experiment}", f"tracking.parent_run_id={parent_run_id}"]
    dataset, held_out = root / "dataset" / "out", root / "corpus" / "held_out"

    def show(line: str) -> None:
        say(f"      {line}")

    def python(
        module: str, file: StageFile, *overrides: str, pick: Callable[[str], str | None] | None = None
    ) -> Callable[[Path], Mapping[str, Any]]:
        command = [sys.executable, "-m", *module.split(), "--config", str(REPOSITORY / file.file), *file.overrides]

        def run(folder: Path) -> Mapping[str, Any]:
            report = run_supervised([*command, f"out={folder / 'out'}", *overrides], folder, show=show, pick=pick)
            return {"peak_memory": report.peak_memory}

        return run

    def deepspeed(module: str, file: StageFile, *overrides: str) -> Callable[[Path], Mapping[str, Any]]:
        def run(folder: Path) -> Mapping[str, Any]:
            report = run_deepspeed(
                module,
                REPOSITORY / file.file,
                [f"data.dataset={dataset}", *file.overrides, *overrides, *tracking],
                folder / "out",
                ranks=config.ranks,
                show=show,
            )
            return {"peak_memory": report.peak_memory}

        return run

    def export(stage: str) -> Path:
        return root / stage / "out" / "export"

    def stage_settings(file: StageFile) -> dict[str, Any]:
        return {"file": (REPOSITORY / file.file).read_text(), "overrides": file.overrides}

    evaluated = [
        f"pictures={held_out}",
        f"restoration.model={export('finetune')}",
        f"super_resolution.model={export('edsr')}",
        f"zero_shot.model={export('mzsr_meta')}",
        f"zero_shot.large_scale={export('mzsr_large_scale')}",
    ]
    sources = [f"source={root / 'corpus' / 'pictures'}", f"leak_guard=[{held_out}]"]
    trainings: list[tuple[str, str, StageFile, str, Sequence[str], Sequence[str]]] = [
        ("pretrain", "DyNet: dynamic co-pretraining of both variants", config.pretrain, "training.pretrain", [], []),
        (
            "finetune",
            "DyNet: all-in-one fine-tuning",
            config.finetune,
            "training.finetune",
            [f"init_from={export('pretrain')}"],
            ["pretrain"],
        ),
        ("edsr", "EDSR x2", config.edsr, "training.edsr", [], []),
        ("mzsr_large_scale", "MZSR: large-scale training", config.mzsr_large_scale, "training.mzsr", [], []),
        (
            "mzsr_meta",
            "MZSR: meta-transfer learning",
            config.mzsr_meta,
            "training.mzsr",
            [f"init_from={export('mzsr_large_scale')}"],
            ["mzsr_large_scale"],
        ),
    ]
    trained = [name for name, *_ in trainings]
    return [
        Stage(
            "corpus",
            "Corpus: photographs, some deliberately bad files, held-out pictures",
            partial(_corpus, config),
            {"source": _listing(config.source), "held_out": config.held_out},
        ),
        Stage(
            "dataset",
            "Curation and sharding on Ray: scan, select, pack, verify",
            partial(
                _tracked_curation,
                config.tracking.model_copy(update={"parent_run_id": parent_run_id}),
                python("datagen build", config.datagen, *sources, pick=_curation_line),
            ),
            stage_settings(config.datagen),
            after=["corpus"],
        ),
        *(
            Stage(
                name,
                f"{title} ({config.ranks} DeepSpeed ranks)",
                deepspeed(module, file, *overrides),
                stage_settings(file) | {"ranks": config.ranks},
                after=["dataset", *after],
            )
            for name, title, file, module, overrides, after in trainings
        ),
        Stage(
            "evaluate",
            "Evaluation on pictures never trained on",
            python("training.evaluate", config.evaluate, *evaluated, *tracking),
            stage_settings(config.evaluate),
            after=["corpus", *trained],
        ),
        Stage(
            "register",
            "Registry: both DyNet variants as one model version",
            partial(_register, config, export("finetune"), root / "evaluate" / "out" / "results.json", show),
            {"name": config.model_name, "alias": config.alias, "uri": tracking_uri(config.tracking)},
            after=["finetune", "evaluate"],
        ),
        Stage(
            "restore",
            "Pull from the registry in a fresh process and restore a picture with each variant",
            partial(_restore, config, root / "evaluate" / "out" / "pictures", show),
            {"name": config.model_name, "alias": config.alias},
            after=["register"],
        ),
        Stage("report", "Report", partial(_report, root), {"version": 1}, after=["restore"]),
    ]


def _tracked_curation(
    tracking: TrackingConfig, curate: Callable[[Path], Mapping[str, Any]], folder: Path
) -> Mapping[str, Any]:
    """Curate, then record the funnel and the dataset id as a run; Ray jobs themselves know nothing of MLflow."""
    facts = curate(folder)
    dataset = json.loads((folder / "out" / "dataset.json").read_text())
    summary = folder / "out" / "curation" / "summary.json"
    select = json.loads(summary.read_text())["select"]
    tracker = Tracker(tracking, "dataset", folder)
    tracker.set_tags({"ird.stage": "dataset", "ird.dataset_id": dataset["id"]})
    tracker.log_params(dataset["config"])
    counts = {f"{kind}.{reason}": n for kind in ("rejected", "failed") for reason, n in select[kind].items()}
    counts |= {name: select[name] for name in ("inputs", "kept", "tiles")}
    tracker.log_metrics({name: float(count) for name, count in counts.items()}, step=0)
    tracker.log_artifact(summary)
    tracker.log_artifact(folder / "out" / "dataset.json")
    tracker.finish()
    return {**facts, "dataset_id": dataset["id"], "run_id": tracker.run_id}


def _curation_line(line: str) -> str | None:
    """What ``datagen build`` says, without the time-stamped lines of Ray."""
    return None if not line.strip() or line[0] in "($" or line[:2] == "20" else line


def _listing(source: str) -> str:
    """A fingerprint of a source folder: names, sizes and times, so that changed pictures redo the chain."""
    if not source:
        return "embedded"
    folder = Path(source)
    if not folder.is_dir():
        raise ConfigError(f"source={source}: not a folder")
    files = sorted(
        (str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    )
    return hashlib.sha256(json.dumps([str(folder.resolve()), files]).encode()).hexdigest()


def _corpus(config: DemoConfig, folder: Path) -> Mapping[str, Any]:
    if not config.source:
        from datagen.source.embedded import materialise

        materialise(folder)
    else:
        _link_source(Path(config.source).resolve(), folder, config.held_out)
    counts = {part: sum(p.is_file() for p in (folder / part).rglob("*")) for part in ("pictures", "held_out")}
    return {"counts": counts}


def _link_source(source: Path, folder: Path, wanted: int) -> None:
    """Point ``folder``/pictures at ``source``; copy ``wanted`` of its pictures, chosen by hash, to ``folder``/held_out.

    The held-out pictures stay in the source: the leak guard of the curation keeps them, and their near copies, out.
    """
    link = folder / "pictures"
    link.unlink(missing_ok=True)
    link.symlink_to(source, target_is_directory=True)
    chosen = 0
    for name in sorted(find_pictures(source), key=lambda p: hashlib.sha256(str(p).encode()).digest()):
        try:
            picture = read_picture(source / name)
        except (OSError, ValueError):
            continue
        if min(picture.pixels.shape[:2]) >= 128:
            (folder / "held_out").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / "held_out" / name.name)
            chosen += 1
        if chosen == wanted:
            return
    raise ConfigError(
        f"source={source}: found {chosen} readable pictures of at least 128 pixels, need more than {wanted}"
    )


def _register(
    config: DemoConfig, export: Path, results: Path, show: Callable[[str], None], folder: Path
) -> Mapping[str, Any]:
    from pipeline.registry.pushing import figures_of, push

    tags = figures_of(results, "dynet")
    run_id = json.loads((export.parent / "mlflow.json").read_text())["run_id"]
    version = push(export, config.model_name, run_id=run_id, alias=config.alias, tags=tags, settings=config.tracking)
    show(f"models:/{config.model_name}@{config.alias} is version {version}")
    uri = without_password(tracking_uri(config.tracking))
    return {"model": f"models:/{config.model_name}@{config.alias}", "version": version, "uri": uri}


def _restore(config: DemoConfig, pictures: Path, show: Callable[[str], None], folder: Path) -> Mapping[str, Any]:
    """Restore the degraded pictures of the hardest noise, each variant in a process of its own.

    ``comparison.png`` shows them side by side: degraded, small, large, clean.
    """
    from datagen.picture.region import decode_whole
    from training.evaluate import write_picture

    noisy = folder / "degraded"
    task = sorted(p.name for p in pictures.iterdir() if "50" in p.name or "noise" in p.name)[-1]
    for picture in sorted((pictures / task).iterdir()):
        noisy.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(picture / "degraded.png", noisy / f"{picture.name}.png")
    ird = str(Path(sys.executable).with_name("ird"))
    memory = 0
    for variant in ("small", "large"):
        model = f"models:/{config.model_name}@{config.alias}"
        command = [ird, "restore", "--model", model, "--variant", variant, str(noisy), str(folder / variant)]
        memory = max(memory, run_supervised(command, folder, show=show).peak_memory)
        show(f"{' '.join(['ird', *command[1:]])}")
    rows = []
    for picture in sorted(noisy.iterdir()):
        shown = [noisy / picture.name, folder / "small" / picture.name, folder / "large" / picture.name]
        shown.append(pictures / task / picture.stem / "clean.png")
        rows.append(np.hstack([decode_whole(path.read_bytes()) for path in shown]))
    narrowest = min(row.shape[1] for row in rows)
    write_picture(folder / "comparison.png", np.vstack([row for row in rows if row.shape[1] == narrowest]))
    return {"task": task, "peak_memory": memory, "comparison": str(folder / "comparison.png")}


def _report(root: Path, folder: Path) -> Mapping[str, Any]:
    from pipeline.report import write_report

    return {"report": str(write_report(root, root / "report.html"))}


def load_demo_config(path: Path | None, overrides: Sequence[str]) -> DemoConfig:
    """The demo's configuration, from ``configs/pipeline/demo.yaml`` when no file is named."""
    return load_config(DemoConfig, path or REPOSITORY / "configs" / "pipeline" / "demo.yaml", overrides)
