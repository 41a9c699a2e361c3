"""The deepest variant within a budget, from a table that is measured once."""

from pathlib import Path

import pytest
import torch

from infra.config import ConfigError
from pipeline.budget import BudgetError, check_choice, choose_variant, measured_table, parse_bytes
from pipeline.inference import LoadedModel
from pipeline.memory import bytes_per_pixel, free_memory, largest_tile
from training.models import DyNetConfig, EDSRConfig, ModelConfig, build_model

TABLE = {"small": 0.1, "middle": 0.2, "large": 0.4}  # seconds for 256 x 256


def loaded(config: ModelConfig) -> LoadedModel:
    return LoadedModel(build_model(config).eval(), config, {}, "0" * 64)


@pytest.fixture(scope="module")
def dynet() -> LoadedModel:
    # In an order that is neither that of depth nor that of time.
    variants = {"middle": (1, 2, 2, 2), "small": (1, 1, 1, 1), "large": (2, 2, 2, 3)}
    return loaded(DyNetConfig(dim=8, refinement_blocks=1, variants=variants))


@pytest.mark.parametrize(
    ("side", "budget", "variant"),
    [(256, 100, "small"), (256, 399, "middle"), (256, 400, "large"), (512, 400, "small"), (4000, None, "large")],
)
def test_the_deepest_that_fits_is_taken(dynet: LoadedModel, side: int, budget: float | None, variant: str) -> None:
    choice = choose_variant(dynet, TABLE, side, side, budget)
    assert choice.variant == variant
    assert f"{side}x{side}" in choice.why


def test_nothing_fits_and_nothing_to_choose_from(dynet: LoadedModel) -> None:
    with pytest.raises(BudgetError, match="512x256: small, the fastest variant, takes about 200 ms, the budget is 9"):
        choose_variant(dynet, TABLE, 256, 512, 9)
    check_choice(dynet)
    with pytest.raises(ConfigError, match="among depths, which edsr has not"):
        check_choice(loaded(EDSRConfig(blocks=1, features=8)))


def test_the_table_is_measured_once(dynet: LoadedModel, tmp_path: Path) -> None:
    said: list[str] = []
    table = measured_table(dynet, tmp_path, said.append)
    assert table.keys() == {"small", "middle", "large"}
    assert list(table.values()) == sorted(table.values()) and all(seconds > 0 for seconds in table.values())
    assert measured_table(dynet, tmp_path, said.append) == table
    assert len(said) == 1 and "middle, small, large" in said[0]
    (file,) = tmp_path.iterdir()
    file.write_text("torn")
    assert measured_table(dynet, tmp_path, said.append).keys() == table.keys()


def test_sizes_of_memory() -> None:
    assert [parse_bytes(text) for text in ("1000", "2K", "1.5GiB", "512M", " 3 gb ")] == [
        1000,
        2048,
        3 << 29,
        1 << 29,
        3 << 30,
    ]
    for wrong in ("", "much", "-1G", "2T"):
        with pytest.raises(ConfigError, match="512M or 2G"):
            parse_bytes(wrong)
    assert 0 < free_memory(torch.device("cpu")) < 1 << 50


def test_tiles_fit_the_memory() -> None:
    per_pixel = bytes_per_pixel(DyNetConfig())
    assert largest_tile(per_pixel, 1000, 1000, 1000 * 1000 * per_pixel) == 0
    for limit in (2 << 30, 5 << 30):
        tile = largest_tile(per_pixel, 4000, 4000, limit)
        assert tile % 64 == 0
        assert tile**2 * per_pixel <= limit < (tile + 64) ** 2 * per_pixel
    assert largest_tile(per_pixel, 4000, 4000, 0) == 64
    assert bytes_per_pixel(EDSRConfig(scale=4)) > bytes_per_pixel(EDSRConfig(scale=2))
