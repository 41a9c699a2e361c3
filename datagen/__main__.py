"""``python -m datagen COMMAND [--config FILE] [key=value …]``: curate pictures into a verified WebDataset."""

import argparse
import sys
from collections.abc import Sequence

from datagen.build import STEPS, build, run_steps, verify_store
from datagen.config import DatagenConfig, absolute
from datagen.dataset import SUMMARY, DatasetError, read_dataset_json, read_json
from datagen.source.listing import SourceError
from infra.cluster import ClusterError
from infra.config import ConfigError, load_config
from infra.storage import StorageError, Store, open_store

_EXAMPLES = """examples:
  python -m datagen build --config configs/datagen/demo.yaml
  python -m datagen build --config configs/datagen/demo.yaml source=DIR out=DIR leak_guard=[DIR]
  python -m datagen select --config FILE select.min_laplacian_variance=100   (new thresholds, no decoding)
  python -m datagen verify out=DIR

build = scan, select, pack, verify. Every command can be run again after an interruption and does what is missing.
exit codes: 0 done, 1 failed or damaged, 2 wrong configuration, 130 interrupted"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m datagen", description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("command", choices=[*STEPS, "verify", "build"])
    parser.add_argument("--config", metavar="FILE", help="a YAML file, see configs/datagen/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings over those of the file")
    given = parser.parse_intermixed_args(arguments)
    try:
        config = load_config(DatagenConfig, given.config, given.overrides)
        return _run(given.command, config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SourceError, DatasetError, StorageError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _run(command: str, config: DatagenConfig) -> int:
    if command == "verify":
        store = open_store(absolute(config.out))
        verify_store(store)
    elif command == "build":
        store = build(config)
    else:
        store = run_steps(config, [command])
    print(_made(command, store))
    return 0


def _made(command: str, store: Store) -> str:
    facts = read_json(store, SUMMARY)[command if command != "build" else "select"]
    if command == "scan":
        return f"inventory of {facts['inputs']} pictures: {store.uri}/curation/inventory.json"
    if command == "select":
        return f"{_funnel(facts)}\nselection: {store.uri}/curation/selection.parquet"
    description = read_dataset_json(store)
    totals = description["totals"]
    made = f"dataset {description['id'][:16]}: {totals['samples']} samples in {totals['shards']} shards, "
    return f"{_funnel(totals)}\n{made}{totals['bytes'] / 1e6:.1f} MB: {store.uri}"


def _funnel(counts: dict) -> str:
    lines = [f"{counts['inputs']:>8} pictures"]
    lines += [f"{-n:>8} rejected: {reason}" for reason, n in counts["rejected"].items()]
    lines += [f"{-n:>8} failed: {reason}" for reason, n in counts["failed"].items()]
    return "\n".join([*lines, f"{counts['kept']:>8} kept"])


if __name__ == "__main__":
    sys.exit(main())
