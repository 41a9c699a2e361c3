"""Recipes: which degradations, in which order, with which parameters and probabilities. Data, one YAML file each."""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Discriminator, Field, SerializerFunctionWrapHandler, Tag, model_serializer, model_validator

from datagen.degradations.checks import Option, Parameter
from datagen.degradations.steps import STEPS
from infra.config import Config, ConfigError, load_config

RECIPES = Path(__file__).resolve().parents[2] / "configs" / "degradations"
"""Beside the packages of the checkout, where an editable install and the working directory of a Ray or DeepSpeed job
have it too."""

Value = bool | int | float | str


class Distribution(Config):
    """How one parameter is drawn. In YAML a bare value, or exactly one of the keys below.

    ``uniform: [low, high]``; ``log_uniform: [low, high]``; ``integers: [low, high]``, both ends included;
    ``choice: [a, b, ...]`` with optional ``weights``.
    """

    value: Value | None = None
    uniform: list[float] | None = Field(None, min_length=2, max_length=2)
    log_uniform: list[float] | None = Field(None, min_length=2, max_length=2)
    integers: list[int] | None = Field(None, min_length=2, max_length=2)
    choice: list[Value] | None = Field(None, min_length=1)
    weights: list[Annotated[float, Field(ge=0)]] | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_bare_value(cls, data: Any) -> Any:
        return {"value": data} if isinstance(data, bool | int | float | str) else data

    @model_validator(mode="after")
    def _check(self) -> "Distribution":
        given = [
            name
            for name in ("value", "uniform", "log_uniform", "integers", "choice")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise ValueError(
                f"give a bare value or exactly one of uniform, log_uniform, integers, choice; found {given}"
            )
        low_high = self.uniform or self.log_uniform or self.integers
        if low_high and low_high[0] > low_high[1]:
            raise ValueError(f"{given[0]}: [low, high] must be in ascending order, got {low_high}")
        if self.log_uniform and self.log_uniform[0] <= 0:
            raise ValueError(f"log_uniform: both ends must be positive, got {self.log_uniform}")
        if self.weights is not None and (
            self.choice is None or len(self.weights) != len(self.choice) or sum(self.weights) <= 0
        ):
            raise ValueError("weights: one for each entry of choice, not all 0")
        return self

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in handler(self).items() if value is not None}

    def extremes(self) -> list[Any]:
        """Values that bound everything that can be drawn; all of them, for a choice."""
        if self.value is not None:
            return [self.value]
        return list(self.choice or self.uniform or self.log_uniform or self.integers or [])

    def sample(self, rng: np.random.Generator) -> Value:
        """One value."""
        if self.value is not None:
            return self.value
        if self.choice is not None:
            return self.choice[_pick(rng, self.weights or [1.0] * len(self.choice))]
        if self.integers is not None:
            return int(rng.integers(self.integers[0], self.integers[1] + 1))
        if self.log_uniform is not None:
            low, high = self.log_uniform
            return float(np.exp(rng.uniform(np.log(low), np.log(high))))
        assert self.uniform is not None
        return float(rng.uniform(self.uniform[0], self.uniform[1]))


