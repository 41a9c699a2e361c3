"""Public checkpoints give the same pictures here, and what does not fit is named."""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.training.public_networks import (
    MEAN,
    PublicBasicSREDSR,
    PublicEDSR,
    PublicMDSR,
    PublicRestorer,
    randomised,
)
from training.models import DyNetConfig, EDSRConfig, MDSRConfig, PromptIRConfig, build_model
from training.public_checkpoints import ImportOptions, Match, match_checkpoint
from training.public_files import CheckpointError, read_checkpoint
from training.public_names import Kind

NARROW: dict[str, Any] = {"dim": 12, "prompts": ((8, 8), (16, 4), (24, 2)), "length": 3, "expansion": 2.3}
PUBLIC: dict[str, Callable[[], nn.Module]] = {
    "dynet": lambda: PublicRestorer(refinement=2, **NARROW),
    "promptir": lambda: PublicRestorer((1, 2, 1, 2), refinement=1, **NARROW),
    "edsr": lambda: PublicEDSR(3, blocks=2, features=8),
    "mdsr": lambda: PublicMDSR((4, 2, 3), blocks=2, features=8),
    "basicsr-edsr": lambda: PublicBasicSREDSR(4, blocks=2, features=8),
}
KINDS = list(PUBLIC)
# Where the config of a transformer network is read from, and a few others.
TELLING = re.compile(
    r"patch_embed|encoder_level1|latent.*(norm|temperature)|prompt|noise_level1|refinement|output|up4_3"
)


def picture(height: int = 24, width: int = 16, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, height, width, generator=torch.Generator().manual_seed(1))


def imported(match: Match) -> nn.Module:
    assert match.faults == []
    network = build_model(match.config)
    network.load_state_dict(match.weights)
    return network.eval().requires_grad_(False)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def state(kind: str) -> dict[str, Tensor]:
    return dict(randomised(PUBLIC[kind]()).state_dict())


def faults(tensors: dict[str, Tensor], kind: Kind, **options: Any) -> list[tuple[str, str]]:
    match = match_checkpoint(tensors, kind, ImportOptions(**options))
    return [(finding.kind, finding.key) for finding in match.faults]


# Equal pictures


@pytest.mark.parametrize("channels", [1, 3])
def test_dynet_gives_the_same_pictures(channels: int) -> None:
    public = randomised(PublicRestorer(refinement=2, heads=(2, 1, 2, 4), channels=channels, **NARROW))
    match = match_checkpoint(public.state_dict(), "dynet")
    assert isinstance(match.config, DyNetConfig)
    assert (match.config.dim, match.config.heads, match.config.expansion) == (12, (2, 1, 2, 4), 2.3)
    assert match.config.prompt_sizes[1:] == (8, 4, 2) and match.config.resolved_prompt_channels[1:] == (8, 16, 24)
    assert (match.config.prompt_length, match.config.refinement_blocks, match.config.channels) == (3, 2, channels)
    assert match.config.variants == DyNetConfig().variants  # no checkpoint says at which depth it was trained
    network, image = imported(match), picture(channels=channels)
    for depth in ((1, 1, 1, 1), (2, 1, 2, 3)):
        assert_close(network(image, depth), public(image, depth))


def test_promptir_gives_the_same_pictures() -> None:
    public = randomised(PUBLIC["promptir"]())
    match = match_checkpoint(public.state_dict(), "promptir")
    assert isinstance(match.config, PromptIRConfig)
    assert match.config.blocks == (1, 2, 1, 2) and match.config.prompt_channels == (8, 16, 24)
    assert_close(imported(match)(picture()), public(picture()))


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("image_range", [255, 1])
def test_edsr_gives_the_same_pictures(scale: int, image_range: int) -> None:
    public = randomised(PublicEDSR(scale, blocks=2, features=8, residual_scale=0.3, image_range=image_range))
    match = match_checkpoint(public.state_dict(), "edsr", ImportOptions(residual_scale=0.3))
    assert match.config == EDSRConfig(
        scale=scale, blocks=2, features=8, residual_scale=0.3, image_range=float(image_range)
    )
    assert_close(imported(match)(picture()), public(picture() * image_range) / image_range)


def test_mdsr_gives_the_same_pictures() -> None:
    public = randomised(PUBLIC["mdsr"]())
    match = match_checkpoint(public.state_dict(), "mdsr")
    assert match.config == MDSRConfig(scales=(4, 2, 3), blocks=2, features=8)
    network = imported(match)
    for number, scale in enumerate((4, 2, 3)):
        assert_close(network(picture(), f"x{scale}"), public(picture() * 255, number) / 255)


@pytest.mark.parametrize("image_range", [255.0, 1.0])
def test_basicsr_edsr_gives_the_same_pictures(image_range: float) -> None:
    public = randomised(PublicBasicSREDSR(4, blocks=2, features=8, image_range=image_range))
    match = match_checkpoint(public.state_dict(), "basicsr-edsr", ImportOptions(image_range=image_range))
    assert_close(imported(match)(picture()), public(picture()))


