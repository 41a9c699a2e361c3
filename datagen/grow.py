"""Add: new pictures become new shards, and the shards that are there keep their bytes and their names."""

from typing import Any

from datagen.config import DatagenConfig, SourceConfig, absolute, name_of
from datagen.dataset import DatasetError, read_dataset_json
from datagen.scan.scan import scan_batches
from datagen.source.batches import read_batches
from datagen.source.listing import list_pictures
from infra.config import ConfigError
from infra.storage import Store

# Settings from which the shards that are there follow.
_FROZEN = ("seed", "leak_guard", "select", "tiles", "pack")


def merge_sources(
    config: DatagenConfig, recorded: tuple[SourceConfig, ...]
) -> tuple[DatagenConfig, tuple[SourceConfig, ...]]:
    """``config`` with the sources on record before its own new ones, and its own as they are then named.

    Each keeps the name that it has, or gets one.

    Raises:
        ConfigError: a source on record is given another name or licence.
    """
    merged = [source.model_copy(update={"name": name_of(source, i)}) for i, source in enumerate(recorded)]
    places = {absolute(source.uri): source for source in merged}
    for source in config.source:
        known = places.get(absolute(source.uri))
        if known is None:
            merged.append(source.model_copy(update={"name": name_of(source, len(merged))}))
        elif source.name not in (None, known.name) or source.licence not in ("", known.licence):
            raise ConfigError(f"source {source.uri!r}: on record as {known.name!r} with licence {known.licence!r}")
    # Through the constructor, which refuses two sources of one name.
    grown = DatagenConfig(**{**config.model_dump(), "source": [source.model_dump() for source in merged]})
    own = {absolute(source.uri) for source in config.source}
    return grown, tuple(source for source in grown.source if absolute(source.uri) in own)


def require_same_settings(config: DatagenConfig, store: Store) -> None:
    """Refuse settings under which the shards that are there would come out otherwise.

    Raises:
        ConfigError: naming the first key that differs.
        DatasetError: there is no finished dataset to add to.
    """
    packed = DatagenConfig(**{**read_dataset_json(store)["config"], "out": store.uri})
    for name in _FROZEN:
        now, then = getattr(config, name), getattr(packed, name)
        if name == "leak_guard":
            now, then = ([absolute(source.uri) for source in guard] for guard in (now, then))
        if now != then:
            raise ConfigError(
                f"{name}: not what {store.uri} was packed with, so its shards would change; leave it as it was, or "
                "run `python -m datagen build`, which packs everything anew"
            )


def scan_new(config: DatagenConfig, store: Store, sources: tuple[SourceConfig, ...]) -> dict[str, Any]:
    """Scan the pictures of ``sources`` that are on record in no batch, as one more batch.

    Raises:
        DatasetError: nothing was scanned here yet.
    """
    batches = read_batches(store)
    if not batches:
        raise DatasetError(f"{store.uri}: nothing to add to; `python -m datagen build` makes a dataset")
    known = {picture.source: picture for batch in batches for picture in batch}
    pictures, others = list_pictures(sources)
    new = [picture for picture in pictures if picture.source not in known]
    changed = sum(picture.source in known and picture != known[picture.source] for picture in pictures)
    facts = scan_batches(config, store, [*batches, new] if new else batches)
    return {**facts, "added": len(new), "changed": changed, "files_without_picture_suffix": others}
