"""What stages measure while they train, for networks that are not simply called."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from datagen.degradations.kernels import EVALUATION_KERNELS
from datagen.degradations.resample import imresize
from datagen.picture.region import decode_whole
from datagen.source.embedded import materialise
from infra.config import load_config
from tests.support.dataset import REPOSITORY
from training.adaptation import Assumption, adapt, enlarge, shrink_blurred
from training.benchmark import to_picture
from training.config import ValidationConfig
from training.evaluate import read_pictures, write_picture
from training.mdsr import tasks_of_scales
from training.metrics import compare
from training.models import MDSRConfig, MZSRConfig, build_model
from training.mzsr import MZSRStageConfig, large_scale_task, one_step_tasks
from training.validation import Task, Validator


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Held-out photographs, and a group of one rank."""
    root = tmp_path_factory.mktemp("corpus")
    materialise(root)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield root / "held_out"
    dist.destroy_process_group()


def measured(tasks: list[Task], pictures: Path, model: torch.nn.Module) -> dict[str, dict[str, float]]:
    config = ValidationConfig(pictures=str(pictures), crop=48, limit=2, grid=1)
    scores, grid = Validator(config, tasks, 0, torch.device("cpu")).measure(model, None)
    assert grid is not None and grid.shape == (48 * len(tasks), 48 * 3, 3)
    return scores


def mean_psnr(pictures: Path, restore: object) -> float:
    clean = list(read_pictures(pictures, 48).values())[:2]
    return sum(compare(to_picture(restore(one)), to_picture(one))["psnr"] for one in clean) / 2  # type: ignore[operator]


def test_every_scale_of_mdsr_is_measured(pictures: Path) -> None:
    config = MDSRConfig(blocks=1, features=8, scales=(2, 4))
    torch.manual_seed(0)
    model = build_model(config)
    scores = measured(tasks_of_scales(config), pictures, model)
    assert {variant: list(tasks) for variant, tasks in scores.items()} == {"x2": ["x2"], "x4": ["x4"]}

    @torch.no_grad()
    def by_four(clean: torch.Tensor) -> torch.Tensor:
        return model(imresize(clean, 1 / 4, round_to_uint8=True).clamp(0, 1), "x4")

    assert scores["x4"]["x4"] == pytest.approx(mean_psnr(pictures, by_four))


def test_the_large_scale_stage_is_measured_on_enlarged_pictures(pictures: Path) -> None:
    torch.manual_seed(0)
    model = build_model(MZSRConfig(layers=3, features=8))
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()  # what is left is the enlargement by bicubic
    scores = measured([large_scale_task(2)], pictures, model)
    bicubic = mean_psnr(pictures, lambda one: imresize(imresize(one, 0.5, round_to_uint8=True).clamp(0, 1), 2))
    assert scores == {"default": {"x2": pytest.approx(bicubic)}}


@pytest.mark.parametrize(("subsample", "kernels"), [("direct", ["g_0.2", "g_2.0", "g_ani"]), ("bicubic", ["g_1.3"])])
def test_meta_trained_weights_are_measured_after_one_step(pictures: Path, subsample: str, kernels: list[str]) -> None:
    config = load_config(
        MZSRStageConfig, REPOSITORY / "configs/training/mzsr_meta_demo.yaml", [f"subsample={subsample}"]
    )
    torch.manual_seed(0)
    model = build_model(MZSRConfig(layers=3, features=8))
    scores = measured(one_step_tasks(config), pictures, model)
    assert list(scores["default"]) == kernels
    kernel, assume = EVALUATION_KERNELS[kernels[-1]].float(), Assumption(config.subsample)
    rate = 0.02 if subsample == "direct" else 0.01

    def one_step(clean: torch.Tensor) -> torch.Tensor:
        low = (shrink_blurred(clean, kernel, 2, config.subsample).clamp(0, 1) * 255).round() / 255
        return enlarge(model, adapt(model, low, kernel, 2, (rate,), assume).weights, low, 2, assume)

    assert scores["default"][kernels[-1]] == pytest.approx(mean_psnr(pictures, one_step))
    assert all(weight.grad is None for weight in model.parameters())


def test_an_adaptation_begins_at_the_weights_that_it_is_given(pictures: Path) -> None:
    """A moving average is measured by itself, while the network holds other weights."""
    config = load_config(MZSRStageConfig, REPOSITORY / "configs/training/mzsr_meta_demo.yaml", [])
    torch.manual_seed(0)
    average, model = (build_model(MZSRConfig(layers=3, features=8)) for _ in range(2))
    low = next(iter(read_pictures(pictures, 48).values()))
    (task, *_) = one_step_tasks(config)
    expected = task.restore(average, None, low, "default")
    assert torch.equal(task.restore(model, dict(average.named_parameters()), low, "default"), expected)
    assert not torch.equal(task.restore(model, None, low, "default"), expected)


def test_the_sample_grid_shows_degraded_restored_and_clean(pictures: Path, tmp_path: Path) -> None:
    config = ValidationConfig(pictures=str(pictures), crop=48, limit=1, grid=1)
    model = build_model(MZSRConfig(layers=3, features=8))
    _, grid = Validator(config, [large_scale_task(2)], 0, torch.device("cpu")).measure(model, None)
    assert grid is not None
    write_picture(tmp_path / "grid.png", grid)
    shown = decode_whole((tmp_path / "grid.png").read_bytes())
    clean = next(iter(read_pictures(pictures, 48).values()))
    assert (shown[:, 96:] == to_picture(clean)).all()
    assert (shown[:2, :2] == shown[0, 0]).all()  # one LR pixel, enlarged
