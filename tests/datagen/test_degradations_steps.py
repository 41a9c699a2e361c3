"""Every parameter of every step is refused with its range: in a recipe, and in a record that is replayed."""

import math
from typing import Any

import pytest
import torch

from datagen.degradations import Recipe, plan, replay
from datagen.degradations.checks import Option, Parameter
from datagen.degradations.steps import STEPS

PICTURE = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
CASES = [(step, parameter) for step, kind in STEPS.items() for parameter in kind.parameters]
NAMES = [f"{step}-{parameter.name}" for step, parameter in CASES]


def allowed(parameter: Parameter | Option) -> Any:
    """A value in the middle of the range, or the first of the options."""
    if isinstance(parameter, Option):
        return parameter.allowed[0]
    low, high = max(parameter.low, -4), min(parameter.high, 4)
    if parameter.odd:
        return 7
    return math.ceil((low + high) / 2) if parameter.integer else (low + high) / 2


def refused(parameter: Parameter | Option) -> list[Any]:
    if isinstance(parameter, Option):
        return ["neither", 0.123, math.nan]
    beyond = [parameter.low - 0.5, parameter.high + 0.5]
    if parameter.integer:
        beyond = [math.floor(parameter.low) - 1, math.ceil(parameter.high) + 1, allowed(parameter) + 0.5]
    even = [8] if parameter.odd else []
    return [*beyond, *even, math.nan, math.inf, -math.inf, "much", True]


def entry(step: str, **changes: Any) -> dict[str, Any]:
    required = {one.name: allowed(one) for one in STEPS[step].parameters if one.default is None}
    return {"name": step, **required, **changes}


def recipe(step: str, **changes: Any) -> Recipe:
    steps = [entry(step, **changes), {"name": "resize_to_output"}]
    return Recipe.model_validate({"name": "test", "chains": [{"steps": steps}]})


@pytest.mark.parametrize("step", STEPS)
def test_what_is_in_range_runs(step: str) -> None:
    meta = plan(recipe(step), seed=0, epoch=0, key="k", height=32, width=32)
    assert torch.isfinite(replay(PICTURE, meta)).all()


@pytest.mark.parametrize(("step", "parameter"), CASES, ids=NAMES)
def test_a_recipe_with_a_bad_parameter_is_refused(step: str, parameter: Parameter | Option) -> None:
    for bad in refused(parameter):
        with pytest.raises(ValueError) as error:
            recipe(step, **{parameter.name: bad})
        said = str(error.value)
        assert f"step {step}" in said and parameter.name in said, f"{bad!r}: {said}"
        assert parameter.range in said or "must be odd" in said, f"{bad!r}: {said}"


@pytest.mark.parametrize(("step", "parameter"), CASES, ids=NAMES)
def test_a_record_with_a_bad_parameter_is_refused(step: str, parameter: Parameter | Option) -> None:
    meta = plan(recipe(step), seed=0, epoch=0, key="k", height=32, width=32)
    first = meta["steps"][0]
    if parameter.name not in first:
        assert STEPS[step].resolve, "only what is resolved is recorded under another name"
        return
    for bad in refused(parameter):
        changed = {**meta, "steps": [{**first, parameter.name: bad}, *meta["steps"][1:]]}
        with pytest.raises(ValueError) as error:
            replay(PICTURE, changed)
        said = str(error.value)
        assert f"step {first['name']}" in said and parameter.name in said, f"{bad!r}: {said}"
        assert parameter.range in said or "must be odd" in said, f"{bad!r}: {said}"
