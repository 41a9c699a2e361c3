"""``ird degrade``: degrade one picture file by a recipe, and write down how."""

import json
from pathlib import Path

from datagen.degradations import degrade, load_recipe
from infra.config import ConfigError
from infra.files import write_atomically
from training.data.loader import decode
from training.evaluate import to_batch, to_picture, write_picture


def degrade_file(source: Path, out: Path, recipe_name: str, seed: int) -> None:
    """Write the degraded picture as ``out`` (PNG) and its steps and parameters as ``out``.json.

    The draw is keyed by the file's name and ``seed``: the same call gives the same picture.

    Raises:
        ConfigError: ``source`` is not a readable picture, or the recipe is refused.
    """
    recipe = load_recipe(recipe_name)
    try:
        clean = to_batch(decode(source.read_bytes()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source}: {error}") from None
    degraded, meta = degrade(clean, recipe, seed=seed, epoch=0, keys=[source.name])
    write_picture(out, to_picture(degraded))
    write_atomically(Path(f"{out}.json"), json.dumps(meta[0], indent=2).encode())
    print(f"{out}: {', '.join(step['name'] for step in meta[0]['steps'])}")
