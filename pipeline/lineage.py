"""``ird trace``: from a registered model to the pictures it was made from, and from a picture to the models.

The links: version → run (tag ``run_id``) → checkpoint → dataset (tag ``dataset_id``, and the place that the run read)
→ shards → sources. Each is checked where it can be: a dataset that has another id by now is not the one.
"""

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from datagen.dataset import DatasetError, read_dataset_json, read_samples, read_shards
from datagen.trace import find_pictures, read_names
from datagen.trace import trace as trace_pictures
from infra.storage import StorageError, Store, open_store
from infra.tracking import TrackingConfig
from pipeline.registry.server import RegistryError, connect_to_registry, explained, if_there, parse_model_uri
from pipeline.registry.versions import ModelVersion, get_version, list_versions
from training.export import CONFIG

_SHOWN = 3  # of shards and of sources, in the text
_CHAIN = 8  # stages that a model may have gone through


def trace_model(model_uri: str, settings: TrackingConfig, dataset: str | None = None) -> dict[str, Any]:
    """Where a version comes from, link by link.

    Args:
        model_uri: ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        dataset: place of the dataset; None takes the one that the run read.

    Returns:
        ``model``, ``run``, ``checkpoint``, ``stages`` (the export it began from, and so on), ``dataset`` with all
        ``shards`` and ``sources``, and ``gaps``: links that could not be followed, each with its reason.

    Raises:
        RegistryError: no such version, or the server does not answer.
    """
    version, _ = get_version(*parse_model_uri(model_uri), settings)
    run = _run(version.run_id, settings)
    gaps = [] if run else [f"run {version.run_id or 'of this version'}: not on record at this registry"]
    place = dataset or version.tags.get("dataset") or run.get("dataset")
    found, gap = _dataset(place, version.tags.get("dataset_id", ""))
    if not version.tags.get("checkpoint"):
        gaps.append("checkpoint: none lay beside the export when it was pushed")
    return {
        "model": {
            "uri": f"models:/{version.name}/{version.version}",
            "aliases": version.aliases,
            "sha256": version.tags.get("sha256"),
            "code": version.tags.get("code"),
        },
        "run": run,
        "checkpoint": {
            "name": version.tags.get("checkpoint"),
            "sha256": version.tags.get("checkpoint_sha256"),
            "folder": str(Path(run["out"]) / "checkpoints") if run.get("out") else None,
        },
        "stages": _stages(run.get("init_from"), settings),
        "dataset": found,
        "gaps": [*gaps, *filter(None, [gap])],
    }


def trace_picture(target: str, dataset: str, settings: TrackingConfig) -> dict[str, Any]:
    """What holds a picture: samples, shards, the dataset, and the registered models that were trained on it.

    Args:
        target: anything that ``python -m datagen trace`` takes: a uri or path, a sha256, a source name, a sample key.
        dataset: folder or ``s3://`` prefix of the dataset.

    Returns:
        ``target``, ``found``, ``text`` (what became of it), ``pictures``, ``samples``, ``dataset`` (id, place),
        ``models`` trained on that very dataset, ``earlier`` those trained at this place when it had another id.

    Raises:
        DatasetError, StorageError: no finished dataset there.
        RegistryError: the server does not answer.
    """
    store = open_store(dataset)
    identity = read_dataset_json(store)["id"]
    text, found = trace_pictures(store, [target])
    pictures = find_pictures(read_names(store), target)
    samples = read_samples(store)
    held = samples.filter(pc.is_in(samples.column("source"), pictures.column("source")))
    models: list[ModelVersion] = []
    earlier: list[ModelVersion] = []
    for version in list_versions(settings) if held.num_rows else []:
        if version.tags.get("dataset_id") == identity:
            models.append(version)
        elif version.tags.get("dataset") == store.uri:
            earlier.append(version)
    columns = ["key", "shard", "offset", "size", "sha256", "source", "x", "y", "width", "height"]
    return {
        "target": target,
        "found": found,
        "text": text,
        "pictures": pictures.to_pylist(),
        "samples": held.select(columns).to_pylist(),
        "dataset": {"id": identity, "place": store.uri},
        "models": [_row(version) for version in models],
        "earlier": [_row(version) for version in earlier],
    }


def describe_model(traced: dict[str, Any]) -> str:
    """``trace_model``'s result for people: counts, and the first of each list."""
    model, run, checkpoint, dataset = (traced[part] for part in ("model", "run", "checkpoint", "dataset"))
    lines = [model["uri"] + (f"  ({', '.join(model['aliases'])})" if model["aliases"] else "")]
    lines += [f"  weights     sha256 {model['sha256']}", f"  code        {model['code'] or 'not known'}"]
    if run:
        lines.append(
            f"  run         {run['run_id']}  {run['name']}  {run['status']}  on {run['host'] or 'unknown host'}"
        )
    if checkpoint["name"]:
        lines.append(f"  checkpoint  {checkpoint['name']}  sha256 {checkpoint['sha256'][:16]}…  {checkpoint['folder']}")
    for stage in traced["stages"]:
        lines.append(f"  begun from  {stage['export']}  run {stage['run_id']}  dataset {stage['dataset_id']}")
    if dataset:
        lines.append(f"  dataset     {dataset['id']}  {dataset['place']}")
        lines.append(f"  shards      {len(dataset['shards'])}, {sum(s['samples'] for s in dataset['shards'])} samples")
        lines += [
            f"              {shard['name']}  sha256 {shard['sha256'][:16]}…" for shard in dataset["shards"][:_SHOWN]
        ]
        lines.append(f"  sources     {len(dataset['sources'])} pictures")
        lines += [f"              {s['uri']}  sha256 {s['sha256'][:16]}…" for s in dataset["sources"][:_SHOWN]]
        if max(len(dataset["shards"]), len(dataset["sources"])) > _SHOWN:
            lines.append("              … all of them: --json")
    return "\n".join([*lines, *(f"  gap         {gap}" for gap in traced["gaps"])])


