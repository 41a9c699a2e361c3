"""MDSR's stage: one scale a step, and branches that idle stay bit for bit what they were."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from infra.config import ConfigError, load_config
from infra.launcher import free_port
from tests.support.dataset import REPOSITORY
from training.config import OptimizerConfig
from training.export import load_export
from training.mdsr import MDSRStageConfig, hold_idle_branches, mdsr_objective, scale_of_step
from training.models import MDSRConfig, build_model
from training.models.edsr import branch_of
from training.optimization import BRANCH, make_optimizer

CONFIG = REPOSITORY / "configs/training/mdsr.yaml"
SMALL = ["model.blocks=1", "model.features=8", "context=0", "data.patch=24", "data.batch=4", "data.workers=0"]


def test_scales_are_drawn_evenly_and_by_the_step_alone() -> None:
    drawn = [scale_of_step((2, 3, 4), 0, step) for step in range(300)]
    assert drawn == [scale_of_step((2, 3, 4), 0, step) for step in range(300)]
    assert all(80 < drawn.count(scale) < 120 for scale in (2, 3, 4))


def test_each_branch_is_a_group_of_its_own() -> None:
    model = build_model(MDSRConfig(blocks=1, features=8))
    optimizer = make_optimizer(model, OptimizerConfig())
    assert [group.get(BRANCH, "") for group in optimizer.param_groups] == ["", "x2", "x3", "x4"]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert branch_of("preprocess.x3.0.conv1.weight") == branch_of("upsampler.x3.0.bias") == "x3"
    assert branch_of("trunk.0.conv1.weight") == branch_of("upsampler.0.weight") == ""  # an EDSR's has no branches


def test_idle_branches_do_not_move_by_gradients_of_zero() -> None:
    """After momentum has built up; without the hook the same gradients move them."""
    moved = {}
    for held in (True, False):
        torch.manual_seed(0)
        model = build_model(MDSRConfig(blocks=1, features=8))
        optimizer = make_optimizer(model, OptimizerConfig(name="adamw", lr=1e-2, weight_decay=0.1))
        active: list[str] = []
        if held:
            hold_idle_branches(optimizer, functools.partial(active.__getitem__, -1))
        for branch in ("x2", "x3"):
            active.append(branch)
            model(torch.rand(1, 3, 8, 8), branch).mean().backward()
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
        moved[held] = {branch_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved[True] == {"", "x3"}
    assert moved[False] == {"", "x2", "x3", "x4"}


def test_the_lr_patch_has_one_side_at_every_scale() -> None:
    config = load_config(MDSRStageConfig, CONFIG, SMALL)
    sides: dict[int, set[int]] = {2: set(), 3: set(), 4: set()}

    class Network:
        engine = SimpleNamespace(
            zero_optimization_stage=lambda: 0, optimizer=torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
        )

        def __call__(self, low: torch.Tensor, variant: str) -> torch.Tensor:
            scale = int(variant[1:])
            sides[scale].add(low.shape[-1])
            return low.repeat_interleave(scale, -1).repeat_interleave(scale, -2).requires_grad_()

    objective = mdsr_objective(config)
    for step in range(12):
        loss, metrics = objective(Network(), {"clean": torch.rand(2, 3, 24, 24)}, step)
        assert set(metrics) == {"loss", f"loss_x{scale_of_step((2, 3, 4), config.seed, step)}"}
        assert 0 < float(loss.detach()) < 0.5
    assert sides == {2: {6}, 3: {6}, 4: {6}}


@pytest.mark.slow
def test_two_ranks_equal_plain_torch_in_every_stage_of_zero(tmp_path: Path) -> None:
    """Plain torch never gives an idle branch a gradient. Without the hook the same comparison fails by far."""
    result = tmp_path / "differences.json"
    launch = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"]
    launch += ["--master_port", str(free_port()), "--module", "tests.training.mdsr_engines", str(result)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert result.exists(), done.stdout + done.stderr
    differences = json.loads(result.read_text())
    # Adam's first steps are of the size of the rate, 1e-3, whatever the gradient's; its rounding is not.
    assert all(differences[f"stage {stage}"] < 2e-5 for stage in (0, 1, 2)), differences
    assert differences["idle branches not held"] > 1e-3


@pytest.mark.slow
def test_the_stage_runs_and_exports_all_scales(small_dataset: Path, tmp_path: Path) -> None:
    more = [*SMALL, f"data.dataset={small_dataset}", f"out={tmp_path / 'out'}", "steps=4", "log_every=2"]
    command = [sys.executable, "-m", "training.mdsr", "--config", str(CONFIG), *more, "tracking.enabled=false"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    network, _, metadata = load_export(tmp_path / "out" / "export")
    assert metadata["stage"] == "mdsr"
    assert network(torch.rand(1, 3, 5, 6), "x3").shape == (1, 3, 15, 18)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["data.patch=26"], "multiple of the largest scale 4"),
        (["context=3"], "nothing is left"),
        (["model={name: edsr}"], "trains name: mdsr"),
    ],
)
def test_inconsistent_settings_are_refused(more: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(MDSRStageConfig, CONFIG, [*SMALL, *more])
