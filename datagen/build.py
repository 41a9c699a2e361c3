"""The steps of a curation in order, each resumable, each leaving its facts in ``curation/summary.json``."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import yaml

from datagen.config import DatagenConfig, absolute
from datagen.dataset import CONFIG, SUMMARY, DatasetError, read_json, write_json
from datagen.pack.pack import pack
from datagen.scan.scan import scan
from datagen.select.select import select
from datagen.source.listing import SourceError, require_folders
from datagen.verify import Check, table, verify
from infra.cluster import connect
from infra.storage import Store, open_store

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
        require_folders(config.source, "source")
        require_folders(config.leak_guard, "leak_guard")
    store = open_store(absolute(config.out))
    store.write(CONFIG, yaml.safe_dump(_resolved(config), sort_keys=False, allow_unicode=True).encode())
    with connect(config.num_cpus) as resources:
        cluster = {name: amount for name, amount in resources.items() if not name.startswith(("node:", "object_store"))}
        for name in names:
            facts = STEPS[name](config, store)
            _record(store, name, {**facts, "cluster": cluster})
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
        raise DatasetError(f"{store.uri}: {faults} faults\n{table(checks)}")
    print(table(checks))
    return checks


def build(config: DatagenConfig) -> Store:
    """Scan, select, pack and verify. Run it again after any interruption: it does only what is missing."""
    store = run_steps(config, list(STEPS))
    verify_store(store)
    return store


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
