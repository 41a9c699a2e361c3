"""The hand-over: bytes until the device, floats after it, and the same degradation wherever it runs."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from datagen.degradations import load_recipe
from tests.training.data.conftest import SEED, loader
from training.corruption import degrade_by_recipe
from training.data.handover import handover

CORRUPT = partial(degrade_by_recipe, load_recipe("dynet_pretrain"))
CPU = torch.device("cpu")


def first(dataset: Path, **settings: Any) -> dict[str, Any]:
    return dict(next(iter(loader(dataset, **settings))))


def test_degraded_here_or_there_is_the_same(small_dataset: Path) -> None:
    take = handover(CPU, corrupt=CORRUPT, seed=SEED)
    here = take(first(small_dataset))
    there = take(first(small_dataset, degrade_on="device"))
    assert here["meta"] == there["meta"]
    for name in ("clean", "degraded"):
        assert torch.equal(here[name], there[name]) and here[name].dtype == torch.float32
        assert here[name].is_contiguous() and here[name].min() >= 0 and here[name].max() <= 1


def test_without_a_corruption_the_input_is_the_clean_patch(small_dataset: Path) -> None:
    batch = handover(CPU, corrupt=None, seed=SEED)(first(small_dataset, degrade_on="device"))
    assert batch["degraded"] is batch["clean"] and batch["clean"].dtype == torch.float32
    assert len(batch["meta"]) == 8 and all(meta["key"] for meta in batch["meta"])


def test_eight_bits_cross_as_bytes_and_arrive_exactly(small_dataset: Path) -> None:
    clean = first(small_dataset, degrade_on="device")
    corrupt = partial(degrade_by_recipe, load_recipe("all_in_one_3"))
    drawn = {"seed": SEED, "epoch": clean["epoch"], "keys": clean["key"], "draw": clean["draw"]}
    crossing, _ = corrupt(clean["clean"].float().div_(255).contiguous(), **drawn)
    assert crossing.dtype == torch.uint8
    arrived = handover(CPU, corrupt=corrupt, seed=SEED)(clean)["degraded"]
    assert torch.equal(arrived, crossing.float() / 255)


def test_channels_last_is_a_matter_of_memory_only(small_dataset: Path) -> None:
    plain = handover(CPU, corrupt=CORRUPT, seed=SEED)(first(small_dataset))
    last = handover(CPU, corrupt=CORRUPT, seed=SEED, channels_last=True)(first(small_dataset))
    for name in ("clean", "degraded"):
        assert last[name].is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(plain[name], last[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_gets_what_a_cpu_gets(small_dataset: Path) -> None:
    device = torch.device("cuda", 0)
    for settings in ({}, {"degrade_on": "device"}):
        expected = handover(CPU, corrupt=CORRUPT, seed=SEED)(first(small_dataset, **settings))
        batch = handover(device, corrupt=CORRUPT, seed=SEED)(first(small_dataset, **settings))
        assert batch["clean"].device == device and torch.equal(batch["clean"].cpu(), expected["clean"])
        # JPEG is done by another method there; where it is, most pixels agree to a grey level.
        assert float((batch["degraded"].cpu() - expected["degraded"]).abs().mean()) < 1e-3
