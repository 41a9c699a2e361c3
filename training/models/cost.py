"""What a network costs for a picture of a given size: counted on the meta device, where nothing is computed or stored.

``measure_latency`` alone runs the network.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from training.models import ModelConfig, build_model
from training.models.blocks import GDFN, MDTA
from training.models.inputs import Variant


@dataclass(frozen=True)
class Cost:
    """Weights, multiply-accumulates and kept activations for one picture; one MAC is two FLOPs.

    ``convolution_macs`` holds the convolutions and the few linear layers: the count that papers print, which at
    224x224 is the 242 GFLOPs quoted for DyNet-L and PromptIR. ``attention_macs`` holds the two matrix products
    of every MDTA that such counts leave out.

    ``saved_bytes`` is what a training step in float32 holds between forward and backward pass beside the weights,
    at the config's ``checkpoint_levels``; storage that several operations share counts once.
    """

    parameters: int
    convolution_macs: int
    attention_macs: int
    saved_bytes: int

    @property
    def macs(self) -> int:
        """All multiply-accumulates."""
        return self.convolution_macs + self.attention_macs


def count_cost(config: ModelConfig, variant: Variant, height: int, width: int) -> Cost:
    """Count a variant's cost for one input picture of ``height`` x ``width`` pixels.

    The operations counted are the published ones: each head's own attention matrix, and the projection behind
    it as a 1x1 convolution at full resolution. The bytes are those of the network as it runs here.

    Raises:
        ValueError: the model has no such variant.
    """
    with torch.device("meta"):
        model = build_model(config)
        image = torch.empty(1, config.channels, height, width)
    macs = {"convolution": 0, "attention": 0}

    def convolution(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        macs["convolution"] += output.numel() * module.weight[0].numel()

    def linear(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Linear)
        macs["convolution"] += output.numel() * module.in_features

    def attention(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, MDTA)
        channels = output.shape[1]
        # The 1x1 convolutions before and behind; the depthwise one is called as a module.
        macs["convolution"] += output.numel() * 4 * channels
        macs["attention"] += 2 * output.numel() * channels // module.heads

    def feed_forward(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, GDFN)
        hidden = module.project_out.in_channels
        # 1x1 to both halves, 3x3 depthwise, 1x1 back.
        macs["convolution"] += output.numel() * 3 * hidden + output[:, 0].numel() * 2 * hidden * 9

    hooks = {nn.Conv2d: convolution, nn.Linear: linear, MDTA: attention, GDFN: feed_forward}
    for module in model.modules():
        if type(module) in hooks:
            module.register_forward_hook(hooks[type(module)])
    saved = saved_bytes(model, image, variant)
    return Cost(sum(p.numel() for p in model.parameters()), macs["convolution"], macs["attention"], saved)


def saved_bytes(model: nn.Module, image: Tensor, variant: Variant) -> int:
    """Bytes that a forward pass keeps for the backward pass beside the weights, each storage once.

    ``model`` and ``image`` may be on any device; on ``meta`` the count is the same, for nothing.
    """
    weights = {parameter.untyped_storage() for parameter in model.parameters()}
    # Holding the storages keeps an address from being given out twice.
    saved: set[torch.UntypedStorage] = set()

    def keep(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage())
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(image, variant)
    return sum(storage.nbytes() for storage in saved - weights)


def measure_latency(
    config: ModelConfig, variant: Variant, height: int, width: int, *, runs: int = 5, budget: float = 10.0
) -> float:
    """Seconds that a forward pass takes for one picture: the median of ``runs``, after one that does not count.

    Freshly initialised float32 weights, on the GPU where there is one, else on the CPU with torch's own number of
    threads. No run is begun once ``budget`` seconds have gone by, except the first that counts.

    Raises:
        ValueError: the model has no such variant.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.random.fork_rng():
        model = build_model(config).to(device).eval()
    image = torch.zeros(1, config.channels, height, width, device=device)

    def seconds() -> float:
        started = time.perf_counter()
        with torch.no_grad():
            model(image, variant)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    spent, times = seconds(), list[float]()
    while not times or (len(times) < runs and spent < budget):
        times.append(seconds())
        spent += times[-1]
    return statistics.median(times)
