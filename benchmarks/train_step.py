"""What the training loop costs beside the bare model step, as ratios in one run.

    python -m benchmarks.train_step --dataset DIR [--dim 48 --patch 64 --batch 2 --steps 12 --rounds 3]

The bare step is forward, backward and a fused Adam step of the same network on one batch that lies in memory, in plain
torch; with two ranks it is torch's own DistributedDataParallel over gloo. On a CPU all is process CPU time, a mean over
the steps behind the first and the least of the rounds; on a GPU it is the clock. The aims: loop at most 3 % over the
bare step, data wait at most 2 %, the pause of a checkpoint at most 1 % of ten minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from infra.launcher import free_port
from infra.storage import open_store
from training.checkpoint import CheckpointWriter, Keep
from training.models import DyNetConfig, build_model
from training.optimization import MovingAverage

CONFIG = "configs/training/pretrain_million_ird.yaml"


def clock() -> float:
    """Seconds of the device: of the process on a CPU, by the clock on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def bare(dim: int, patch: int, batch: int, steps: int, ranks: int = 1) -> float:
    """Seconds of a step of the large variant, with its moving average, and nothing else."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    network = build_model(DyNetConfig(dim=dim)).to(device)
    model = DistributedDataParallel(network) if ranks > 1 else network
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)
    average = MovingAverage(network, 0.999)
    clean = torch.rand(batch, 3, patch, patch, device=device)
    for step in range(steps):
        if step == 1:
            started = clock()
        optimizer.zero_grad()
        functional.l1_loss(model(clean * 0.9, "large"), clean).backward()
        optimizer.step()
        average.update(network)
    return (clock() - started) / (steps - 1)


def bare_rank(arguments: argparse.Namespace) -> None:
    """One of the ranks of a bare DistributedDataParallel; rank 0 prints its seconds a step."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    seconds = bare(arguments.dim, arguments.patch, arguments.batch, arguments.steps, dist.get_world_size())
    if dist.get_rank() == 0:
        print(json.dumps(seconds))


def loop(arguments: argparse.Namespace, ranks: int, *more: str) -> dict[str, float]:
    """Means of a real run under the launcher, as its own log has them; the first step, which warms up, left out."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [f"data.dataset={arguments.dataset}", f"out={folder}/out", f"steps={arguments.steps}"]
        settings += [f"model.dim={arguments.dim}", f"data.patch={arguments.patch}", "log_every=1", "data.workers=0"]
        settings += [f"data.batch={arguments.batch * ranks}", "data.crops_per_sample=1", "data.degrade_on=worker"]
        settings += ["cotraining.mode=separate", "cotraining.variants=[large]", "tracking.enabled=false"]
        settings += ["compile=false", "precision=fp32", "zero_stage=0", "data.channels_last=false", *more]
        deepspeed = str(Path(sys.executable).with_name("deepspeed"))
        command = [deepspeed, "--num_accelerators", str(ranks), "--master_port", str(free_port())]
        command += ["--module", "training.pretrain", "--config", CONFIG, *settings]
        subprocess.run(command, check=True, capture_output=True, timeout=1800)
        lines = [json.loads(line) for line in (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()]
    steps = len(lines) - 1
    hours = 3600 * (lines[-1]["device_hours"] - lines[0]["device_hours"]) / steps / ranks
    names = ("step_ms", "data_wait_ms", "tracking_ms")
    return {"seconds": hours, **{name: sum(line[name] for line in lines[1:]) / steps for name in names}}


def bare_ranks(arguments: argparse.Namespace, ranks: int) -> float:
    """Seconds of a bare step on each of ``ranks`` processes."""
    port = str(free_port())
    processes = []
    for rank in range(ranks):
        environment = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "benchmarks.train_step", "--bare-rank", *sys.argv[1:]]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=1800)[0] for process in processes]
    return float(json.loads(said[0].splitlines()[-1]))


def checkpoint_pause(dim: int) -> tuple[float, float]:
    """Seconds that training stands still for a checkpoint, and seconds until it is written."""
    model = build_model(DyNetConfig(dim=dim))
    state = {name: p.detach() for name, p in model.named_parameters()}
    whole = {"model": state, "optimizer": {"exp_avg": state, "exp_avg_sq": state}, "average": state}
    with tempfile.TemporaryDirectory() as folder:
        writer = CheckpointWriter(open_store(folder), Keep())
        started = time.perf_counter()
        writer.save(1, whole, {})
        paused = time.perf_counter() - started
        writer.finish()
        return paused, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2, help="patches a rank")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bare-rank", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    if arguments.bare_rank:
        bare_rank(arguments)
        return
    size = (arguments.dim, arguments.patch, arguments.batch, arguments.steps)
    alone, one, two_bare, two = [], [], [], []
    for _ in range(arguments.rounds):  # in turn, so that what else the machine does falls on all
        alone.append(bare(*size))
        one.append(loop(arguments, 1))
        two_bare.append(bare_ranks(arguments, 2))
        two.append(loop(arguments, 2))
    best, best_two = (min(runs, key=lambda run: run["seconds"]) for runs in (one, two))
    waits = best["data_wait_ms"] / best["step_ms"]
    loop_alone = best["seconds"] * (1 - waits)
    beside = loop(arguments, 1, "data.workers=1")
    paused, written = checkpoint_pause(arguments.dim)
    print(f"bare step, dim {size[0]}, {size[2]} patches of {size[1]}: {min(alone):.3f} s")
    print(f"loop over the bare step, without data: {loop_alone / min(alone) - 1:+.1%}")
    waits_beside = beside["data_wait_ms"] / beside["step_ms"]
    print(
        f"data wait: {waits_beside:.1%} of a step with a loader process, {waits:.1%} with the loader in the rank itself"
    )
    print(f"two ranks, loop over bare DistributedDataParallel: {best_two['seconds'] / min(two_bare) - 1:+.1%}")
    print(
        f"two ranks over one, CPU time of a rank's step: bare x{min(two_bare) / min(alone):.2f}, "
        f"loop x{best_two['seconds'] / best['seconds']:.2f}"
    )
    print(f"checkpoint: {paused:.2f} s pause ({paused / 600:.2%} of ten minutes), {written:.2f} s until written")


if __name__ == "__main__":
    main()
