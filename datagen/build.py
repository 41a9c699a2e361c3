"""The steps of a curation in order, each resumable, each leaving its facts in ``curation/summary.json``."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import yaml

from datagen.config import DatagenConfig, SourceConfig, absolute
from datagen.dataset import CONFIG, SUMMARY, DatasetError, read_json, write_json
from datagen.grow import merge_sources, require_same_settings, scan_new
from datagen.pack.pack import pack, repair_shard
from datagen.remove import take_down
from datagen.report import write_report
from datagen.report.words import plural
from datagen.scan.inventory import read_manifest
from datagen.scan.retry import rescan_failed
from datagen.scan.scan import scan
from datagen.select.select import select
from datagen.source.listing import SourceError, require_apart, require_folders
from datagen.verify import Check, table, verify
from datagen.watch import record_result, watched
from infra.cluster import connect
from infra.config import load_config
from infra.storage import Store, open_store
from infra.storage.local import sweep

Step = Callable[[DatagenConfig, Store], dict[str, Any]]
STEPS: dict[str, Step] = {"scan": scan, "select": select, "pack": pack}


def run_steps(config: DatagenConfig, names: Sequence[str]) -> Store:
    """Run the named steps on the cluster; returns the store that holds the output.

    Raises:
        SourceError, DatasetError, StorageError, ClusterError: with what is wrong and what to do.
    """
    if "scan" in names:
        if not config.source:
            raise SourceError("source: not given; a folder, s3://bucket/prefix, or embedded:pictures")
        _require_places(config, config.source)
    with _working(config, begins="scan" in names) as store:
        for name in names:
            _run(name, STEPS[name], config, store)
    return store


def build(config: DatagenConfig) -> Store:
    """Scan, select, pack, verify and report. Run it again after any interruption: it does only what is missing."""
    return _finish(config, run_steps(config, list(STEPS)))


def add(config: DatagenConfig) -> Store:
    """Bring new pictures of ``config.source`` into a finished dataset, as new shards; its old sources stay on record.

    Raises:
        ConfigError: settings differ from those of the dataset, whose shards would change.
        DatasetError: there is no dataset to add to.
    """
    store = open_store(absolute(config.out))
    if not (on_record := config_on_record(store)):
        raise DatasetError(f"{store.uri}: nothing to add to; `python -m datagen build` makes a dataset")
    recorded = load_config(DatagenConfig, recorded=on_record)
    config, sources = merge_sources(config, recorded.source)
    _require_places(config, sources)
    require_same_settings(config, store)
    with _working(config) as store:
        _run("scan", lambda config, store: scan_new(config, store, sources), config, store)
        _run("select", select, config, store)
        _run("pack", pack, config, store)
    return _finish(config, store)


def retry(config: DatagenConfig) -> Store:
    """Read the pictures that failed once more; those that can now be read are packed as new shards."""
    with _working(config) as store:
        _run("scan", rescan_failed, config, store)
        _run("select", select, config, store)
        _run("pack", pack, config, store)
    return _finish(config, store)


def remove(config: DatagenConfig, targets: Sequence[str], note: str) -> list[str]:
    """Take pictures and their copies down, and rewrite the shards that held them. Returns their sources.

    Raises:
        DatasetError: a target is no picture of this corpus; nothing was changed.
    """
    with _working(config) as store:
        sources = take_down(store, targets, note)
        _run("select", select, config, store)
        _run("pack", pack, config, store)
    _finish(config, store)
    return sources


def repair(config: DatagenConfig, shard: str) -> Store:
    """Build one damaged shard again."""
    with _working(config) as store:
        repair_shard(config, store, shard)
    return store


def verify_store(store: Store) -> list[Check]:
    """Verify, record it, and print the table.

    Raises:
        DatasetError: a check failed; the message is the table.
    """
    start = time.monotonic()
    checks = verify(store)
    faults = sum(len(check.faults) for check in checks)
    _record(store, "verify", {"faults": faults, "seconds": round(time.monotonic() - start, 3)})
    if faults:
        raise DatasetError(f"{store.uri}: {plural(faults, 'fault')}\n{table(checks)}")
    print(table(checks))
    return checks


@contextlib.contextmanager
def _working(config: DatagenConfig, *, begins: bool = False) -> Iterator[Store]:
    """The output's store, with the configuration on record, and a cluster to work on.

    Raises:
        DatasetError: nothing was scanned there, and this does not begin with a scan; nothing was written.
    """
    store = open_store(absolute(config.out))
    if not begins:
        read_manifest(store)
    store.write(CONFIG, yaml.safe_dump(_resolved(config), sort_keys=False, allow_unicode=True).encode())
    sweep(store)
    with connect(config.num_cpus), watched(config, store):
        yield store


def _require_places(config: DatagenConfig, sources: Sequence[SourceConfig]) -> None:
    for role, places in (("source", sources), ("leak_guard", config.leak_guard)):
        require_folders(places, role)
        require_apart(places, role, config.out)


def _run(name: str, step: Step, config: DatagenConfig, store: Store) -> None:
    with connect() as resources:  # The connection that _working made.
        cluster = {kind: amount for kind, amount in resources.items() if not kind.startswith(("node:", "object_store"))}
    _record(store, name, {**step(config, store), "cluster": cluster})


def _finish(config: DatagenConfig, store: Store) -> Store:
    verify_store(store)
    write_report(store)
    record_result(config, store)
    return store


def config_on_record(store: Store) -> dict[str, Any]:
    """The configuration of the last run into ``store``, as it was then; empty before the first."""
    return yaml.safe_load(store.read(CONFIG)) if store.exists(CONFIG) else {}


def _resolved(config: DatagenConfig) -> dict[str, Any]:
    """The configuration with absolute places, so that it means the same from any directory."""
    values = config.model_dump(mode="json")
    values["out"] = absolute(config.out)
    for source in [*values["source"], *values["leak_guard"]]:
        source["uri"] = absolute(source["uri"])
    return values


def _record(store: Store, step: str, facts: dict[str, Any]) -> None:
    """Facts of the last run; ``work`` (throughput) is that of the last run that found something to do."""
    summary = read_json(store, SUMMARY)
    work = {key: value for key, value in summary.get(step, {}).items() if key == "work"}
    write_json(store, SUMMARY, {**summary, step: {**work, **facts}})
