"""``ird models``: what each model and variant holds and costs."""

from rich.console import Console
from rich.table import Table

from training.models import DyNetConfig, EDSRConfig, MDSRConfig, ModelConfig, MZSRConfig, PromptIRConfig, variants_of
from training.models.cost import count_cost

# The published networks, each by the name its paper gives it.
PUBLISHED: dict[str, ModelConfig] = {
    "DyNet": DyNetConfig(),
    "PromptIR": PromptIRConfig(),
    "EDSR baseline x2": EDSRConfig(),
    "EDSR x2": EDSRConfig(blocks=32, features=256, residual_scale=0.1),
    "MDSR baseline": MDSRConfig(),
    "MZSR": MZSRConfig(),
}


def print_models(size: int) -> None:
    """Print a table of parameters and of the cost of one ``size`` x ``size`` input picture.

    Costs are in 10^9 floating-point operations, two for each multiply-accumulate.
    """
    table = Table(title=f"Cost of one {size}x{size} picture; GFLOP = 2 x 10^9 multiply-accumulates")
    for heading in ("model", "variant", "parameters", "GFLOP, convolutions", "GFLOP, with attention"):
        table.add_column(heading, justify="left" if heading in ("model", "variant") else "right")
    for name, config in PUBLISHED.items():
        for variant in variants_of(config):
            cost = count_cost(config, variant, size, size)
            convolutions, total = 2 * cost.convolution_macs / 1e9, 2 * cost.macs / 1e9
            table.add_row(name, variant, f"{cost.parameters:,}", f"{convolutions:.2f}", f"{total:.2f}")
    Console().print(table)
    Console().print("The 242.35 GFLOP of the DyNet paper are convolutions alone at 224x224 (arXiv 2404.02154).")
