"""``python -m datagen COMMAND [--config FILE] [key=value …]``: curate pictures into a verified WebDataset."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence

from datagen.build import STEPS, add, build, config_on_record, remove, repair, retry, run_steps, verify_store
from datagen.config import DatagenConfig, absolute
from datagen.dataset import SUMMARY, DatasetError, read_dataset_json, read_json
from datagen.report import write_report
from datagen.scan.fit import fit_niqe
from datagen.select.sweep import sweep
from datagen.source.listing import SourceError
from datagen.trace import trace
from infra.cluster import ClusterError
from infra.config import ConfigError, load_config
from infra.storage import StorageError, Store, open_store

_USAGE = """usage: python -m datagen COMMAND [--config FILE] [key=value ...]

  build    scan, select, pack, verify and report
  scan     measure every picture of the sources; what is measured already is not read again
  select   judge the measured pictures by thresholds, duplicates and leak guard; no pixel is read
             --sweep: how much each threshold would keep, over its range, with a plot
  pack     cut the kept pictures into WebDataset shards
             --shard NAME: only this one, when it is damaged
  verify   prove from the output alone that nothing was lost or damaged
  report   write report.html and the dataset card
  add      bring new pictures into a finished dataset as new shards; the old ones keep their bytes
  retry    read the pictures that failed once more
  trace    PICTURE ...: what became of a picture, and which samples and shards hold it
  remove   PICTURE ... [--note TEXT]: take pictures and their copies out of the shards that hold them
  fit-niqe fit the pristine model of NIQE to a source: out=MODEL.json

PICTURE: a path or uri, a sha256, a source name (source-0/a.jpg), or the key of a sample.
Without --config the settings on record at out are used.

examples:
  python -m datagen build --config configs/datagen/demo.yaml
  python -m datagen build --config configs/datagen/demo.yaml source=DIR out=DIR leak_guard=[DIR]
  python -m datagen select out=DIR select.min_laplacian_variance=100
  python -m datagen verify out=DIR
  python -m datagen remove out=DIR photographs/a.jpg --note "request of its owner"

Every command can be run again after an interruption and does what is missing.
exit codes: 0 done, 1 failed or damaged, 2 wrong configuration, 130 interrupted"""

_COMMANDS = (*STEPS, "verify", "build", "report", "add", "retry", "trace", "remove", "fit-niqe")
_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z0-9_]+)*=")  # A path that holds "=" holds "/" or "." before it.
_WITH_PICTURES = ("trace", "remove")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    given = _parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        return _run(given, _load(given))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (SourceError, DatasetError, StorageError, ClusterError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on from here", file=sys.stderr)
        return 130


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m datagen", usage=_USAGE, add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("command", choices=_COMMANDS)
    parser.add_argument("--config")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--shard", metavar="NAME")
    parser.add_argument("--note", default="")
    parser.add_argument("words", nargs="*")
    if not arguments or {"-h", "--help"} & set(arguments):
        print(_USAGE)
        parser.exit()
    given = parser.parse_intermixed_args(arguments)
    for option, command in (("sweep", "select"), ("shard", "pack"), ("note", "remove")):
        if getattr(given, option) and given.command != command:
            parser.error(f"--{option} is for {command}")
    given.overrides = [word for word in given.words if _OVERRIDE.match(word)]
    given.pictures = [word for word in given.words if not _OVERRIDE.match(word)]
    if given.command in _WITH_PICTURES and not given.pictures:
        parser.error(f"{given.command}: which picture? a path or uri, a sha256, a source name, or a sample key")
    if given.command not in _WITH_PICTURES and given.pictures:
        parser.error(f"{given.pictures[0]!r}: expected key=value")
    return given


def _load(given: argparse.Namespace) -> DatagenConfig:
    out = [word.partition("=")[2] for word in given.overrides if word.startswith("out=")]
    recorded = (
        config_on_record(open_store(absolute(out[-1])))
        if out and given.config is None and given.command != "fit-niqe"
        else {}
    )
    return load_config(DatagenConfig, given.config, given.overrides, recorded=recorded)


def _run(given: argparse.Namespace, config: DatagenConfig) -> int:
    if given.command == "fit-niqe":
        print(fit_niqe(config))
        return 0
    store = open_store(absolute(config.out))
    if given.command == "verify":
        verify_store(store)
    elif given.command == "report":
        print("\n".join(write_report(store)))
        return 0
    elif given.command == "trace":
        text, found = trace(store, given.pictures)
        print(text)
        return 0 if found else 1
    elif given.command == "remove":
        for source in remove(config, given.pictures, given.note):
            print(f"taken down: {source}")
    elif given.command == "select" and given.sweep:
        print(sweep(config, store))
        return 0
    elif given.command == "pack" and given.shard:
        repair(config, given.shard)
    else:
        whole: dict[str, Callable[[DatagenConfig], Store]] = {"build": build, "add": add, "retry": retry}
        step = whole.get(given.command)
        if step:
            step(config)
        else:
            run_steps(config, [given.command])
    print(_made(given.command, store))
    return 0


def _made(command: str, store: Store) -> str:
    if command == "scan":
        return (
            f"inventory of {read_json(store, SUMMARY)['scan']['inputs']} pictures: {store.uri}/curation/inventory.json"
        )
    if command == "select":
        return f"{_funnel(read_json(store, SUMMARY)['select'])}\nselection: {store.uri}/curation/selection.parquet"
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
