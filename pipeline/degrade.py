"""``ird degrade``: degrade pictures by a recipe and write down how, do it again from what was written, show it all."""

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from datagen.degradations import Recipe, degrade, load_recipe, replay
from datagen.degradations.gallery import write_gallery
from datagen.degradations.recipe import RECIPES
from datagen.degradations.resample import imresize
from infra.config import ConfigError
from infra.files import write_atomically
from pipeline.pictures import (
    Picture,
    PictureError,
    inputs_below,
    read_picture,
    refuse_input_as_output,
    write_picture,
)

DEFAULT_RECIPE = "all_in_one_3"
LOSSLESS = (".png", ".webp", ".tif", ".tiff")


def degrade_files(source: Path, out: Path, recipe_name: str, seed: int, console: Console | None = None) -> int:
    """Degrade a picture, or all pictures below a folder, and write each one's meta beside it as NAME.json.

    The draw is keyed by ``seed`` and the picture's name, below the folder: the same call gives the same pixels. Those
    of a folder keep their names and sub-folders below ``out`` and become PNG. A picture that fails does not stop the
    others. Where sides are no multiple of the recipe's scale, what is too much at the right and below is cut off.

    Returns:
        0 all degraded; 1 some pictures failed, each is named at the end.

    Raises:
        ConfigError: refused before any work: no such recipe or input, or an output that makes no sense.
    """
    console = console or Console()
    recipe = load_recipe(recipe_name)
    pairs = _pairs(source, out)
    failures = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not source.is_dir()) as progress:
        task = progress.add_task("degrade", total=len(pairs))
        for given, result in pairs:
            name = given.relative_to(source).as_posix() if source.is_dir() else given.name
            try:
                steps = _degrade_file(given, result, name, recipe, seed)
            except (OSError, ValueError, RuntimeError, MemoryError) as error:  # torch: "out of memory" by RuntimeError
                failures.append((name, str(error) or type(error).__name__))
            else:
                if not source.is_dir():
                    _say(console, f"{result}: {', '.join(steps)}")
            progress.advance(task)
    failed = f", {len(failures)} failed" if failures else ""
    if source.is_dir():
        _say(console, f"{len(pairs) - len(failures)} degraded by {recipe.name}{failed}: {out}")
    for name, message in failures:
        _say(console, f"  failed: {name}: {message}")
    return 1 if failures else 0


def replay_file(record: Path, source: Path, out: Path) -> None:
    """Degrade ``source`` as ``record``, a JSON file of ``degrade_files``, says: the same file gives the same pixels.

    Raises:
        ConfigError: ``record`` is no such file, ``source`` no readable picture, of another size than the one that the
            record was made from, or ``out`` cannot hold the result. A picture of the same size but with other pixels
            is degraded all the same, with a note on stderr.
    """
    meta = _read_record(record)
    _check_output(source, out)
    try:
        picture = read_picture(source)
    except (OSError, PictureError) as error:
        raise ConfigError(f"{source}: {error}") from None
    height, width = meta["size"]
    if not (0 <= picture.pixels.shape[0] - height < 16 and 0 <= picture.pixels.shape[1] - width < 16):
        found = "x".join(map(str, picture.pixels.shape[:2]))
        raise ConfigError(
            f"{source}: {found} pixels, but {record} was made from {height}x{width} (height x width); "
            f"give the picture {meta.get('picture', '')!r} that it was made from"
        )
    picture = _cut(picture, height, width)
    if _fingerprint(picture) != meta.get("pixels"):
        print(f"note: {source} has other pixels than what {record} was made from", file=sys.stderr)
    try:
        degraded = replay(_tensor(picture), meta)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{record}: {error}") from None
    write_picture(out, _degraded(picture, degraded))
    write_atomically(Path(f"{out}.json"), _record(meta))


def gallery(out: Path, source: Path | None, recipe_name: str | None, console: Console | None = None) -> None:
    """Write ``datagen.degradations.gallery`` of a picture, with samples of one recipe or of all.

    Raises:
        ConfigError: ``source`` is not a readable picture or too small, no such recipe, or another suffix than .html,
            .png or .jpg.
    """
    names = [recipe_name] if recipe_name else sorted(path.stem for path in RECIPES.glob("*.yaml"))
    recipes = [load_recipe(name) for name in names]
    try:
        clean = None if source is None else _tensor(read_picture(source))
    except (OSError, PictureError) as error:
        raise ConfigError(f"{source}: {error}") from None
    try:
        rows = write_gallery(out, clean, recipes)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    _say(console or Console(), f"{out}: {rows} rows")


