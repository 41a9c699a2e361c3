"""From a recipe to degraded images: draw every parameter first, then run what was drawn.

Drawing writes a complete record of each sample (its *meta*); running reads nothing but that record. Replaying a
stored record is therefore the same act as degrading.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datagen.degradations.checks import check_images
from datagen.degradations.random import field_seed, generator
from datagen.degradations.recipe import Entry, OneOf, Recipe, Shuffle, Step, choose
from datagen.degradations.steps import STEPS, Frame

Meta = dict[str, Any]

RESIZING = ("resize", "resize_to_output", "downsample_direct")


def degrade(
    clean: Tensor, recipe: Recipe, *, seed: int, epoch: int, keys: Sequence[str], draw: int = 0
) -> tuple[Tensor, list[Meta]]:
    """Degrade a batch, each sample by its own draw from ``recipe``.

    ``clean``: (N, 3, H, W), float32 in [0, 1], on any device. Returns the degraded batch (N, 3, H / scale,
    W / scale) and one meta a sample: ``{"key", "recipe", "chain", "steps": [{"name", **parameters}]}``, of JSON types.
    A sample's result depends on (seed, epoch, its key, draw), its pixels and the recipe only: on the CPU bit for
    bit, whatever else is in the batch. ``draw`` tells several crops of one sample in one epoch apart.

    Raises:
        TypeError, ValueError: ``clean`` is no batch of images, keys do not match it, or its size is no multiple of
            the recipe's scale.
    """
    check_images(clean, channels=3)
    if len(keys) != clean.shape[0]:
        raise ValueError(f"{len(keys)} keys for a batch of {clean.shape[0]}")
    height, width = clean.shape[-2:]
    metas = [plan(recipe, seed=seed, epoch=epoch, key=key, draw=draw, height=height, width=width) for key in keys]
    return replay(clean, metas), metas


def plan(recipe: Recipe, *, seed: int, epoch: int, key: str, draw: int = 0, height: int, width: int) -> Meta:
    """Draw the meta of one sample of height x width pixels, without touching a pixel."""
    if height % recipe.scale or width % recipe.scale:
        raise ValueError(f"recipe {recipe.name}: {height}x{width} is no multiple of its scale {recipe.scale}")
    rng = generator(seed, epoch, key, draw)
    chain = choose(recipe.chains, rng)
    steps: list[dict[str, Any]] = []
    frame = Frame(height, width, height // recipe.scale, width // recipe.scale)
    for step in _flatten(chain.steps, rng):
        drawn, frame = _draw(step, rng, frame)
        steps.append(drawn)
    if (frame.height, frame.width) != (frame.output_height, frame.output_width):
        raise ValueError(
            f"recipe {recipe.name}, chain {chain.label!r}: ends at {frame.height}x{frame.width} instead of "
            f"{frame.output_height}x{frame.output_width}; add resize_to_output"
        )
    if recipe.output == "8bit":
        steps.append({"name": "quantise"})
    elif recipe.output == "clipped":
        steps.append({"name": "clip"})
    return {"key": key, "recipe": recipe.name, "chain": chain.label, "steps": steps}


def replay(clean: Tensor, metas: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> Tensor:
    """Run recorded steps again: the same clean pixels and metas give the same degraded pixels, bit for bit on the CPU.

    ``clean``: (N, 3, H, W) with N metas, or (3, H, W) with one.

    Raises:
        TypeError, ValueError: not images, not as many metas as images, or a meta that names an unknown step or holds
            parameters that its step refuses.
    """
    if isinstance(metas, Mapping):
        return replay(clean[None], [metas])[0]
    check_images(clean, channels=3)
    if len(metas) != clean.shape[0]:
        raise ValueError(f"{len(metas)} metas for a batch of {clean.shape[0]}")
    if any("steps" not in meta for meta in metas):
        raise ValueError("a meta holds no 'steps': it is not one that degrade has written")
    samples = list(clean)
    chains = [list(meta["steps"]) for meta in metas]
    for position in range(max(map(len, chains), default=0)):
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, chain in enumerate(chains):
            if position < len(chain):
                groups[_signature(chain[position], samples[index])].append(index)
        for members in groups.values():
            batch = _batch([samples[index] for index in members])
            originals = [clean[index] for index in members]
            results = _run([chains[index][position] for index in members], batch, originals)
            for index, result in zip(members, results, strict=True):
                samples[index] = result
    return torch.stack(samples)


def _batch(samples: Sequence[Tensor]) -> Tensor:
    # A view of a lone sample, since a chain often runs sample by sample and copies would be a third of its time.
    return samples[0][None] if len(samples) == 1 else torch.stack(list(samples))


def _flatten(entries: Sequence[Entry], rng: np.random.Generator) -> list[Step]:
    """The steps that happen, in the order they happen: probabilities, choices and shuffles settled."""
    steps: list[Step] = []
    for entry in entries:
        if isinstance(entry, Shuffle):
            steps += _flatten(_shuffled(entry.shuffle, rng), rng)
        elif rng.random() < entry.p:
            steps += _flatten(choose(entry.one_of, rng).steps, rng) if isinstance(entry, OneOf) else [entry]
    return steps


def _shuffled(entries: Sequence[Entry], rng: np.random.Generator) -> list[Entry]:
    order = [entries[index] for index in rng.permutation(len(entries))]
    resizing = iter([entry for entry in entries if _resizes(entry)])
    return [next(resizing) if _resizes(entry) else entry for entry in order]


def _resizes(entry: Entry) -> bool:
    if isinstance(entry, OneOf):
        return any(_resizes(below) for chain in entry.one_of for below in chain.steps)
    return isinstance(entry, Step) and entry.name in RESIZING


def _draw(step: Step, rng: np.random.Generator, frame: Frame) -> tuple[dict[str, Any], Frame]:
    kind = STEPS[step.name]
    name, values = step.name, step.sample(rng)
    if kind.resolve:
        name, values = kind.resolve(values, rng, frame)
    if STEPS[name].seeded:
        values["seed"] = field_seed(rng)
    if name == "resize":
        frame = Frame(values["height"], values["width"], frame.output_height, frame.output_width)
    elif name == "downsample_direct":
        size = (-(-frame.height // values["scale"]), -(-frame.width // values["scale"]))
        frame = Frame(*size, frame.output_height, frame.output_width)
    return {"name": name, **values}, frame


def _varies(name: str, value: Any) -> bool:
    """Real numbers and seeds differ within a batched call; whole numbers and words shape it and are shared."""
    return name == "seed" or isinstance(value, float)


def _signature(step: Mapping[str, Any], sample: Tensor) -> tuple[Any, ...]:
    shared = tuple((key, None if _varies(key, value) else value) for key, value in sorted(step.items()))
    return (sample.shape, shared)


def _run(steps: Sequence[Mapping[str, Any]], batch: Tensor, clean: Sequence[Tensor]) -> Tensor:
    name = steps[0].get("name")
    if name == "clip":
        return batch.clamp(0, 1)
    kind = STEPS.get(str(name))
    if kind is None or kind.apply is None:
        raise ValueError(f"meta names an unknown step {name!r}. Known: {', '.join(STEPS)}, clip")
    arguments = {
        key: [step[key] for step in steps] if _varies(key, value) else value
        for key, value in steps[0].items()
        if key != "name"
    }
    inputs = (batch, _batch(clean)) if kind.needs_clean else (batch,)
    try:
        return kind.apply(*inputs, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"step {name}: {error}") from error