@pytest.mark.parametrize("expansion", [1.5, 2.0, 2.66, 2.6667, 4.0, 1.37])
def test_the_expansion_is_read_from_the_hidden_widths(expansion: float) -> None:
    with torch.device("meta"):
        shapes = PublicRestorer(dim=48, expansion=expansion).state_dict()
        config = match_checkpoint(shapes_only(shapes), "dynet").config
    assert isinstance(config, DyNetConfig)
    for channels in (48, 96, 192, 384, 160, 320, 704):
        assert int(channels * config.expansion) == int(channels * expansion)


def shapes_only(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full width without the memory: one number, seen as the whole tensor."""
    return {name: torch.zeros((), device="cpu").expand(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("kind", "public", "own", "dead", "frozen"),
    [
        ("dynet", lambda: PublicRestorer(), 16_726_031 - 112_896, 112_896, 0),
        ("promptir", lambda: PublicRestorer((4, 6, 6, 8)), 35_592_263 - 215_296, 215_296, 0),
        ("edsr", lambda: PublicEDSR(), 1_369_859, 0, 24),
        ("edsr", lambda: PublicEDSR(4, 32, 256), 43_089_923, 0, 24),
        ("mdsr", lambda: PublicMDSR(), 3_227_203, 0, 24),
        ("basicsr-edsr", lambda: PublicBasicSREDSR(3, 32, 256), 43_680_003, 0, 0),
    ],
)
def test_published_sizes(kind: Kind, public: Callable[[], nn.Module], own: int, dead: int, frozen: int) -> None:
    with torch.device("meta"):
        network = public()
    assert sum(p.numel() for p in network.parameters()) == own + dead + frozen
    tensors = shapes_only(network.state_dict())
    for layer, sign in (("sub_mean", -1), ("add_mean", 1)):
        if f"{layer}.weight" in tensors:
            tensors[f"{layer}.weight"] = torch.eye(3).view(3, 3, 1, 1)
            tensors[f"{layer}.bias"] = sign * 255 * torch.tensor(MEAN)
    match = match_checkpoint(tensors, kind)
    assert match.faults == []
    assert sum(weight.numel() for weight in match.weights.values()) == own
    ignored = sum(tensors[finding.key].numel() for finding in match.findings)
    assert ignored == dead + frozen
    if kind in ("dynet", "promptir"):
        assert match.config == (DyNetConfig() if kind == "dynet" else PromptIRConfig())
    elif getattr(match.config, "features", 0) == 256:
        assert getattr(match.config, "residual_scale", 0) == 0.1


# Containers


def wrapped(container: str, tensors: dict[str, Tensor], path: Path) -> Path:
    prefix = {"lightning": "net.", "parallel": "module."}.get(container, "")
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    broken = {name: tensor + 1 for name, tensor in tensors.items()}
    if container == "safetensors":
        path = path.with_suffix(".safetensors")
        save_file(named, path)
        return path
    content = {
        "lightning": {"state_dict": named, "epoch": 119, "hyper_parameters": {"lr": 2e-4}, "optimizer_states": [{}]},
        "basicsr": {"params": named},
        "basicsr-ema": {"params": broken, "params_ema": named},
    }
    torch.save(content.get(container, named), path, _use_new_zipfile_serialization=container != "legacy")
    return path


@pytest.mark.parametrize(
    "container", ["plain", "legacy", "lightning", "parallel", "basicsr", "basicsr-ema", "safetensors"]
)
@pytest.mark.parametrize("kind", ["edsr", "dynet"])
def test_every_container_is_read(container: str, kind: str, tmp_path: Path) -> None:
    expected = state(kind)
    tensors, notes = read_checkpoint(wrapped(container, expected, tmp_path / "model.pth"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], weight) for name, weight in expected.items())
    assert ("moving average" in "".join(notes)) == (container == "basicsr-ema")


def test_half_precision_is_widened() -> None:
    public = randomised(PUBLIC["edsr"]()).half()
    network = imported(match_checkpoint(public.state_dict(), "edsr"))
    assert all(weight.dtype == torch.float32 for weight in network.state_dict().values())
    public.float()
    for layer in (public.sub_mean, public.add_mean):  # ours has the colour as it is published, not rounded
        layer.bias.copy_(layer.bias.sign() * 255 * torch.tensor(MEAN))
    assert_close(network(picture()), public(picture() * 255) / 255)


@pytest.mark.parametrize("damage", ["cut", "empty", "page", "text"])
@pytest.mark.parametrize("container", ["plain", "legacy", "safetensors"])
def test_a_damaged_file_is_refused(damage: str, container: str, tmp_path: Path) -> None:
    path = wrapped(container, state("edsr"), tmp_path / "model.pth")
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "page": b"<!DOCTYPE html>", "text": b"no"}[damage])
    with pytest.raises(CheckpointError, match=rf"{path}.*again"):
        read_checkpoint(path)


def test_other_objects_are_refused_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state("edsr"), "hyper_parameters": argparse.Namespace(lr=1)}, path)
    with pytest.raises(CheckpointError, match=r"argparse\.Namespace.*code(.|\n)*weights_only=False.*model_weights.pt"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[1, 2], {}, {"epoch": 3, "model": {}}], ids=str)
def test_files_without_a_state_dict_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="expected a state dict, or one under 'state_dict'"):
        read_checkpoint(tmp_path / "model.pt")


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "model.pt")


# What does not fit


@pytest.mark.parametrize("kind", KINDS)
def test_another_kind_is_named(kind: str) -> None:
    tensors = state(kind)
    for other in KINDS:
        if other != kind:
            with pytest.raises(CheckpointError, match=f"looks like {kind}, not {other} .*import it as {kind}"):
                match_checkpoint(tensors, other)  # type: ignore[arg-type]


def test_an_export_of_ours_and_a_stranger_are_told_apart() -> None:
    ours = build_model(DyNetConfig(dim=8, prompt_sizes=(8, 4, 4, 4))).state_dict()
    with pytest.raises(CheckpointError, match="an export of ird; use its folder"):
        match_checkpoint(ours, "dynet")
    with pytest.raises(
        CheckpointError, match=r"no key of a dynet among fc\.bias, fc\.weight; expected such as encoder"
    ):
        match_checkpoint(named_linear(), "dynet")


def named_linear() -> dict[str, Tensor]:
    return {f"fc.{name}": tensor for name, tensor in nn.Linear(2, 2).state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_any_one_key_that_is_missing_or_reshaped_is_the_only_fault(kind: Kind) -> None:
    """Also where the config is read from that very key. Of keys whose tensors have one shape the first is tried."""
    whole = state(kind)
    ignored = {finding.key for finding in match_checkpoint(whole, kind).findings}
    for key in {w.shape: name for name, w in reversed(whole.items()) if name not in ignored}.values():
        if kind in ("dynet", "promptir") and not TELLING.match(key):
            continue
        assert faults({name: w for name, w in whole.items() if name != key}, kind) == [("missing", key)], key
        if not key.endswith("temperature"):  # the only word on the number of heads
            longer = torch.cat([whole[key], whole[key]])
            assert faults(whole | {key: longer}, kind) == [("of another shape", key)], key


@pytest.mark.parametrize("kind", KINDS)
def test_more_keys_than_the_network_has_are_faults(kind: Kind) -> None:
    extra = {"loss.weight": torch.ones(2), "refinement.9.norm1.body.weight": torch.ones(24)}
    assert faults(state(kind) | extra, kind) == [("unexpected", name) for name in sorted(extra)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_broke_in_training_are_faults(bad: float) -> None:
    tensors = state("basicsr-edsr")
    tensors["conv_last.bias"] = torch.tensor([0, bad, 0])
    tensors["body.0.conv1.bias"] = torch.zeros(8, dtype=torch.int64)
    assert sorted(faults(tensors, "basicsr-edsr")) == [
        ("bad values", "body.0.conv1.bias"),
        ("bad values", "conv_last.bias"),
    ]


def test_another_mean_colour_is_a_fault_until_it_is_given() -> None:
    public = randomised(PublicEDSR(2, blocks=1, features=8))
    mean = torch.tensor([0.5, 0.4, 0.3])
    public.sub_mean.bias.copy_(-255 * mean)
    public.add_mean.bias.copy_(255 * mean)
    tensors = public.state_dict()
    assert {key for _, key in faults(tensors, "edsr")} == {"sub_mean.bias", "add_mean.bias"}
    match = match_checkpoint(tensors, "edsr", ImportOptions(mean=(0.5, 0.4, 0.3)))
    assert_close(imported(match)(picture()), public(picture() * 255) / 255)


def test_mean_shift_may_be_absent_where_the_range_is_given() -> None:
    tensors = {name: w for name, w in state("edsr").items() if "_mean" not in name}
    assert len(faults(tensors, "edsr")) == 4
    assert faults(tensors, "edsr", image_range=255.0) == []


def test_options_of_another_kind_and_colours_of_another_number_are_refused() -> None:
    with pytest.raises(CheckpointError, match="image_range: not an option of dynet"):
        match_checkpoint(state("dynet"), "dynet", ImportOptions(image_range=255.0))
    with pytest.raises(CheckpointError, match="a mean colour of 1: give one value a channel"):
        match_checkpoint(state("edsr"), "edsr", ImportOptions(mean=(0.5,)))


def test_a_network_that_cannot_be_built_is_refused() -> None:
    tensors = dict(PublicEDSR(4, blocks=1, features=4).state_dict())
    tensors |= {"tail.0.4.weight": torch.rand(16, 4, 3, 3), "tail.0.4.bias": torch.rand(16)}  # enlarges eight times
    with pytest.raises(CheckpointError, match="cannot be built here: scale: Input should be 2, 3 or 4"):
        match_checkpoint(tensors, "edsr")
