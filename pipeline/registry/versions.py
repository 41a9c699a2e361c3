"""What versions the registry holds, and all that is known of one."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from infra.tracking import TrackingConfig
from pipeline.registry.server import all_models, connect_to_registry, explained, find_version, get_model

_FIGURES = ("psnr.", "ssim.")


@dataclass(frozen=True)
class ModelVersion:
    """One version. Its tags hold variants, origin and figures; see ``pipeline.registry.pushing.push``."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    created: datetime
    tags: Mapping[str, str]

    @property
    def variants(self) -> tuple[str, ...]:
        """Names of the variants that this version holds."""
        return tuple(filter(None, self.tags.get("variants", "").split(",")))

    @property
    def figures(self) -> dict[str, float]:
        """What was measured: ``psnr.TASK.VARIANT`` in dB, ``ssim.TASK.VARIANT``, and any other tag that is a number."""
        figures = {}
        for name, text in self.tags.items():
            try:
                figures[name] = float(text)
            except ValueError:
                continue
        return {name: value for name, value in sorted(figures.items()) if "." in name}

    def figure_table(self) -> dict[tuple[str, str], dict[str, float]]:
        """Of (metric, task), each variant's figure."""
        table: dict[tuple[str, str], dict[str, float]] = {}
        for name, value in self.figures.items():
            if name.startswith(_FIGURES) and name.count(".") >= 2:
                metric, _, rest = name.partition(".")
                task, _, variant = rest.rpartition(".")
                table.setdefault((metric, task), {})[variant] = value
        return table


def list_versions(settings: TrackingConfig, name: str | None = None) -> list[ModelVersion]:
    """Versions of ``name``, or of all models, by name and then the newest first.

    Raises:
        RegistryError: no model of that name, or the server does not answer.
    """
    client = connect_to_registry(settings)
    rows = []
    with explained(settings):
        for model in [get_model(client, name, settings)] if name is not None else all_models(client):
            rows += [_version(model, found) for found in client.search_model_versions(f"name='{model.name}'")]
    return sorted(rows, key=lambda row: (row.name, -row.version))


def get_version(
    name: str, version: int | None, alias: str | None, settings: TrackingConfig
) -> tuple[ModelVersion, Mapping[str, str]]:
    """One version by its number or by an alias, and the tags of its model, which hold the history of the aliases.

    Raises:
        RegistryError: no such model, version or alias, or the server does not answer.
    """
    client = connect_to_registry(settings)
    with explained(settings):
        version = find_version(client, name, version, alias, settings)
        model = client.get_registered_model(name)
        return _version(model, client.get_model_version(name, str(version))), model.tags


def _version(model: Any, found: Any) -> ModelVersion:
    aliases = tuple(sorted(alias for alias, version in model.aliases.items() if int(version) == int(found.version)))
    created = datetime.fromtimestamp(found.creation_timestamp / 1000, UTC)
    return ModelVersion(model.name, int(found.version), aliases, found.run_id or "", created, found.tags)
