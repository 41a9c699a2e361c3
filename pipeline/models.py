"""``ird models``: what each model and variant holds and costs."""

from rich.console import Console
from rich.table import Table

from training.models import DyNetConfig, EDSRConfig, MDSRConfig, ModelConfig, MZSRConfig, PromptIRConfig, variants_of
from training.models.cost import count_cost, measure_latency

# The published networks, each by the name its paper gives it.
PUBLISHED: dict[str, ModelConfig] = {
    "DyNet": DyNetConfig(),
    "PromptIR": PromptIRConfig(),
    **{f"EDSR baseline x{scale}": EDSRConfig(scale=scale) for scale in (2, 3, 4)},
    **{f"EDSR x{scale}": EDSRConfig(scale=scale, blocks=32, features=256, residual_scale=0.1) for scale in (2, 3, 4)},
    "MDSR baseline": MDSRConfig(),
    "MDSR": MDSRConfig(blocks=80),
    "MZSR": MZSRConfig(),
}

_NOTES = """\
Conv.: convolutions and linear layers alone, as papers count. All: with the matrix products of attention.
Kept: float32 activations that training on a picture holds until the backward pass. MZSR: the enlarged picture.
The 242.35 GFLOP of the DyNet paper are convolutions alone at 224x224, which come to 242.15 here (arXiv 2404.02154).
DyNet has 53.0 % fewer parameters than PromptIR: 16.613 M against 35.377 M, or 16.726 M against 35.592 M with the \
weights in the published files that nothing uses. The paper's 56.75 % is 1 - 16/37, of counts in whole millions."""


def print_models(size: int, measure: bool = False) -> None:
    """Print a table of parameters and of the cost of one ``size`` x ``size`` input picture.

    Costs are in 10^9 floating-point operations, two for each multiply-accumulate, and in MiB of activations kept for
    the backward pass. With ``measure`` each network is run as well, which takes up to some 20 s a row on a CPU.
    """
    table = Table(title=f"Cost of one {size}x{size} picture; GFLOP = 2 x 10^9 multiply-accumulates")
    headings = ["parameters", "conv. GFLOP", "all GFLOP", "kept MiB", *["ms"] * measure]
    for heading in ("model", "variant"):
        table.add_column(heading, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, config in PUBLISHED.items():
        for variant in variants_of(config):
            cost = count_cost(config, variant, size, size)
            figures = [f"{cost.parameters:,}"]
            figures += [f"{2 * macs / 1e9:,.2f}" for macs in (cost.convolution_macs, cost.macs)]
            figures += [f"{cost.saved_bytes / 2**20:,.0f}"]
            if measure:
                figures.append(f"{1000 * measure_latency(config, variant, size, size):,.0f}")
            table.add_row(name, variant, *figures)
    Console().print(table)
    Console().print(_NOTES, highlight=False)
