"""Ratios of CPU time: MZSR's adaptation against ZSSR's training, one picture after the other against all at once, and
the meta-training step of second order against the one of first order.

    python -m benchmarks.mzsr_adaptation [--side 64] [--pictures 4] [--zssr-steps 30]

ZSSR's full length is 2,850 updates on average (MZSR's figure 1); a few are measured and multiplied. Weights are random:
time does not depend on them. Prints one JSON object.
"""

import argparse
import json
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch

from datagen.degradations.kernels import gaussian_kernel
from training.adaptation import Assumption, adapt, adapt_many, published_rates
from training.models import MZSRConfig, build_model
from training.mzsr import MetaConfig, MZSRStageConfig, meta_objective
from training.zssr import ZSSROptions, zssr

_ZSSR_UPDATES = 2850


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=64, help="of the LR pictures, pixels")
    parser.add_argument("--pictures", type=int, default=4, help="adapted at once")
    parser.add_argument("--zssr-steps", type=int, default=30, help="measured of ZSSR's updates")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build_model(MZSRConfig())
    kernel, assume = gaussian_kernel(15, 2.0, 2.0).float(), Assumption()
    pictures = torch.rand(options.pictures, 3, options.side, options.side)

    def fastest(call: Callable[[], object], rounds: int = options.rounds) -> float:
        times = []
        for _ in range(rounds):
            started = time.process_time()
            call()
            times.append(time.process_time() - started)
        return min(times)

    one, ten = (fastest(lambda s=s: adapt(model, pictures[:1], kernel, 2, published_rates(s), assume)) for s in (1, 10))

    def zssr_of(steps: int) -> float:
        settings = ZSSROptions(steps=steps, back_projections=0)
        return fastest(lambda: zssr(pictures[:1], kernel, 2, settings, assume))

    # The difference leaves out what comes once: the network's start and the enlargement.
    update = (zssr_of(1 + options.zssr_steps) - zssr_of(1)) / options.zssr_steps
    full = update * _ZSSR_UPDATES
    rates = published_rates(1)
    loop = fastest(lambda: [adapt(model, picture[None], kernel, 2, rates, assume) for picture in pictures])
    batched = fastest(lambda: adapt_many(model, pictures, kernel, 2, rates, assume))
    second, first = (_meta_step(order, fastest) for order in (True, False))
    result = {
        "side": options.side,
        "seconds_one_step": round(one, 4),
        "seconds_ten_steps": round(ten, 4),
        "seconds_zssr_update": round(update, 4),
        "seconds_zssr_extrapolated": round(full, 1),
        "zssr_over_one_step": round(full / one, 1),
        "zssr_over_ten_steps": round(full / ten, 1),
        "pictures": options.pictures,
        "loop_over_batched": round(loop / batched, 2),
        "second_order_over_first": round(second / first, 2),
    }
    print(json.dumps(result, indent=2))


def _meta_step(second_order: bool, fastest: Callable[[Callable[[], object]], float]) -> float:
    """Seconds of a meta-training step, forward and backward, of one task of 4 + 4 patches of 32x32."""
    config = MZSRStageConfig(
        out="",
        steps=1,
        phase="meta_transfer",
        init_from="none",
        model=MZSRConfig(),
        meta=MetaConfig(tasks=1, patches_per_set=4, inner_steps=3, second_order=second_order),
        data={"dataset": "", "patch": 32, "batch": 8},
    )
    objective, model = meta_objective(config), build_model(config.model)
    patches = torch.rand(8, 3, 32, 32)

    def step() -> None:
        loss, _ = objective(SimpleNamespace(module=model, rank=0), {"clean": patches}, 0)
        loss.backward()

    return fastest(step)


if __name__ == "__main__":
    main()
