"""The study's accounts: equal compute for every recipe, and what its table says of the runs."""

from pathlib import Path

import pytest
from rich.console import Console

from infra.config import ConfigError, load_config
from pipeline.study import StudyConfig, flops_of_step, markdown, plan, show, study, summary
from tests.support.dataset import REPOSITORY
from training.cotraining import CotrainingConfig
from training.models.cost import count_cost
from training.pretrain import PretrainConfig

CONFIG = REPOSITORY / "configs/pipeline/study_co_pretraining.yaml"
TINY = ["model.dim=4", "model.heads=[1,1,2,2]", "model.refinement_blocks=0", "data.patch=16"]


@pytest.fixture(scope="module")
def base() -> PretrainConfig:
    return load_config(PretrainConfig, REPOSITORY / "configs/training/pretrain_study.yaml", TINY)


def cost(base: PretrainConfig, mode: str, **more: object) -> float:
    return flops_of_step(base, CotrainingConfig.model_validate({"mode": mode, **more}))


def test_a_step_costs_what_its_variants_cost(base: PretrainConfig) -> None:
    small, large = (cost(base, "separate", variants=(variant,)) for variant in ("small", "large"))
    # The network runs rearranged and with aligned widths, so only the ratio is that of the published count.
    published = [count_cost(base.model, variant, 16, 16).macs for variant in ("small", "large")]
    assert small / large == pytest.approx(published[0] / published[1], rel=0.05)
    assert cost(base, "alternate") == pytest.approx((small + large) / 2, rel=0.02)
    assert cost(base, "random_depth") == pytest.approx((small + large) / 2, rel=0.05)
    both = cost(base, "sandwich")
    assert small + large > both > 0.9 * (small + large)  # level 1 of the encoder is shared
    assert cost(base, "distill", teacher_from=0.25) == pytest.approx(both + 0.75 * large / 3, rel=0.001)


def test_every_recipe_gets_the_same_compute(base: PretrainConfig) -> None:
    config = load_config(StudyConfig, CONFIG, ["budget=1000", "seeds=[4, 5]"])
    spent: dict[tuple[str, int], float] = {}
    for run in plan(config, base):
        key = (run.recipe, run.seed)
        spent[key] = spent.get(key, 0) + run.steps * flops_of_step(base, run.cotraining)
    assert len(spent) == 2 * 5 and max(spent.values()) / min(spent.values()) < 1.01


def rows() -> list[dict[str, object]]:
    made = []
    for recipe, gain in (("separate", 0.0), ("sandwich", 1.0)):
        for seed in (1, 2):
            for variant in ("small", "large"):
                for step, share in ((5, 0.5), (10, 1.0)):
                    for task in ("noise", "jpeg"):
                        psnr = 20 + gain + seed + 2 * share + (task == "jpeg")
                        one = {"recipe": recipe, "seed": seed, "variant": variant, "task": task, "step": step}
                        made.append({**one, "share": share, "hours": share * 0.1, "psnr": psnr})
    return made


def test_the_table_gives_means_over_seeds_their_spread_and_the_hours_of_both_twins(tmp_path: Path) -> None:
    (twins, sandwich), (halves, _) = summary(rows(), 1.0), summary(rows(), 0.5)
    assert twins["psnr"]["small"] == {"noise": 23.5, "jpeg": 24.5, "mean": 24.0}
    assert twins["spread"]["small"] == pytest.approx(2**-0.5) and halves["psnr"]["large"]["mean"] == 23.0
    assert twins["hours"] == pytest.approx(0.2) and sandwich["hours"] == pytest.approx(0.1)
    table = markdown(rows()).splitlines()
    assert len(table) == 2 + 2 * 2 * 2 and "| sandwich | 100% | 0.100 | small | 24.50 | 25.50 | 25.00 ± 0.71 |" in table
    console = Console(width=100, record=True)
    show(rows(), console)
    assert "24.00 ± 0.71" in console.export_text()


def test_a_schedule_that_is_not_constant_is_refused(tmp_path: Path) -> None:
    config = load_config(StudyConfig, CONFIG, [f"out={tmp_path}"])
    with pytest.raises(ConfigError, match="constant"):
        study(config, ["schedule.kind=cosine"], print)