def _degrade_file(source: Path, out: Path, key: str, recipe: Recipe, seed: int) -> Sequence[str]:
    picture = read_picture(source)
    height, width = (side // recipe.scale * recipe.scale for side in picture.pixels.shape[:2])
    if not height or not width:
        raise PictureError(f"smaller than {recipe.scale}x{recipe.scale} pixels, the scale of recipe {recipe.name}")
    picture = _cut(picture, height, width)
    degraded, metas = degrade(_tensor(picture)[None], recipe, seed=seed, epoch=0, keys=[key])
    write_picture(out, _degraded(picture, degraded[0]))
    # After the picture: a record always has its picture.
    write_atomically(Path(f"{out}.json"), _record(metas[0] | {"picture": source.name, "pixels": _fingerprint(picture)}))
    return [step["name"] for step in metas[0]["steps"]]


def _tensor(picture: Picture) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(picture.pixels.transpose(2, 0, 1)))


def _cut(picture: Picture, height: int, width: int) -> Picture:
    alpha = None if picture.alpha is None else picture.alpha[:height, :width]
    return Picture(picture.pixels[:height, :width], alpha, picture.grey, picture.bits, picture.icc)


def _degraded(clean: Picture, degraded: torch.Tensor) -> Picture:
    """Transparency and profile of the clean picture; in colour, since noise on a grey picture need not be grey."""
    pixels, alpha = degraded.clamp(0, 1).permute(1, 2, 0).numpy(), clean.alpha
    if alpha is not None and alpha.shape != pixels.shape[:2]:
        factor = pixels.shape[0] / alpha.shape[0]
        alpha = imresize(torch.from_numpy(np.ascontiguousarray(alpha))[None, None], factor)[0, 0].clamp(0, 1).numpy()
    return Picture(pixels, alpha, grey=False, bits=clean.bits, icc=clean.icc)


def _fingerprint(picture: Picture) -> str:
    return hashlib.sha256(np.ascontiguousarray(picture.pixels).tobytes()).hexdigest()


def _record(meta: dict[str, Any]) -> bytes:
    return json.dumps(meta, indent=2).encode() + b"\n"


def _read_record(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: no JSON: {error}") from None
    wanted = "expected the JSON file that `ird degrade IN OUT` writes beside OUT"
    if not isinstance(meta, dict):
        raise ConfigError(f"{path}: holds a {type(meta).__name__}; {wanted}")
    missing = [name for name in ("recipe", "size", "steps") if name not in meta]
    if missing:
        raise ConfigError(f"{path}: lacks {', '.join(repr(name) for name in missing)}; {wanted}")
    size = meta["size"]
    if not (isinstance(size, list) and len(size) == 2 and all(type(side) is int and side > 0 for side in size)):
        raise ConfigError(f"{path}: size = {size!r}; expected [height, width] in pixels")
    return meta


def _pairs(source: Path, out: Path) -> list[tuple[Path, Path]]:
    """What is read, and where its result goes."""
    if not source.is_dir():
        if not source.is_file():
            raise ConfigError(f"{source}: no such file or folder")
        result = out / f"{source.stem}.png" if out.is_dir() or not out.suffix else out
        _check_output(source, result)
        return [(source, result)]
    results: dict[Path, Path] = {}
    for path in inputs_below(source, out):
        result = path.with_suffix(".png")
        if result in results:
            raise ConfigError(f"{source}: {results[result]} and {path} would both become {result}; rename one")
        results[result] = path
    return [(source / path, out / result) for result, path in results.items()]


def _check_output(source: Path, out: Path) -> None:
    if out.suffix.lower() not in LOSSLESS:
        raise ConfigError(f"{out}: must keep the pixels as they are; choose one of {', '.join(LOSSLESS)}")
    refuse_input_as_output(source, out)


def _say(console: Console, line: str) -> None:
    console.print(line, markup=False, highlight=False, soft_wrap=True)
