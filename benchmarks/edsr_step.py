"""Ratios of CPU time: EDSR's training step and inference against the plain equivalent, under the same precision.

    python -m benchmarks.edsr_step [--blocks 16] [--features 64] [--patch 24] [--batch 8] [--precision bf16]

Plain is the network written down as the paper draws it, contiguous (NCHW) tensors, Adam without ``foreach``; what it is
measured against is ``training.models`` with channels last and the fused Adam of the stages. Same weights, same inputs.
Prints one JSON object with the ratio of each, and by how much the outputs differ.
"""

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.models import EDSRConfig, build_model


class _Plain(nn.Module):
    """Figure 3 of arXiv 1707.02921, x2."""

    def __init__(self, blocks: int, features: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, features, 3, padding=1)
        self.body = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(features, features, 3, padding=1) for _ in range(2)) for _ in range(blocks)
        )
        self.end = nn.Conv2d(features, features, 3, padding=1)
        self.up = nn.Conv2d(features, 4 * features, 3, padding=1)
        self.tail = nn.Conv2d(features, 3, 3, padding=1)
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        x = start = self.head((image - self.mean) * 255)
        for first, second in self.body:
            x = x + second(functional.relu(first(x)))
        x = self.end(x) + start
        return self.tail(functional.pixel_shuffle(self.up(x), 2)).float() / 255 + self.mean


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--patch", type=int, default=24, help="LR pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=3, help="the fastest of so many counts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = _Plain(options.blocks, options.features)
    model = build_model(EDSRConfig(blocks=options.blocks, features=options.features))
    # The weights of both come in the same order.
    weights = [weight.detach() for weight in plain.parameters()]
    model.load_state_dict(dict(zip(model.state_dict(), weights, strict=True)))
    low = torch.rand(options.batch, 3, options.patch, options.patch)
    high = torch.rand(options.batch, 3, 2 * options.patch, 2 * options.patch)
    networks = {"plain": plain, "ours": model.to(memory_format=torch.channels_last)}
    optimizers = {
        "plain": torch.optim.Adam(plain.parameters(), foreach=False),
        "ours": torch.optim.Adam(model.parameters(), fused=True),
    }

    def forward(name: str) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"):
            result: Tensor = networks[name](low)
        return result.float()

    @torch.no_grad()
    def infer(name: str) -> Tensor:
        return forward(name)

    def step(name: str) -> None:
        functional.l1_loss(forward(name), high).backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    difference = float((infer("plain") - infer("ours")).abs().max())
    timed: dict[str, Callable[[str], object]] = {"inference": infer, "step": step}
    seconds = {(what, name): [0.0] * options.rounds for what in timed for name in networks}
    # In turns, so that what else the machine does falls on both.
    for number in range(options.rounds):
        for (what, name), times in seconds.items():
            started = time.process_time()
            timed[what](name)
            times[number] = time.process_time() - started
    result = {"precision": options.precision, "largest_difference": difference}
    result |= {f"seconds_{what}": round(min(seconds[what, "ours"]), 4) for what in timed}
    result |= {
        f"plain_over_ours_{what}": round(min(seconds[what, "plain"]) / min(seconds[what, "ours"]), 2) for what in timed
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
