"""A step of training and a restored picture: ours beside the published network, in speed and memory, in one run.

    python -m benchmarks.dynet_step [--patch 128 256] [--batch 8] [--precision fp32 bf16] [--compile] [--json FILE]

The published network is the plain one of ``tests/training/public_networks.py``, float32 as published and under the
same bf16 autocast; ours gets its weights through the checkpoint import. Before anything is timed, pictures and
gradients of both are compared (``check_equal``). A step is forward, L1, backward and Adam; then all take turns. On a
GPU a figure is of the median time by the clock; on the CPU of the least CPU time of the process, so that other work on
the machine counts little.

Memory is the most that was allocated at any time in a step: weights, Adam's state, gradients, activations, temporary
tensors (CUDA: ``torch.cuda.max_memory_allocated``; CPU: the profiler's record of torch's allocator, which does not
see what oneDNN takes for itself). ``saved`` is what the forward pass keeps for the backward pass beside the weights,
each storage once; the inputs of checkpointed blocks are not among it.

Ceilings are measured between the steps: a large matrix product in the same precision and a large copy. The share of
the first counts the published multiply-accumulates (``training.models.cost``), times three for a step. The share of
the second is an estimate from below: each byte that is allocated is written once and read once.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from infra.files import write_atomically
from tests.training.public_networks import PublicRestorer
from training.loop import code_version
from training.models import DyNetConfig, ModelConfig, build_model, compile_blocks
from training.models.cost import count_cost
from training.public_checkpoints import match_checkpoint
from training.public_names import Kind, public_name

VARIANTS: dict[str, tuple[Kind, str]] = {
    "small": ("dynet", "small"),
    "large": ("dynet", "large"),
    "promptir": ("promptir", "default"),
}
CHECK_PATCH = 64
MIB = 1 << 20
Job = Callable[[], object]
Seconds = tuple[float, float]  # Of the process's CPU time, and by the clock.


@dataclasses.dataclass(frozen=True)
class Contender:
    name: str
    precision: str
    network: nn.Module
    variant: Any
    optimizer: torch.optim.Optimizer

    def restore(self, image: Tensor) -> Tensor:
        with torch.autocast(image.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            return self.network(image, self.variant)

    def infer(self, image: Tensor, clean: Tensor) -> None:
        with torch.inference_mode():
            self.restore(image)

    def train(self, image: Tensor, clean: Tensor) -> None:
        F.l1_loss(self.restore(image).float(), clean).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def held(self) -> int:
        """Bytes of weights and of Adam's state."""
        state = [value for values in self.optimizer.state.values() for value in values.values()]
        tensors = [*self.network.parameters(), *(value for value in state if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--patch", type=int, nargs="+", help="side, a multiple of 8; 128 256 on a GPU, 128 on a CPU")
    parser.add_argument("--batch", type=int, help="8 on a GPU, 1 on a CPU")
    parser.add_argument("--dim", type=int, default=48, help="channels at level 1; prompts scale with them")
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], help="both, where the device computes bf16")
    parser.add_argument("--rounds", type=int, help="20 on a GPU, 2 on a CPU")
    parser.add_argument("--compile", action="store_true", help="ours: torch.compile of each transformer block")
    parser.add_argument("--channels-last", action="store_true", help="ours: weights and pictures in that memory layout")
    parser.add_argument("--checkpoint-levels", type=int, nargs="*", default=[], help="ours: levels 1 to 4 to recompute")
    parser.add_argument("--profile", action="store_true", help="also where the time of our training step goes")
    parser.add_argument("--json", type=Path, help="where the line of figures goes; by default to stdout")
    given = parser.parse_args()
    on_gpu = given.device == "cuda"
    given.patch = given.patch or ([128, 256] if on_gpu else [128])
    given.batch = given.batch or (8 if on_gpu else 1)
    given.rounds = given.rounds or (20 if on_gpu else 2)
    # Processors without the instructions compute bf16 some fifty times slower than float32.
    given.precision = given.precision or (["fp32", "bf16"] if on_gpu or _cpu_computes_bf16() else ["fp32"])
    if any(patch % 8 or patch < CHECK_PATCH // 2 for patch in given.patch):
        parser.error(f"--patch: {given.patch}; the published networks take multiples of 8, here from 32 on")
    groups = []
    for variant in given.variants:
        contenders, config = make_contenders(variant, given)
        check_equal(contenders, config, VARIANTS[variant][0], given)
        for patch in given.patch:
            group = measure(contenders, config, variant, patch, given)
            groups.append(group)
            print_group(group, given)
        if given.profile:
            for contender in contenders:
                if contender.name == "ours":
                    print_profile(contender, variant, given)
        del contenders
    line = json.dumps(environment(given) | {"groups": groups})
    if given.json:
        write_atomically(given.json, f"{line}\n".encode())
    else:
        print(line)


def _cpu_computes_bf16() -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def make_contenders(variant: str, given: argparse.Namespace) -> tuple[list[Contender], ModelConfig]:
    """Both networks with the same weights, each as often as there are precisions."""
    torch.manual_seed(0)
    kind, own_variant = VARIANTS[variant]
    depths = DyNetConfig().variants
    prompts = tuple(zip(DyNetConfig(dim=given.dim).resolved_prompt_channels[1:], (64, 32, 16)))
    blocks = None if kind == "dynet" else depths["large"]
    public = PublicRestorer(blocks, dim=given.dim, prompts=prompts)
    with torch.no_grad():
        for name, weight in public.named_parameters():
            if "norm" in name or "temperature" in name:  # As made, at 1 and 0, they would hide a mistake.
                weight.add_(torch.randn_like(weight), alpha=0.1)
    match = match_checkpoint(public.state_dict(), kind)
    if match.faults:
        sys.exit(f"{variant}: the published weights do not fit: {match.faults}")
    config = match.config.model_copy(update={"checkpoint_levels": tuple(given.checkpoint_levels)})
    ours = build_model(config)
    ours.load_state_dict(match.weights)
    ours.to(given.device)
    if given.channels_last:
        ours.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if given.compile:
        compile_blocks(ours)
    contenders = []
    for name, network, depth in (
        ("published", public.to(given.device), depths.get(variant, (1, 1, 1, 1))),
        ("ours", ours, own_variant),
    ):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
        contenders += [Contender(name, precision, network, depth, optimizer) for precision in given.precision]
    return contenders, config


def pictures(patch: int, given: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """A corrupted batch and what it was, [batch, 3, patch, patch] in [0, 1]."""
    generator = torch.Generator().manual_seed(1)
    clean = F.interpolate(torch.rand(given.batch, 3, 8, 8, generator=generator), (patch, patch), mode="bicubic")
    clean = clean.clamp(0, 1)
    image = (clean + 0.1 * torch.randn(clean.shape, generator=generator)).clamp(0, 1)
    if given.channels_last:
        image = image.contiguous(memory_format=torch.channels_last)
    return image.to(given.device), clean.to(given.device)


def check_equal(contenders: list[Contender], config: ModelConfig, kind: Kind, given: argparse.Namespace) -> None:
    """Stop unless ours computes what the published network does.

    Distances are root mean squares, relative to what the published network adds to a picture and to its gradients.
    In float32: 1e-5 and 1e-4. In bf16, where both round: ours is no further from the published network's float32
    than 1.5 times that network under autocast is.
    """
    image, clean = pictures(CHECK_PATCH, given)

    def compute(contender: Contender) -> tuple[Tensor, Tensor]:
        restored = contender.restore(image).float()
        F.l1_loss(restored, clean).backward()
        gradients = {name: weight.grad for name, weight in contender.network.named_parameters()}
        if contender.name == "ours":
            gradients = {public_name(name, config, kind): gradient for name, gradient in gradients.items()}
        flat = torch.cat([part.flatten() for _, part in sorted(gradients.items()) if part is not None])
        contender.optimizer.zero_grad(set_to_none=True)
        return restored.detach() - image, flat

    published = next(contender for contender in contenders if contender.name == "published")
    expected = compute(dataclasses.replace(published, precision="fp32"))
    bounds = {"fp32": (1e-5, 1e-4)}
    for contender in contenders:
        found = compute(contender)
        if any(a.shape != b.shape for a, b in zip(found, expected)):
            sys.exit(f"{contender.name}: gradients for other weights than the published network's")
        far = [float((a - b).norm() / b.norm()) for a, b in zip(found, expected)]
        if contender.name == "published":
            bounds.setdefault(contender.precision, (1.5 * far[0], 1.5 * far[1]))
            continue
        bound = bounds[contender.precision]
        what = f"{config.name} {contender.variant} {contender.precision}: off by {far[0]:.1e}, gradients {far[1]:.1e}"
        what += f" (at most {bound[0]:.1e}, {bound[1]:.1e})"
        if not all(value <= limit for value, limit in zip(far, bound)):
            sys.exit(f"{what}: not the published network")
        Console(stderr=True).print(what)


def measure(
    contenders: list[Contender], config: ModelConfig, variant: str, patch: int, given: argparse.Namespace
) -> dict[str, Any]:
    """All figures of one variant and size of picture."""
    image, clean = pictures(patch, given)
    macs = count_cost(config, VARIANTS[variant][1], patch, patch).macs * given.batch
    jobs: dict[tuple[str, ...], Job] = {}
    memory: dict[tuple[str, str, str], dict[str, int]] = {}
    for contender in contenders:
        for mode, run in (("training", contender.train), ("inference", contender.infer)):
            job = functools.partial(run, image, clean)
            job()
            jobs[contender.name, contender.precision, mode] = job
            memory[contender.name, contender.precision, mode] = allocations(job, given.device)
        saved = saved_bytes(contender, image)
        weights = sum(weight.numel() * weight.element_size() for weight in contender.network.parameters())
        for mode, held in (("training", contender.held), ("inference", weights)):
            memory[contender.name, contender.precision, mode]["peak"] += held
            memory[contender.name, contender.precision, mode]["held"] = held
        memory[contender.name, contender.precision, "training"]["saved"] = saved
    ceilings = {f"matmul {precision}": matmul(precision, given.device) for precision in given.precision}
    ceilings["copy"] = copy(given.device)
    work = {name: amount for name, (_, amount) in ceilings.items()}
    jobs |= {(name,): job for name, (job, _) in ceilings.items()}
    seconds = time_in_turns(jobs, given)

    taken = {key: _typical(each, given.device) for key, each in seconds.items()}
    rates = {name: amount / taken[name,] for name, amount in work.items()}
    figures = []
    for key, used in memory.items():
        name, precision, mode = key
        mine = taken[key]
        flop = 2 * macs * (3 if mode == "training" else 1)
        faster = {base: taken["published", base, mode] / mine for base in given.precision}
        figures.append(
            {
                "network": name,
                "precision": precision,
                "mode": mode,
                "images_per_second": given.batch / mine,
                "cpu_seconds": [cpu for cpu, _ in seconds[key]],
                "clock_seconds": [clock for _, clock in seconds[key]],
                "times_published": faster[precision],
                "times_published_fp32": faster.get("fp32"),
                "bytes": used,
                "of_published_peak": used["peak"] / memory["published", precision, mode]["peak"],
                "share_of_matmul": flop / mine / rates[f"matmul {precision}"],
                "share_of_copy": 2 * used["allocated"] / mine / rates["copy"],
            }
        )
    return {"variant": variant, "patch": patch, "macs": macs, "per_second": rates, "figures": figures}


def time_in_turns(jobs: dict[tuple[str, ...], Job], given: argparse.Namespace) -> dict[tuple[str, ...], list[Seconds]]:
    """Every job once a round, each second round in the opposite order; each has run twice before."""
    seconds: dict[tuple[str, ...], list[Seconds]] = {key: [] for key in jobs}
    for number in range(given.rounds):
        for key in list(jobs)[:: 1 if number % 2 else -1]:
            synchronise(given.device)
            cpu, clock = time.process_time(), time.perf_counter()
            jobs[key]()
            synchronise(given.device)
            seconds[key].append((time.process_time() - cpu, time.perf_counter() - clock))
    return seconds


def _typical(seconds: list[Seconds], device: str) -> float:
    if device == "cuda":
        return statistics.median(clock for _, clock in seconds)
    return min(cpu for cpu, _ in seconds)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def allocations(job: Job, device: str) -> dict[str, int]:
    """Bytes that ``job`` takes beside what was there: ``peak`` at one time, ``allocated`` in all."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()
        job()
        torch.cuda.synchronize()
        after = torch.cuda.memory_stats()
        total = "allocated_bytes.all.allocated"
        peak = torch.cuda.max_memory_allocated() - before["allocated_bytes.all.current"]
        return {"peak": peak, "allocated": after[total] - before[total]}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        job()
    assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
    changes = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = allocated = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak, allocated = max(peak, now), allocated + max(event.nbytes(), 0)
    return {"peak": peak, "allocated": allocated}


def saved_bytes(contender: Contender, image: Tensor) -> int:
    """What a forward pass keeps for the backward pass, without the weights; each storage once."""
    weights = {weight.untyped_storage().data_ptr() for weight in contender.network.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # The storages themselves, so that no address is used again.

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor.detach()  # The tensor itself would hold the graph that holds it.

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        contender.restore(image)
    return sum(storage.nbytes() for storage in kept.values())


def matmul(precision: str, device: str) -> tuple[Job, float]:
    """A large product and its FLOP; float32 on a GPU with TF32 where cuDNN's convolutions are allowed it."""
    side = 8192 if device == "cuda" else 1024
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    out = torch.empty_like(a)

    def run() -> None:
        with _as_convolutions():
            torch.mm(a, b, out=out)

    return run, 2.0 * side**3


@contextlib.contextmanager
def _as_convolutions() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def copy(device: str) -> tuple[Job, float]:
    """A copy between tensors that no cache holds, and the bytes it reads and writes."""
    source = torch.zeros((1024 if device == "cuda" else 128) * MIB, dtype=torch.uint8, device=device)
    target = torch.ones_like(source)
    return functools.partial(target.copy_, source), 2.0 * source.numel()


def print_group(group: dict[str, Any], given: argparse.Namespace) -> None:
    rates = ", ".join(f"{name} {rate / 1e9:,.1f}" for name, rate in group["per_second"].items())
    title = f"{group['variant']}, {given.batch} x {group['patch']}x{group['patch']}, dim {given.dim}; ceilings: {rates}"
    table = Table(title=f"{title} (GFLOP or GB a second)")
    table.add_column("")
    for heading in (
        "images/s" if given.device == "cuda" else "images/CPU s",
        "x published",
        "x fp32",
        "peak MiB",
        "of published",
        "saved MiB",
        "matmul",
        "copy",
    ):
        table.add_column(heading, justify="right")
    for figure in sorted(group["figures"], key=lambda figure: figure["mode"] == "inference"):
        used = figure["bytes"]
        against_fp32 = figure["times_published_fp32"]
        table.add_row(
            f"{figure['mode']}, {figure['network']}, {figure['precision']}",
            f"{figure['images_per_second']:.2f}",
            f"{figure['times_published']:.2f}",
            f"{against_fp32:.2f}" if against_fp32 else "",
            f"{used['peak'] / MIB:,.0f}",
            f"{figure['of_published_peak']:.0%}",
            f"{used['saved'] / MIB:,.0f}" if "saved" in used else "",
            f"{figure['share_of_matmul']:.0%}",
            f"{figure['share_of_copy']:.0%}",
        )
    Console(stderr=True, width=130).print(table)


def print_profile(contender: Contender, variant: str, given: argparse.Namespace) -> None:
    """The operations that take most of a training step, by time without what they call."""
    image, clean = pictures(given.patch[0], given)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if given.device == "cuda" else [])]
    with profile(activities=activities) as recorded:
        contender.train(image, clean)
        synchronise(given.device)
    own = f"self_{'device' if given.device == 'cuda' else 'cpu'}_time_total"
    operations = sorted(recorded.key_averages(), key=lambda operation: -getattr(operation, own))
    total = sum(getattr(operation, own) for operation in operations)
    table = Table("operation", "calls", "share", title=f"{variant}, {contender.precision}: our training step")
    for operation in operations[:8]:
        table.add_row(operation.key, str(operation.count), f"{getattr(operation, own) / total:.1%}")
    Console(stderr=True, width=130).print(table)


def environment(given: argparse.Namespace) -> dict[str, Any]:
    arguments = {name: value for name, value in vars(given).items() if name != "json"}
    return {
        "commit": code_version(),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else _processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cudnn_allows_tf32": torch.backends.cudnn.allow_tf32,
        "arguments": arguments,
    }


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
