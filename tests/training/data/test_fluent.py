"""Shards for webdataset's own users: read by its plain reader, and by its pipeline from the exact stream."""

import io
import json
import shutil
from pathlib import Path

import pytest
import webdataset as wds
from PIL import Image
from torch.utils.data import DataLoader

from training.data.fluent import SampleStream
from training.data.shards import DamagedSampleError, ShardReader


def test_plain_webdataset_reads_the_shards(small_dataset: Path) -> None:
    urls = sorted(str(path) for path in (small_dataset / "shards").glob("*.tar"))
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("jpg;png", "json", "__key__")
    reader = ShardReader(str(small_dataset))
    seen = 0
    for number, (pixels, facts, key) in enumerate(dataset):
        sample = reader.read(number, json=True)
        assert key == sample.key == facts["key"] and facts == json.loads(sample.json)
        with Image.open(io.BytesIO(sample.image)) as image:
            assert pixels.shape == (image.height, image.width, 3)
        seen += 1
    assert seen == len(reader.index)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_fluent_pipeline_on_the_exact_stream(small_dataset: Path, workers: int) -> None:
    stream = SampleStream(ShardReader(str(small_dataset)), seed=3, window=2, epochs=2)
    pipeline = wds.DataPipeline(stream, wds.decode("rgb8"), wds.rename(image="jpg;png;webp"))
    samples = list(DataLoader(pipeline, batch_size=None, num_workers=workers))
    keys = [sample["__key__"] for sample in samples]
    everything = sorted(stream._reader.index.key(number) for number in range(len(stream._reader.index)))
    assert sorted(keys) == sorted(everything * 2)
    if not workers:
        assert sorted(keys[: len(everything)]) == everything and keys[: len(everything)] != everything
    assert all(sample["image"].ndim == 3 and sample["json"]["key"] == sample["__key__"] for sample in samples)


def test_a_start_in_the_middle_goes_on_there(small_dataset: Path) -> None:
    reader = ShardReader(str(small_dataset))
    whole = [sample["__key__"] for sample in SampleStream(reader, seed=3)]
    assert [sample["__key__"] for sample in SampleStream(reader, seed=3, start=20)] == whole[20:]


def test_damage_is_raised_and_not_passed_over(small_dataset: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(small_dataset, copy)
    reader = ShardReader(str(copy))
    (copy / reader.index.shards[0].key).unlink()
    with pytest.raises(DamagedSampleError, match=reader.index.shards[0].key):
        list(SampleStream(reader, seed=0))
