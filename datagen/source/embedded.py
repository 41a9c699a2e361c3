"""The default corpus: photographs that ship inside dependencies, and deliberately bad files beside them.

Nothing is downloaded. ``embedded:pictures`` is the raw corpus and ``embedded:held_out`` the pictures kept for
evaluation; both exist on every node that has the dependencies, so no shared folder is needed. The bad files give the
curation something to say: each is named for what is wrong with it.
"""

import functools
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import skimage
from PIL import Image, ImageFilter

from infra.files import write_atomically
from infra.storage import Entry, NotFoundError

# Never trained on: evaluation and the before/after pictures use them.
HELD_OUT = ("chelsea.png", "coffee.png", "flower.jpg")

_SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "grass.png", "gravel.png"),
    *("hubble_deep_field.jpg", "ihc.png", "moon.png", "motorcycle_left.png", "motorcycle_right.png", "retina.jpg"),
    "rocket.jpg",
)
_SKLEARN = ("china.jpg", "flower.jpg")


class EmbeddedSource:
    """A source (see ``datagen.source.Source``) that reads the embedded corpus."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._files = corpus_files(uri.removeprefix("embedded:"))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        for key, data in sorted(self._files.items()):
            if key.startswith(prefix):
                yield Entry(key, len(data), "embedded")

    def read(self, key: str) -> bytes:
        if key not in self._files:
            raise NotFoundError(f"{self.uri}/{key}: not in the embedded corpus")
        return self._files[key]


@functools.cache
def corpus_files(part: str) -> dict[str, bytes]:
    """File name to bytes of ``pictures`` or ``held_out``."""
    photographs = _photographs()
    if part == "held_out":
        return {name: photographs[name] for name in HELD_OUT if name in photographs}
    if part == "pictures":
        training = {name: data for name, data in photographs.items() if name not in HELD_OUT}
        return training | _bad_files(photographs)
    raise ValueError(f"embedded:{part}: there are embedded:pictures and embedded:held_out")


def materialise(folder: str | Path) -> Path:
    """Write both parts below ``folder`` as ``pictures/`` and ``held_out/``; files already right are left alone."""
    for part in ("pictures", "held_out"):
        for name, data in corpus_files(part).items():
            path = Path(folder) / part / name
            if not path.exists() or path.read_bytes() != data:
                write_atomically(path, data)
    return Path(folder)


def _photographs() -> dict[str, bytes]:
    folder = Path(skimage.__file__).parent / "data"
    files = {name: folder / name for name in _SKIMAGE}
    try:
        import sklearn
    except ImportError:  # Comes with MLflow; a data-only installation may lack it.
        pass
    else:
        files |= {name: Path(sklearn.__file__).parent / "datasets" / "images" / name for name in _SKLEARN}
    return {name: path.read_bytes() for name, path in files.items() if path.exists()}


def _bad_files(photographs: dict[str, bytes]) -> dict[str, bytes]:
    astronaut = _pixels(photographs["astronaut.png"])
    coffee = _pixels(photographs["coffee.png"])
    rocket = photographs["rocket.jpg"]
    gravel = _pixels(photographs["gravel.png"])
    rng = np.random.default_rng(0)
    dim = rng.integers(118, 121, (384, 384, 3), dtype=np.uint8)
    mirrored = gravel.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # What a leak looks like in the wild: an evaluation picture, shrunk, mirrored and saved again.
    leak = coffee.resize((480, 320)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return {
        "astronaut_blurred.png": _png(astronaut.filter(ImageFilter.GaussianBlur(6))),
        "astronaut_reencoded.jpg": _jpeg(astronaut, 88),
        "astronaut_tiny.png": _png(astronaut.resize((64, 64))),
        "coffee_leak.jpg": _jpeg(leak, 90),
        "flat.png": _png(Image.fromarray(dim)),
        "gravel_mirrored.jpg": _jpeg(mirrored, 92),
        "rocket_copy.jpg": rocket,
        "rocket_truncated.jpg": rocket[: len(rocket) * 6 // 10],
        "text.png": b"This is a text file with the name of a picture.\n",
    }


def _pixels(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
