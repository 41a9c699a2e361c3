"""Which evaluation pictures a finished dataset shows."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datagen.config import SelectConfig
from datagen.dataset import DatasetError, read_samples
from datagen.select.exposure import exposed
from datagen.source.embedded import corpus_files
from infra.storage import open_store


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_copies_and_crops_are_found_and_nothing_else(built: Path) -> None:
    store = open_store(built)
    source = next(one for one in read_samples(store).column("source").to_pylist() if one.endswith("china.jpg"))
    data = corpus_files("pictures")[source.split("/", 1)[1]]
    image = Image.open(io.BytesIO(data)).convert("RGB")
    width, height = image.size
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    pictures = {
        "same": data,
        "turned and small": png(image.rotate(90, expand=True).resize((height // 2, width // 2))),
        "crop": png(image.crop((width // 20, height // 20, width - width // 16, height))),
        "other": png(Image.fromarray(noise).resize((200, 200), Image.Resampling.BICUBIC)),
        "held out": next(iter(corpus_files("held_out").values())),
        "no picture": b"nothing",
    }
    found = exposed(store, pictures, SelectConfig())
    assert {(one.name, one.source) for one in found} == {
        (name, source) for name in ("same", "turned and small", "crop")
    }
    assert all(one.correlation > 0.9 for one in found)


def test_what_the_guard_kept_out_is_not_exposed(built: Path) -> None:
    """The corpus has copies of the held-out pictures on purpose; none of them was packed."""
    assert exposed(open_store(built), corpus_files("held_out"), SelectConfig()) == []


def test_without_a_dataset_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no finished dataset"):
        exposed(open_store(tmp_path), {"a": b""}, SelectConfig())
