"""The exact sample stream as a source for webdataset's fluent pipelines.

    wds.DataPipeline(SampleStream(reader, seed=0), wds.decode("rgb8"), wds.to_tuple("jpg;png;webp", "json"))

The shards are plain WebDataset tars, and ``wds.WebDataset`` reads them as any others. What this source adds to it:
every sample exactly once an epoch over all ranks and workers, the same order for any number of them, a start
anywhere, checksums, and shards of a bucket through the reader's cache.
"""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import IterableDataset, get_worker_info

from training.data.plan import SampleOrder
from training.data.shards import DamagedSampleError, Sample, ShardReader

_SUFFIXES = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp"}


class SampleStream(IterableDataset[dict[str, Any]]):
    """Undecoded samples as webdataset passes them from stage to stage: ``__key__``, ``__url__``, the picture, ``json``.

    Positions are dealt in turn to the ranks of ``torch.distributed`` (one, where it is not started), then to the
    workers of a torch loader.
    """

    def __init__(self, reader: ShardReader, *, seed: int, window: int = 16, start: int = 0, epochs: int = 1) -> None:
        """``start``: samples consumed before, over all ranks; ``epochs``: how many, counted from the very first."""
        self._reader, self._start = reader, start
        self._order = SampleOrder(reader.index.first, seed, window)
        self._stop = epochs * self._order.samples

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises DamagedSampleError where a sample is not what was packed."""
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for position in range(self._start + rank + ranks * number, self._stop, ranks * workers):
            _, sample = self._order.at(position)
            (found,) = self._reader.read_many([sample], json=True)
            if not isinstance(found, Sample):
                raise DamagedSampleError(found.reason)
            fields = {"__key__": found.key, "__url__": self._reader.store.uri}
            suffix = _SUFFIXES.get(found.image[:2], "bin")
            yield fields | {suffix: found.image} | ({"json": found.json} if found.json else {})
