"""The gate in front of an alias, and the way back."""

from collections.abc import Callable

import pytest

from infra.tracking import TrackingConfig, connect
from pipeline.registry.promotion import history, parse_requirement, promote, rollback, set_alias
from pipeline.registry.server import RegistryError
from pipeline.registry.versions import get_version, list_versions

FIGURES = {1: {"psnr.noise_25.small": "25.5"}, 2: {"psnr.noise_25.small": "26.5"}, 3: {"psnr.noise_25.small": "nan"}}


@pytest.fixture
def name(settings: TrackingConfig, request: pytest.FixtureRequest) -> str:
    """A model of three versions with the figures above; what they would hold has no part in this."""
    client, name = connect(settings), request.node.name[:40]
    client.create_registered_model(name)
    for figures in FIGURES.values():
        client.create_model_version(name, client.get_model_version("tiny", "1").source, tags=figures)
    return name


def test_a_version_is_promoted_by_its_figures_alone(
    name: str, settings: TrackingConfig, command: Callable[..., tuple[int, str]]
) -> None:
    def try_to_promote(version: int, *requirements: str) -> tuple[int, str]:
        required = [word for text in requirements for word in ("--require", text)]
        return command("registry", "promote", name, version, "--alias", "champion", *required)

    code, said = try_to_promote(1, "psnr.noise_25.small>=25.5", "psnr.noise_25.small < 40")
    assert code == 0
    assert "met      psnr.noise_25.small >= 25.5: 25.5" in said
    code, said = try_to_promote(1, "psnr.noise_25.small≥26")
    assert code == 1
    assert "NOT MET  psnr.noise_25.small ≥ 26: 25.5" in said
    code, said = try_to_promote(2, "psnr.noise_25.small>=26", "psnr.noise_25.smal>=1")
    assert code == 1
    assert "met      psnr.noise_25.small >= 26: 26.5 (now 25.5)" in said
    assert "NOT MET  psnr.noise_25.smal >= 1: not measured" in said
    assert "did you mean psnr.noise_25.small?" in said
    assert "'champion' stays on version 1" in said
    assert try_to_promote(3, "psnr.noise_25.small>=0")[0] == 1  # no number is no figure
    assert get_version(name, None, "champion", settings)[0].version == 1
    assert try_to_promote(2, "psnr.noise_25.small>=26")[0] == 0
    assert get_version(name, None, "champion", settings)[0].version == 2
    events = history(get_version(name, 2, None, settings)[1], "champion")
    assert [(event["version"], event["how"]) for event in events] == [(1, "promoted"), (2, "promoted")]
    assert events[1]["figures"] == ["met      psnr.noise_25.small >= 26: 26.5 (now 25.5)"]


def test_rollback_goes_back_step_by_step_and_keeps_the_history(name: str, settings: TrackingConfig) -> None:
    for version in (1, 2, 3, 3):
        set_alias(name, version, "champion", settings)
    assert rollback(name, "champion", settings) == (3, 2)
    assert rollback(name, "champion", settings) == (2, 1)
    with pytest.raises(RegistryError, match="on version 1 and was on no other before"):
        rollback(name, "champion", settings)
    set_alias(name, 3, "champion", settings)
    assert rollback(name, "champion", settings) == (3, 1)
    hows = [(e["version"], e["how"]) for e in history(get_version(name, 1, None, settings)[1], "champion")]
    assert hows[3:] == [(3, "set"), (2, "rolled back"), (1, "rolled back"), (3, "set"), (1, "rolled back")]


def test_rollback_knows_moves_that_were_made_elsewhere_and_versions_that_are_gone(
    name: str, settings: TrackingConfig
) -> None:
    client = connect(settings)
    client.set_registered_model_alias(name, "champion", "1")  # in MLflow's own page
    set_alias(name, 2, "champion", settings)
    client.set_registered_model_alias(name, "champion", "3")
    client.delete_model_version(name, "2")
    assert rollback(name, "champion", settings) == (3, 1)


def test_aliases_move_and_are_listed(name: str, settings: TrackingConfig) -> None:
    set_alias(name, 2, "next", settings)
    set_alias(name, 1, "next", settings)
    assert [row.aliases for row in list_versions(settings, name)] == [(), (), ("next",)]


@pytest.mark.parametrize("text", ["psnr.a.b", "psnr.a.b=30", ">=30", "psnr.a.b>=high", "psnr.a.b>=", "a>=1>=2"])
def test_requirements_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(RegistryError, match="expected FIGURE>=NUMBER"):
        parse_requirement(text)


def test_bad_requests_are_refused_clearly(name: str, settings: TrackingConfig) -> None:
    with pytest.raises(RegistryError, match="give --require"):
        promote(name, 1, "champion", [], settings)
    with pytest.raises(RegistryError, match=r"no version 99 .* its versions: 1, 2, 3"):
        promote(name, 99, "champion", [parse_requirement("a>=1")], settings)
    with pytest.raises(RegistryError, match="no alias 'champion'"):
        rollback(name, "champion", settings)
    with pytest.raises(RegistryError, match="no version 99"):
        set_alias(name, 99, "champion", settings)
