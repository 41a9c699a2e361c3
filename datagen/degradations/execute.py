"""From a recipe to degraded images: draw every parameter first, then run what was drawn.

Drawing writes a complete record of each sample (its *meta*); running reads nothing but that record. Replaying a
stored record is therefore the same act as degrading.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from datagen.degradations.checks import check_images
from datagen.degradations.random import field_seed, generator
from datagen.degradations.recipe import Entry, OneOf, Recipe, Shuffle, Step, choose
from datagen.degradations.steps import STEPS, Frame

Meta = dict[str, Any]
Depth = Tensor | Sequence[Tensor | None]
"""(N, 1, H, W) in [0, 1], 0 the nearest and 1 the farthest, or one (1, H, W) or None a sample."""
Chains = Sequence[Sequence[Mapping[str, Any]]]

RESIZING = ("resize", "resize_to_output", "downsample_direct")


def degrade(
    clean: Tensor,
    recipe: Recipe,
    *,
    seed: int,
    epoch: int | Sequence[int],
    keys: Sequence[str],
    draw: int | Sequence[int] = 0,
    depth: Depth | None = None,
) -> tuple[Tensor, list[Meta]]:
    """Degrade a batch, each sample by its own draw from ``recipe``.

    ``clean``: (N, 3, H, W), float32 in [0, 1], on any device. Returns the degraded batch (N, 3, H / scale,
    W / scale) and one meta a sample: ``{"key", "recipe", "chain", "size": [H, W], "steps": [{"name", **parameters}]}``,
    of JSON types. A sample's result depends on (seed, epoch, its key, draw), its pixels, its depth and the recipe only:
    on the CPU bit for bit, whatever else is in the batch. ``draw`` tells several crops of one sample in one epoch
    apart. ``epoch`` and ``draw`` are one number for the batch, or one a sample. Where a sample has a ``depth``, haze
    lies at near + (far - near) * depth and its meta says ``"depth": "given"``; else a depth is made up.

    Raises:
        TypeError, ValueError: ``clean`` is no batch of images, keys, epochs, draws or depths do not match it, its size
            is no multiple of the recipe's scale, or a depth is not finite or outside [0, 1].
    """
    check_images(clean, channels=3)
    count, (height, width) = clean.shape[0], clean.shape[-2:]
    if len(keys) != count:
        raise ValueError(f"{len(keys)} keys for a batch of {count}")
    depths = _depths(depth, clean)
    columns = zip(keys, _each("epoch", epoch, count), _each("draw", draw, count), depths, strict=True)
    metas = [
        plan(recipe, seed=seed, epoch=e, key=key, draw=d, height=height, width=width, depth=far is not None)
        for key, e, d, far in columns
    ]
    return replay(clean, metas, depths), metas


def plan(
    recipe: Recipe, *, seed: int, epoch: int, key: str, draw: int = 0, height: int, width: int, depth: bool = False
) -> Meta:
    """Draw the meta of one sample of height x width pixels, with a ``depth`` map or without, and touch no pixel.

    A depth map changes no other parameter.
    """
    if height % recipe.scale or width % recipe.scale:
        raise ValueError(f"recipe {recipe.name}: {height}x{width} is no multiple of its scale {recipe.scale}")
    rng = generator(seed, epoch, key, draw)
    chain = choose(recipe.chains, rng)
    steps: list[dict[str, Any]] = []
    frame = Frame(height, width, height // recipe.scale, width // recipe.scale, depth)
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
    return {"key": key, "recipe": recipe.name, "chain": chain.label, "size": [height, width], "steps": steps}


def replay(clean: Tensor, metas: Mapping[str, Any] | Sequence[Mapping[str, Any]], depth: Depth | None = None) -> Tensor:
    """Run recorded steps again: the same clean pixels and metas give the same degraded pixels, bit for bit on the CPU.

    ``clean``: (N, 3, H, W) with N metas, or (3, H, W) with one; ``depth`` as in ``degrade``, or (1, H, W) with one.

    Raises:
        TypeError, ValueError: not images, not as many metas as images, a meta of a picture of another size, one that
            names an unknown step or holds parameters that its step refuses, or one that was made with a depth map
            where none is given now.
    """
    if isinstance(metas, Mapping):
        alone = depth[None] if isinstance(depth, Tensor) else depth
        return replay(clean[None], [metas], alone)[0]
    check_images(clean, channels=3)
    count, size = clean.shape[0], list(clean.shape[-2:])
    if len(metas) != count:
        raise ValueError(f"{len(metas)} metas for a batch of {count}")
    depths = _depths(depth, clean)
    for meta, far in zip(metas, depths, strict=True):
        _check_meta(meta, size, far is not None)
    originals = [one.contiguous() for one in clean]
    chains = [list(meta["steps"]) for meta in metas]
    return torch.stack((_one_by_one if clean.device.type == "cpu" else _in_groups)(chains, originals, depths))


def _one_by_one(chains: Chains, originals: Sequence[Tensor], depths: Sequence[Tensor | None]) -> list[Tensor]:
    """On a CPU nothing is gained by batches, and vectorised mathematics may round by the place in a batch."""
    samples = list(originals)
    for index, chain in enumerate(chains):
        for step in chain:
            samples[index] = _run([step], [samples[index]], [originals[index]], [depths[index]])[0]
    return samples


def _in_groups(chains: Chains, originals: Sequence[Tensor], depths: Sequence[Tensor | None]) -> list[Tensor]:
    """On a device samples with the same step at the same place in their chains take it together."""
    samples = list(originals)
    for position in range(max(map(len, chains), default=0)):
        groups: dict[Any, list[int]] = defaultdict(list)
        for index, chain in enumerate(chains):
            if position < len(chain):
                groups[_signature(chain[position], samples[index])].append(index)
        for members in groups.values():
            steps = [chains[index][position] for index in members]
            batch, clean = [samples[index] for index in members], [originals[index] for index in members]
            results = _run(steps, batch, clean, [depths[index] for index in members])
            for index, result in zip(members, results, strict=True):
                samples[index] = result
    return samples


def _each(name: str, values: int | Sequence[int], count: int) -> list[int]:
    if isinstance(values, int | np.integer):
        return [int(values)] * count
    if len(values) != count:
        raise ValueError(f"{name}: {len(values)} values for a batch of {count}")
    return [int(value) for value in values]


def _depths(depth: Depth | None, clean: Tensor) -> list[Tensor | None]:
    """One (1, H, W) depth map or None a sample, checked, on the device of ``clean``."""
    if depth is None:
        return [None] * clean.shape[0]
    if len(depth) != clean.shape[0]:
        raise ValueError(f"{len(depth)} depth maps for a batch of {clean.shape[0]}")
    return [None if one is None else _checked_depth(one, clean) for one in depth]


def _checked_depth(depth: Tensor, clean: Tensor) -> Tensor:
    wanted = (1, *clean.shape[-2:])
    if not isinstance(depth, Tensor) or not depth.is_floating_point() or tuple(depth.shape) != wanted:
        found = f"{depth.dtype} {tuple(depth.shape)}" if isinstance(depth, Tensor) else type(depth).__name__
        raise ValueError(f"a depth map must be a float tensor {wanted} with values in [0, 1], got {found}")
    nearest, farthest = (float(value) for value in torch.aminmax(depth))
    if not (nearest >= 0 and farthest <= 1):
        raise ValueError(f"a depth map must lie in [0, 1], found values from {nearest:g} to {farthest:g}")
    return depth.to(clean)


def _check_meta(meta: Mapping[str, Any], size: list[int], depth: bool) -> None:
    steps = meta.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) for step in steps):
        raise ValueError("a meta holds no 'steps': it is not one that degrade has written")
    if "size" in meta and list(meta["size"]) != size:
        made = "x".join(str(side) for side in meta["size"])
        raise ValueError(f"the meta is that of a picture of {made} pixels (height x width), not {size[0]}x{size[1]}")
    if not depth and any(step.get("depth") == "given" for step in steps):
        raise ValueError(
            f'the meta of {meta.get("key")!r} was made with a depth map ("depth": "given"): give it as depth'
        )


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
        drawn = field_seed(rng)  # also where it is not needed, so that what is drawn after it stays the same
        if values.get("depth") != "given":
            values["seed"] = drawn
    if name == "resize":
        frame = replace(frame, height=values["height"], width=values["width"])
    elif name == "downsample_direct":
        scale = values["scale"]
        frame = replace(frame, height=-(-frame.height // scale), width=-(-frame.width // scale))
    return {"name": name, **values}, frame


def _varies(name: str, value: Any) -> bool:
    """Real numbers, seeds and qualities differ within a batched call; what shapes it is shared."""
    return name in ("seed", "quality") or isinstance(value, float)


def _signature(step: Mapping[str, Any], sample: Tensor) -> tuple[Any, ...]:
    shared = tuple((key, None if _varies(key, value) else value) for key, value in sorted(step.items()))
    return (sample.shape, shared)


def _run(
    steps: Sequence[Mapping[str, Any]],
    samples: Sequence[Tensor],
    originals: Sequence[Tensor],
    depths: Sequence[Tensor | None],
) -> Tensor:
    """Run one step on samples of one size, whose parameters may differ where ``_varies`` says so."""
    name, batch = steps[0].get("name"), _batch(samples)
    if name == "clip":
        return batch.clamp(0, 1)
    kind = STEPS.get(str(name))
    if kind is None or kind.apply is None:
        raise ValueError(f"meta names an unknown step {name!r}. Known: {', '.join(STEPS)}, clip")
    given = {key: value for key, value in steps[0].items() if key != "name"}
    apply, inputs = kind.apply, [batch]
    if kind.apply_at is not None and given.pop("depth", "procedural") == "given":
        apply = kind.apply_at
        inputs.append(_batch([_fitted(depth, batch) for depth in depths if depth is not None]))
    if kind.needs_clean:
        inputs.append(_batch(originals))
    arguments = {key: [step[key] for step in steps] if _varies(key, value) else value for key, value in given.items()}
    declared = kind.named()
    try:
        for step in steps:
            for key in declared.keys() & step.keys():
                declared[key].check(step[key])
        return apply(*inputs, **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"step {name}: {error}") from error


def _fitted(depth: Tensor, batch: Tensor) -> Tensor:
    """The depth map at the size that a chain with resizes has come to."""
    size = batch.shape[-2:]
    if depth.shape[-2:] == size:
        return depth
    return functional.interpolate(depth[None], size=size, mode="bilinear", antialias=True)[0]
