"""DeepSpeed's engine for a stage, and its optimizer's state in a form that no world size or ZeRO stage shows in."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from training.config import StageConfig
from training.distributed import Ranks
from training.optimization import make_optimizer

OptimizerState = dict[str, dict[str, torch.Tensor]]
"""A weight's name to its own "exp_avg", "exp_avg_sq" (float32, shaped as the weight) and "step", on the CPU."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


def make_engine(model: nn.Module, config: StageConfig, ranks: Ranks) -> Any:
    """A DeepSpeed engine around ``model``, with every setting named that DeepSpeed would otherwise choose."""
    import deepspeed

    clipping = config.optimizer.gradient_clipping
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage and not clipping:
        zero["compute_grad_norm"] = False  # nobody asks for it, and it would wait for the device in each step
    micro_batch = config.data.batch // (ranks.world_size * config.accumulate)
    settings = {
        # Where batches change their size (data.progressive), DeepSpeed only counts wrongly: losses are means.
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.accumulate,
        "train_batch_size": micro_batch * ranks.world_size * config.accumulate,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Never left out: DeepSpeed clips to 1.0 when the key is absent.
        "gradient_clipping": clipping,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimizer(model, config.optimizer), config=settings)
    return engine


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that torch steps: behind ZeRO it holds one flat part of the weights."""
    optimizer = engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return optimizer


def optimizer_state(engine: Any) -> OptimizerState:
    """The whole state, gathered from all ranks. Every rank must call it at the same step.

    Weights that no step has moved yet are left out.
    """
    state: OptimizerState = {}
    names = {weight: name for name, weight in engine.module.named_parameters()}
    inner = torch_optimizer(engine).state
    if not engine.zero_optimization_stage():
        for weight, own in inner.items():
            if "step" in own:
                state[names[weight]] = {key: own[key].detach().cpu() for key in (*_MOMENTS, "step")}
        return state
    for part, weights in _parts(engine):
        if "step" not in inner.get(part, {}):
            continue
        whole = {key: _gathered(inner[part][key]) for key in _MOMENTS}
        start = 0
        for weight in weights:
            place = slice(start, start + weight.numel())
            state[names[weight]] = {key: whole[key][place].view_as(weight).cpu() for key in _MOMENTS}
            state[names[weight]]["step"] = inner[part]["step"].detach().cpu()
            start = place.stop
    return state


def load_optimizer_state(engine: Any, state: OptimizerState) -> None:
    """Take up what ``optimizer_state`` gave, at any world size and ZeRO stage."""
    inner = torch_optimizer(engine).state
    named = dict(engine.module.named_parameters())
    if not engine.zero_optimization_stage():
        for name, own in state.items():
            inner[named[name]] = {key: value.to(named[name].device, copy=True) for key, value in own.items()}
        return
    names = {weight: name for name, weight in named.items()}
    for part, weights in _parts(engine):
        moved = [state[names[weight]] for weight in weights if names[weight] in state]
        if not moved:
            continue
        # ZeRO moves all weights of a part in each step, so their counts are one.
        inner[part] = {"step": max(own["step"] for own in moved).to(part.device, copy=True)}
        first = dist.get_rank() * part.numel()
        for key in _MOMENTS:
            values = [state[names[w]][key].flatten() if names[w] in state else w.new_zeros(w.numel()) for w in weights]
            whole = torch.cat([value.to(part.device) for value in values])
            padded = functional.pad(whole, (0, part.numel() * dist.get_world_size() - whole.numel()))
            inner[part][key] = padded[first : first + part.numel()].clone()


def load_weights(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put ``weights`` into the network and, behind ZeRO, into the optimizer's own copy of them."""
    engine.module.load_state_dict(weights)
    if engine.zero_optimization_stage():
        engine.optimizer.refresh_fp32_params()


def gradients_of_step(engine: Any) -> list[torch.Tensor]:
    """What this rank's optimizer is about to use, behind ZeRO its part of it; valid within a hook of its first step."""
    found = [p.grad for group in torch_optimizer(engine).param_groups for p in group["params"] if p.grad is not None]
    if engine.zero_optimization_stage():  # one group after the other; those to come are still here
        found += [grad for grads in engine.optimizer.averaged_gradients.values() for grad in grads or []]
    return found


def _parts(engine: Any) -> Iterator[tuple[torch.Tensor, list[nn.Parameter]]]:
    """This rank's part of each flat group of weights, and the weights that lie in the whole of it, one by one.

    The parts of all ranks, one behind the other, are the weights and some padding behind the last.
    """
    for group, weights in zip(torch_optimizer(engine).param_groups, engine.optimizer.bit16_groups, strict=True):
        (part,) = group["params"]
        yield part, list(weights)


def _gathered(part: torch.Tensor) -> torch.Tensor:
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)