def describe_picture(traced: dict[str, Any]) -> str:
    """``trace_picture``'s result for people."""
    lines = [traced["text"]]
    if not traced["samples"]:
        return "\n".join([*lines, "models: none, since no sample was cut from it"])
    lines.append(
        f"models trained on dataset {traced['dataset']['id'][:16]}…: {len(traced['models']) or 'none registered'}"
    )
    lines += [f"  {row['uri']}  {row['aliases']}  run {row['run_id']}" for row in traced["models"]]
    if traced["earlier"]:
        lines.append("models trained here when the dataset was another (before add, remove or a rebuild):")
        lines += [f"  {row['uri']}  dataset {row['dataset_id'][:16]}…" for row in traced["earlier"]]
    return "\n".join(lines)


def _row(version: ModelVersion) -> dict[str, Any]:
    return {
        "uri": f"models:/{version.name}/{version.version}",
        "aliases": ", ".join(version.aliases),
        "run_id": version.run_id,
        "dataset_id": version.tags.get("dataset_id"),
    }


def _run(run_id: str, settings: TrackingConfig) -> dict[str, Any]:
    """What the tracking server knows of a run; empty if nothing."""
    if not run_id:
        return {}
    client = connect_to_registry(settings)
    with explained(settings):
        run = if_there(lambda: client.get_run(run_id))
    if run is None:
        return {}
    params, tags = run.data.params, run.data.tags
    return {
        "run_id": run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "host": tags.get("ird.hosts"),
        "config_hash": tags.get("ird.config_hash"),
        "out": params.get("out"),
        "init_from": params.get("init_from"),
        "dataset": params.get("data.dataset"),
    }


def _stages(init_from: str | None, settings: TrackingConfig) -> list[dict[str, Any]]:
    """The exports that a training began from, the latest first, as far as they lie on this machine."""
    stages: list[dict[str, Any]] = []
    while init_from and init_from != "None" and len(stages) < _CHAIN:
        try:
            metadata = json.loads((Path(init_from) / CONFIG).read_text())["metadata"]
        except (OSError, ValueError, KeyError):
            stages.append({"export": init_from, "run_id": "not known", "dataset_id": "not known"})
            break
        facts = {key: metadata.get(key) or "not known" for key in ("run_id", "dataset_id", "stage")}
        stages.append({"export": init_from, **facts})
        try:
            init_from = _run(metadata.get("run_id", ""), settings).get("init_from")
        except RegistryError:
            break
    return stages


def _dataset(place: str | None, identity: str) -> tuple[dict[str, Any] | None, str | None]:
    """The dataset at ``place`` with its shards and sources, or why it is not the one that was trained on."""
    if not place:
        return None, f"dataset {identity or 'of this version'}: no run says where it lies; give --dataset"
    try:
        store = open_store(place)
        description = read_dataset_json(store)
        if identity and description["id"] != identity:
            return None, (
                f"dataset: {place} now has the id {description['id'][:16]}…, trained was on {identity[:16]}…; "
                "give --dataset if a copy lies elsewhere"
            )
        return {
            "id": description["id"],
            "place": store.uri,
            "shards": read_shards(store).to_pylist(),
            "sources": _sources(store),
        }, None
    except (DatasetError, StorageError) as error:
        return None, f"dataset {identity[:16]}…: {error}"


def _sources(store: Store) -> list[dict[str, Any]]:
    """The pictures that samples were cut from, in order of their first sample."""
    samples = read_samples(store).select(["source", "source_sha256", "shard"])
    sources = samples.group_by(["source", "source_sha256"], use_threads=False).aggregate(
        [("shard", "count"), ("shard", "distinct")]
    )
    names = read_names(store)
    known = names.filter(pc.is_in(names.column("source"), sources.column("source")))
    places = {row["source"]: row for row in known.select(["source", "root", "key", "licence"]).to_pylist()}
    return [
        {
            "source": row["source"],
            "uri": "/".join(filter(None, (places.get(row["source"], {}).get(part) for part in ("root", "key")))),
            "sha256": row["source_sha256"],
            "licence": places.get(row["source"], {}).get("licence"),
            "samples": row["shard_count"],
            "shards": sorted(row["shard_distinct"]),
        }
        for row in sources.to_pylist()
    ]