class Step(Config):
    """One degradation: its name in ``steps.STEPS``, the probability ``p`` that it happens, and its parameters."""

    name: str
    p: float = Field(1.0, ge=0, le=1)
    parameters: dict[str, Distribution] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _gather_parameters(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "parameters" in data:
            return data
        own = {key: value for key, value in data.items() if key in ("name", "p")}
        return own | {"parameters": {key: value for key, value in data.items() if key not in own}}

    @model_validator(mode="after")
    def _check_parameters(self) -> "Step":
        if self.name not in STEPS:
            raise ValueError(f"unknown step {self.name!r}{_nearest(self.name, STEPS)} Allowed: {', '.join(STEPS)}")
        known = STEPS[self.name].named()
        for name, distribution in self.parameters.items():
            if name not in known:
                allowed = ", ".join(known) or "(none)"
                raise ValueError(
                    f"step {self.name}: unknown parameter {name!r}{_nearest(name, known)} Allowed: {allowed}"
                )
            try:
                _check_range(known[name], distribution)
            except ValueError as error:
                raise ValueError(f"step {self.name}: {error}") from None
        missing = [name for name, one in known.items() if one.default is None and name not in self.parameters]
        if missing:
            needs = "; ".join(f"{name}: {known[name].range}" for name in missing)
            raise ValueError(f"step {self.name}: required and not given: {needs}")
        return self

    def sample(self, rng: np.random.Generator) -> dict[str, Any]:
        """One set of parameters, defaults included, each in the type its declaration asks for."""
        values: dict[str, Any] = {}
        for name, parameter in STEPS[self.name].named().items():
            if name in self.parameters:
                values[name] = parameter.check(self.parameters[name].sample(rng))
            else:
                values[name] = _default(parameter, values)
        return values


class OneOf(Config):
    """Exactly one of several chains, drawn by weight, with probability ``p`` that any is."""

    one_of: list["Chain"] = Field(min_length=1)
    p: float = Field(1.0, ge=0, le=1)


class Shuffle(Config):
    """Entries in random order. Steps that resize keep their written order among themselves, or sizes would be lost."""

    shuffle: list["Entry"] = Field(min_length=1)


def _kind(data: Any) -> str:
    keys = data if isinstance(data, dict) else vars(data)
    return next((key for key in ("one_of", "shuffle") if key in keys), "step")


Entry = Annotated[
    Annotated[OneOf, Tag("one_of")] | Annotated[Shuffle, Tag("shuffle")] | Annotated[Step, Tag("step")],
    Discriminator(_kind),
]


class Chain(Config):
    """A sequence of steps, and the weight with which it is chosen among its siblings."""

    label: str = ""
    weight: float = Field(1.0, ge=0)
    steps: list[Entry] = Field(default_factory=list)


class Recipe(Config):
    """A weighted list of chains: each sample draws one.

    ``scale``: the output is the input's size divided by it (``resize_to_output`` goes there). ``output``: what the
    last act is: 'clipped' to [0, 1], '8bit' (clipped and rounded to 256 levels, as stored pictures are) or 'float'
    (nothing, values may leave [0, 1] where a step says so).
    """

    name: str = Field(min_length=1)
    scale: int = Field(1, ge=1, le=16)
    output: Literal["clipped", "8bit", "float"] = "clipped"
    chains: list[Chain] = Field(min_length=1)

    @model_validator(mode="after")
    def _check_weights(self) -> "Recipe":
        if sum(chain.weight for chain in self.chains) <= 0:
            raise ValueError("chains: at least one weight must be above 0")
        return self


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe ``configs/degradations/NAME.yaml``, or the one in the given YAML file.

    Raises:
        ConfigError: no such recipe (the known ones are listed), or its contents are refused.
    """
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return load_config(Recipe, path)
    known = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    name = str(name_or_path)
    if name not in known:
        allowed = ", ".join(known) or f"none found in {RECIPES}"
        raise ConfigError(f"unknown recipe {name!r}{_nearest(name, known)} Known: {allowed}; or give a .yaml file")
    return load_config(Recipe, known[name])


def choose(chains: list[Chain], rng: np.random.Generator) -> Chain:
    """One chain, by weight."""
    return chains[_pick(rng, [chain.weight for chain in chains])]


def _pick(rng: np.random.Generator, weights: list[float]) -> int:
    bounds = np.cumsum(weights)
    return int(np.searchsorted(bounds, rng.uniform(0, bounds[-1]), side="right"))


def _check_range(parameter: Parameter | Option, distribution: Distribution) -> None:
    for value in distribution.extremes():
        parameter.check(value)
    if isinstance(parameter, Parameter):
        if parameter.integer and (distribution.uniform or distribution.log_uniform):
            raise ValueError(f"{parameter.name}: draws whole numbers only; use integers: [low, high] or choice")
        if parameter.odd and distribution.integers:
            raise ValueError(f"{parameter.name}: draws odd numbers only; use choice: [7, 9, 11]")


def _default(parameter: Parameter | Option, drawn: dict[str, Any]) -> Any:
    if isinstance(parameter, Parameter):
        same_as = parameter.default
        return drawn[same_as] if isinstance(same_as, str) else parameter.check(same_as)
    return parameter.default


def _nearest(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."
