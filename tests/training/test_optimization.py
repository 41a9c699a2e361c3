"""Schedules and the moving average, by their formulas."""

import math

import pytest
import torch

from training.config import OptimizerConfig, ScheduleConfig
from training.optimization import MovingAverage, learning_rate, make_optimizer


def rates(schedule: ScheduleConfig, steps: int = 100) -> list[float]:
    return [learning_rate(step, steps, 1.0, schedule) for step in range(steps)]


def test_constant_after_linear_warm_up() -> None:
    values = rates(ScheduleConfig(kind="constant", warmup=4))
    assert values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] and set(values[4:]) == {1.0}


def test_cosine_falls_from_the_base_to_the_floor() -> None:
    values = rates(ScheduleConfig(kind="cosine", warmup=10, floor=0.1))
    assert values[10] == 1.0 and values == values[:10] + sorted(values[10:], reverse=True)
    assert values[55] == pytest.approx(0.55) and values[-1] == pytest.approx(0.1, abs=1e-3)


def test_halving_as_edsr_has_it() -> None:
    values = rates(ScheduleConfig(kind="halve", halve_every=30, floor=0.2))
    assert (values[29], values[30], values[60], values[90]) == (1.0, 0.5, 0.25, 0.2)


def test_optimizers_are_those_of_torch() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    adamw = make_optimizer(model, OptimizerConfig(name="adamw", weight_decay=0.1, betas=(0.8, 0.9)))
    assert isinstance(adamw, torch.optim.AdamW) and adamw.defaults["betas"] == (0.8, 0.9)
    assert [p.shape for g in adamw.param_groups for p in g["params"]] == [(2, 2)]
    assert type(make_optimizer(model, OptimizerConfig())) is torch.optim.Adam


def test_moving_average_by_its_formula_and_over_a_resume() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    expected, average = model.weight.item(), MovingAverage(model, 0.9)
    for n in range(1, 30):
        with torch.no_grad():
            model.weight.fill_(math.sin(n))
        average.update(model)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * math.sin(n)
        if n == 15:
            resumed = MovingAverage(torch.nn.Linear(1, 1, bias=False), 0.9)
            resumed.load_state_dict(average.state_dict())
            average = resumed
    assert average.weights["weight"].item() == pytest.approx(expected, abs=1e-6)
