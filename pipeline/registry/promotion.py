"""Aliases: a gate of figures in front of them, a history behind them, and the way back."""

import difflib
import json
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from infra.errors import Refusal
from infra.tracking import TrackingConfig
from pipeline.registry.server import (
    RegistryError,
    connect_to_registry,
    explained,
    find_version,
    get_model,
    where_is,
)
from pipeline.registry.versions import ModelVersion, get_version

_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "≥": operator.ge,
    "<=": operator.le,
    "≤": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
_REQUIREMENT = re.compile(r"\s*([^<>≥≤=\s]+)\s*(>=|<=|≥|≤|>|<)\s*([-+0-9.eE]+)\s*")
_KEPT_EVENTS = 100


class GateError(Refusal, RuntimeError):
    """A version does not meet what was required of it. The message has every figure; no alias was moved."""


@dataclass(frozen=True)
class Requirement:
    """``figure`` compared with ``bound``, as in ``psnr.noise_25.small >= 29.5``."""

    figure: str
    comparison: str
    bound: float

    def met_by(self, found: float | None) -> bool:
        """Whether a measured value suffices. One that is missing, or not a number, does not."""
        return found is not None and not math.isnan(found) and _COMPARISONS[self.comparison](found, self.bound)


@dataclass(frozen=True)
class Check:
    """What one requirement found: in the version to promote, and in the one that has the alias now."""

    requirement: Requirement
    found: float | None
    now: float | None

    @property
    def met(self) -> bool:
        """Whether the version to promote meets it."""
        return self.requirement.met_by(self.found)

    def __str__(self) -> str:
        wanted = f"{self.requirement.figure} {self.requirement.comparison} {self.requirement.bound:g}"
        found = "not measured" if self.found is None else f"{self.found:g}"
        now = "" if self.now is None else f" (now {self.now:g})"
        return f"{'met' if self.met else 'NOT MET':<7}  {wanted}: {found}{now}"


def parse_requirement(text: str) -> Requirement:
    """``FIGURE>=NUMBER``; also <=, >, <.

    Raises:
        RegistryError: the text is no such thing.
    """
    match = _REQUIREMENT.fullmatch(text)
    try:
        if match is None:
            raise ValueError
        return Requirement(match[1], match[2], float(match[3]))
    except ValueError:
        raise RegistryError(
            f"--require {text!r}: expected FIGURE>=NUMBER (or <=, >, <), for example 'psnr.noise_25.small>=29.5'; "
            "`ird registry show` lists the figures of a version"
        ) from None


def promote(
    name: str, version: int, alias: str, requirements: Sequence[Requirement], settings: TrackingConfig
) -> list[Check]:
    """Let ``alias`` point to ``version`` if its figures meet every requirement.

    Raises:
        GateError: one is not met, or its figure was never measured; the alias stays where it is.
        RegistryError: no such version, nothing required, or the server does not answer.
    """
    if not requirements:
        raise RegistryError(
            "promote requires something: give --require; `ird registry alias` moves an alias without a gate"
        )
    candidate, _ = get_version(name, version, None, settings)
    champion = _holder(name, alias, settings)
    now = champion.figures if champion is not None and champion.version != version else {}
    checks = [Check(needed, candidate.figures.get(needed.figure), now.get(needed.figure)) for needed in requirements]
    if not all(check.met for check in checks):
        lines = [f"models:/{name}/{version} is not promoted to {alias!r}:", *(f"  {check}" for check in checks)]
        for check in checks:
            near = difflib.get_close_matches(check.requirement.figure, candidate.figures, n=3)
            if check.found is None and near:
                lines.append(f"  {check.requirement.figure}: did you mean {' or '.join(near)}?")
        if champion is not None:
            lines.append(f"  {alias!r} stays on version {champion.version}")
        raise GateError("\n".join(lines))
    _move(name, version, alias, "promoted", settings, [str(check) for check in checks])
    return checks


def set_alias(name: str, version: int, alias: str, settings: TrackingConfig) -> None:
    """Let ``alias`` point to ``version``, and to no other version of ``name`` any more. Without a gate.

    Raises:
        RegistryError: no such model or version, an alias that MLflow does not allow, or the server does not answer.
    """
    _move(name, version, alias, "set", settings)


def rollback(name: str, alias: str, settings: TrackingConfig) -> tuple[int, int]:
    """Let ``alias`` point again to what it pointed to before; versions deleted since are passed over.

    Returns:
        The version that it pointed to, and the one that it points to now.

    Raises:
        RegistryError: no such model or alias, there was no version before, or the server does not answer.
    """
    client = connect_to_registry(settings)
    with explained(settings):
        present = find_version(client, name, None, alias, settings)
        events = _events(client, name, alias, present)
        there = {int(found.version) for found in client.search_model_versions(f"name='{name}'")}
    earlier = [version for version in _stack(events)[:-1] if version in there and version != present]
    if not earlier:
        raise RegistryError(
            f"model {name}: {alias!r} is on version {present} and was on no other before, at {where_is(settings)}; "
            "`ird registry alias` moves it to any version"
        )
    _move(name, earlier[-1], alias, "rolled back", settings)
    return present, earlier[-1]


def history(model_tags: Mapping[str, str], alias: str) -> list[dict[str, Any]]:
    """Where ``alias`` has pointed, the oldest first: version, how (set, promoted, rolled back), at (UTC), figures."""
    try:
        return list(json.loads(model_tags.get(_tag(alias), "[]")))
    except ValueError:
        return []


def _move(name: str, version: int, alias: str, how: str, settings: TrackingConfig, figures: Sequence[str] = ()) -> None:
    client = connect_to_registry(settings)
    with explained(settings):
        version = find_version(client, name, version, None, settings)
        present = get_model(client, name, settings).aliases.get(alias)
        events = _events(client, name, alias, present and int(present))
        event = {"version": version, "how": how, "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"}
        if figures:
            event["figures"] = list(figures)
        # The alias first: when this is killed in between, the next move sees that the history lacks one.
        client.set_registered_model_alias(name, alias, str(version))
        client.set_registered_model_tag(name, _tag(alias), json.dumps([*events, event][-_KEPT_EVENTS:]))


def _holder(name: str, alias: str, settings: TrackingConfig) -> ModelVersion | None:
    client = connect_to_registry(settings)
    with explained(settings):
        present = get_model(client, name, settings).aliases.get(alias)
    return get_version(name, int(present), None, settings)[0] if present is not None else None


def _events(client: Any, name: str, alias: str, present: int | None) -> list[dict[str, Any]]:
    """The history, with a move that was made elsewhere (MLflow's page) put in."""
    events = history(client.get_registered_model(name).tags, alias)
    stack = _stack(events)
    if present is not None and (not stack or stack[-1] != present):
        events.append({"version": present, "how": "set elsewhere", "at": ""})
    return events


def _stack(events: Sequence[Mapping[str, Any]]) -> list[int]:
    """What lies behind the present version; a rollback takes away what it left, so that the next one goes further."""
    stack: list[int] = []
    for event in events:
        if event["how"] == "rolled back" and event["version"] in stack:
            del stack[len(stack) - stack[::-1].index(event["version"]) :]
        elif not stack or stack[-1] != event["version"]:
            stack.append(event["version"])
    return stack


def _tag(alias: str) -> str:
    return f"alias_history.{alias}"
