"""How much memory a network takes to restore a picture, and how much there is.

Travels inside each registered model, so it knows no library but torch.
"""

import math
from pathlib import Path

import torch

from training.models import DyNetConfig, EDSRConfig, MDSRConfig, ModelConfig, PromptIRConfig, scale_of

# Of the memory that is free, what a restore may take: other programs live here too.
SHARE = 0.5
# Resident bytes on a CPU for each pixel of the input and each channel at full resolution; docs/serving.md has the
# measurements. Repeating a block takes no more: nothing is kept for a backward pass.
_ATTENTION = 190  # DyNet and PromptIR
_CONVOLUTION = 12  # EDSR and MDSR; their up-sampler works on scale² times the channels


def bytes_per_pixel(config: ModelConfig, variant: str = "default") -> float:
    """Bytes that restoring takes for each pixel of the input, beyond the weights, in float32."""
    if isinstance(config, DyNetConfig | PromptIRConfig):
        return float(_ATTENTION * config.dim)
    if isinstance(config, EDSRConfig | MDSRConfig):
        return float(_CONVOLUTION * config.features * (1 + scale_of(config, variant) ** 2))
    return float(_CONVOLUTION * config.features * 2)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on ``device``: the machine's, or the container's where that is less."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [_available()]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return max(0, min(free))


def largest_tile(per_pixel: float, height: int, width: int, limit: float) -> int:
    """Side of the largest tile that ``limit`` bytes allow, a multiple of 64; 0 when the whole picture fits."""
    affordable = limit / per_pixel
    if height * width <= affordable:
        return 0
    return max(64, int(math.sqrt(affordable)) // 64 * 64)


def _available() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 4 << 30  # another system: what any machine has
