"""EDSR's stage: what it starts from, and LR patches that are those of the published files."""

from pathlib import Path

import pytest
import torch

from datagen.degradations.resample import imresize
from infra.config import ConfigError, load_config
from tests.support.dataset import REPOSITORY
from training.corruption import shrink
from training.edsr import EDSRStageConfig, super_resolution_l1, train_edsr, without_context
from training.export import load_export, save_export
from training.mdsr import MDSRStageConfig
from training.models import DyNetConfig, EDSRConfig, ModelConfig, build_model
from training.models.cost import count_cost
from training.start import check_start, start_from_other_scale

CONFIGS = REPOSITORY / "configs/training"
SMALL = {"blocks": 2, "features": 8}


def exported(folder: Path, config: ModelConfig) -> Path:
    torch.manual_seed(7)
    save_export(build_model(config), config, folder, {})
    return folder


@pytest.mark.parametrize(
    ("name", "parameters", "lr_patch"),
    [
        ("edsr_x2", 1_369_859, 48),
        ("edsr_x3", 1_554_499, 48),
        ("edsr_x4", 1_517_571, 48),
        ("edsr_full_x2", 40_729_603, 48),
        ("edsr_x2_cpu", 1_369_859, 24),
    ],
)
def test_the_papers_settings(name: str, parameters: int, lr_patch: int) -> None:
    config = load_config(EDSRStageConfig, CONFIGS / f"{name}.yaml", [])
    assert isinstance(config.model, EDSRConfig)
    assert count_cost(config.model, "default", 8, 8).parameters == parameters
    assert config.data.patch // config.model.scale - 2 * config.context == lr_patch
    assert config.data.batch == 16


def test_mdsrs_settings() -> None:
    for more, parameters in (([], 3_227_203), (["model.blocks=80"], 7_953_987)):
        config = load_config(MDSRStageConfig, CONFIGS / "mdsr.yaml", more)
        assert count_cost(config.model, "x2", 8, 8).parameters == parameters
        assert config.data.patch // 4 - 2 * config.context == 48


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_a_patch_with_context_is_that_of_the_whole_pictures_lr(scale: int) -> None:
    """The published LR files are shrunk as whole pictures; without context the patch's edge is mirrored instead."""
    picture = torch.rand(1, 3, 40 * scale, 36 * scale, generator=torch.Generator().manual_seed(scale))
    picture = (picture * 255).round() / 255
    whole = imresize(picture, 1 / scale, round_to_uint8=True)
    top, left, side, context = 9, 7, 12, 3
    corner = [(start - context) * scale for start in (top, left)]
    length = (side + 2 * context) * scale
    patch = picture[..., corner[0] : corner[0] + length, corner[1] : corner[1] + length]
    low, _ = shrink(scale, patch, seed=0, epoch=[0], keys=["a"], draw=[0])
    low, high = without_context(low.float() / 255, patch, scale, context)
    assert torch.equal(low, whole[..., top : top + side, left : left + side].float())
    assert torch.equal(
        high,
        picture[..., top * scale : (top + side) * scale, left * scale : (left + side) * scale],
    )
    bare = picture[..., top * scale : (top + side) * scale, left * scale : (left + side) * scale]
    mirrored, _ = shrink(scale, bare, seed=0, epoch=[0], keys=["a"], draw=[0])
    assert not torch.equal(mirrored.float() / 255, low)


def test_the_loss_leaves_the_context_out() -> None:
    low, high = torch.rand(1, 3, 10, 10), torch.rand(1, 3, 20, 20)
    seen: list[torch.Size] = []

    def engine(picture: torch.Tensor) -> torch.Tensor:
        seen.append(picture.shape)
        return high[..., 4:-4, 4:-4] + 0.25

    loss, _ = super_resolution_l1(2, context=2)(engine, {"degraded": low, "clean": high}, 0)
    assert seen == [torch.Size([1, 3, 6, 6])]
    assert float(loss) == pytest.approx(0.25)


@pytest.mark.parametrize(("scale", "fresh"), [(3, {"upsampler.0"}), (4, {"upsampler.2"})])
def test_another_scale_takes_over_all_but_the_upsampler_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], scale: int, fresh: set[str]
) -> None:
    source = exported(tmp_path / "x2", EDSRConfig(scale=2, **SMALL))
    config = EDSRConfig(scale=scale, **SMALL)  # type: ignore[arg-type]
    start, _, _ = load_export(start_from_other_scale(config, source, 5, tmp_path / "start"))
    taken = load_export(source)[0].state_dict()
    own = start.state_dict()
    differing = {n.rpartition(".")[0] for n in own if n not in taken or not torch.equal(own[n], taken[n])}
    assert differing == fresh
    assert "drawn anew: " + next(iter(fresh)) in capsys.readouterr().out
    torch.manual_seed(5)
    drawn = build_model(config).state_dict()
    assert all(torch.equal(own[f"{name}.weight"], drawn[f"{name}.weight"]) for name in fresh)
    # Made once: a resumed run does not need the source, and other weights there change nothing.
    exported(tmp_path / "x2", EDSRConfig(scale=2, blocks=1, features=8))
    again, _, _ = load_export(start_from_other_scale(config, source, 5, tmp_path / "start"))
    assert all(torch.equal(again.state_dict()[n], own[n]) for n in own)


@pytest.mark.parametrize(
    ("found", "wanted", "expected"),
    [
        (EDSRConfig(scale=3, **SMALL), 3, "is x3 already; write init_from"),
        (EDSRConfig(scale=2, blocks=3, features=8), 3, "differs from this stage's in blocks"),
        (DyNetConfig(dim=8), 3, "dynet is another architecture than edsr"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, found: ModelConfig, wanted: int, expected: str) -> None:
    source = exported(tmp_path / "other", found)
    with pytest.raises(ConfigError, match=expected):
        start_from_other_scale(EDSRConfig(scale=wanted, **SMALL), source, 0, tmp_path / "start")  # type: ignore[arg-type]


def stage(*more: str) -> EDSRStageConfig:
    settings = ["model.blocks=2", "model.features=8", "out=/nowhere", "data.dataset=/nowhere", *more]
    return load_config(EDSRStageConfig, CONFIGS / "edsr_x2_cpu.yaml", settings)


def test_initialising_from_dynet_is_refused_with_a_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dynet is another architecture than edsr; none of its weights has a place"):
        train_edsr(stage("init_from=dynet"))
    source = exported(tmp_path, DyNetConfig(dim=8))
    with pytest.raises(ConfigError, match="dynet is another architecture than edsr"):
        train_edsr(stage(f"init_from={source}"))


def test_init_from_wants_the_same_model(tmp_path: Path) -> None:
    check_start(stage(f"init_from={exported(tmp_path / 'same', EDSRConfig(**SMALL))}"))  # type: ignore[arg-type]
    x3 = exported(tmp_path / "x3", EDSRConfig(scale=3, **SMALL))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is x3, this stage trains x2; write init_scale_from"):
        check_start(stage(f"init_from={x3}"))
    deeper = exported(tmp_path / "deeper", EDSRConfig(blocks=3, features=8))
    with pytest.raises(ConfigError, match="in blocks"):
        check_start(stage(f"init_from={deeper}"))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["data.patch=49"], "multiple of the scale 2"),
        (["context=12"], "nothing is left"),
        (["init_from=a", "init_scale_from=b"], "either init_from"),
        (["model={name: mdsr}"], "training.mdsr trains mdsr"),
    ],
)
def test_inconsistent_settings_are_refused(more: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        load_config(EDSRStageConfig, CONFIGS / "edsr_x2_cpu.yaml", more)
