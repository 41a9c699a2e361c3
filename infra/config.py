"""Typed configuration: one YAML file plus ``key=value`` overrides, checked before any work starts.

pydantic does the typing: it is already a dependency of Ray, DeepSpeed and MLflow, validates nested
models, literals and bounds, and reports every fault with its key path, from which the messages here
are built. Validation is strict (no ``"3"`` for 3, no ``true`` for 1), so that a typo is never a value.
"""

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from infra.errors import Refusal, without_password
from infra.files import write_atomically


class Config(BaseModel):
    """Base of every configuration: immutable, and refusing keys it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


ConfigT = TypeVar("ConfigT", bound=Config)


class ConfigError(Refusal, ValueError):
    """A configuration was refused. The message names the file, the key, what is allowed and the nearest key."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as a string; people who train networks mean a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def load_config(
    schema: type[ConfigT],
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    *,
    recorded: Mapping[str, Any] | None = None,
) -> ConfigT:
    """Read ``path`` (YAML), apply ``overrides`` (``a.b=value``, value in YAML syntax), validate against ``schema``.

    Without a ``path`` the overrides apply to ``recorded``: what an earlier run put on record.

    Every door (``ird``, ``python -m``, ``deepspeed --module``, Ray jobs) comes through here, so the
    same file and the same overrides mean the same run everywhere.

    Raises:
        ConfigError: the file is missing or not YAML, an override is malformed, a key is unknown, a
            value has the wrong type or lies outside its bounds. All faults are reported at once.
    """
    origin = str(path) if path is not None else "command line"
    data = _read_yaml(Path(path)) if path is not None else copy.deepcopy(dict(recorded or {}))
    for override in overrides:
        _apply_override(data, override)
    try:
        return schema.model_validate_json(json.dumps(data, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(schema, fault, overrides) for fault in error.errors()]
        raise ConfigError(f"{origin}: configuration refused\n" + "\n".join(f"  {line}" for line in lines)) from None


def dump_config(config: Config, path: str | Path) -> None:
    """Write the resolved configuration, defaults included, as YAML that ``load_config`` reads back."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    write_atomically(Path(path), text.encode())


def config_hash(config: Config) -> str:
    """16 hex digits that change when any resolved value changes."""
    canonical = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(path.read_text(), Loader=_Loader)
    except OSError as error:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: cannot be read ({error.strerror}){hint}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level, found {type(data).__name__}")
    return data


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise ConfigError(f"override {override!r}: expected key=value, for example optimizer.lr=1e-4")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not valid YAML: {error}") from None
    *parents, last = key.split(".")
    for parent in parents:
        child = data.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override {override!r}: {parent!r} holds a value, not a section")
        data = child
    data[last] = value


def _explain(schema: type[BaseModel], fault: Any, overrides: Sequence[str]) -> str:
    location = [str(part) for part in fault["loc"]]
    key = ".".join(location) or "(top level)"
    given = any(o.split("=", 1)[0] == key for o in overrides)
    where = f"{key} (given on the command line)" if given else key
    if fault["type"] == "extra_forbidden":
        allowed = sorted(_fields_at(schema, location[:-1]))
        near = difflib.get_close_matches(location[-1], allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{where}: unknown key{hint or '.'} Allowed here: {', '.join(allowed)}"
    if fault["type"] == "missing":
        return f"{where}: required and not given"
    return f"{where}: {fault['msg']}, got {without_password(repr(fault['input']))}"


def _fields_at(schema: type[BaseModel], location: Sequence[str]) -> set[str]:
    """Field names allowed at a key path; list indices and union tags on the way are passed over."""
    models = {schema}
    for part in location:
        below = {
            m for model in models if part in model.model_fields for m in _models_in(model.model_fields[part].annotation)
        }
        models = below or models
    return {name for model in models for name in model.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
