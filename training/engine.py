"""DeepSpeed's engine for a stage, and its optimizer's state in a form that no world size or ZeRO stage shows in."""

from typing import Any

import torch
from torch import nn

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
    from deepspeed.utils import safe_get_full_optimizer_state

    inner = torch_optimizer(engine).state
    state: OptimizerState = {}
    steps = [own["step"] for own in inner.values() if "step" in own]
    for name, weight in engine.module.named_parameters():
        if not engine.zero_optimization_stage():
            own = inner.get(weight, {})
            if "step" in own:
                state[name] = {key: own[key].detach().cpu() for key in (*_MOMENTS, "step")}
        elif steps:
            moments = {key: safe_get_full_optimizer_state(weight, key).cpu() for key in _MOMENTS}
            state[name] = {**moments, "step": steps[0].detach().cpu()}
    return state


def load_optimizer_state(engine: Any, state: OptimizerState) -> None:
    """Take up what ``optimizer_state`` gave, at any world size and ZeRO stage."""
    if not state:
        return
    optimizer = torch_optimizer(engine)
    weights = dict(engine.module.named_parameters())
    if not engine.zero_optimization_stage():
        for name, own in state.items():
            weight = weights[name]
            optimizer.state[weight] = {key: value.to(weight.device, copy=True) for key, value in own.items()}
        return
    from deepspeed.utils import safe_set_full_optimizer_state

    # ZeRO moves all weights of a part in each step, so their counts are one.
    step = max(own["step"] for own in state.values())
    for group in optimizer.param_groups:
        for part in group["params"]:
            optimizer.state[part] = {key: torch.zeros_like(part) for key in _MOMENTS}
            optimizer.state[part]["step"] = step.to(part.device, copy=True)
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, own in state.items():
        for key in _MOMENTS:
            safe_set_full_optimizer_state(weights[name], own[key].to(weights[name].device), key)


def load_weights(engine: Any, weights: dict[str, torch.Tensor]) -> None:
    """Put ``weights`` into the network and, behind ZeRO, into the optimizer's own copy of them."""
    engine.module.load_state_dict(weights)
    if engine.zero_optimization_stage():
        engine.optimizer.refresh_fp32_params()
