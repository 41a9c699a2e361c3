from pathlib import Path

import pytest

from datagen.config import SourceConfig
from datagen.source.listing import SourceError, list_pictures, open_source, require_folders


def test_listing_is_sorted_within_each_source_and_passes_over_other_files(tmp_path: Path) -> None:
    for name in ("one/b.PNG", "one/a/z.jpg", "one/notes.txt", "two/a.webp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    sources = (
        SourceConfig(uri=str(tmp_path / "two"), name="late"),
        SourceConfig(uri=str(tmp_path / "one"), licence="CC0"),
    )
    pictures, others = list_pictures(sources)
    assert [picture.source for picture in pictures] == ["late/a.webp", "source-1/a/z.jpg", "source-1/b.PNG"]
    assert others == 1
    assert pictures[1].uri == str(tmp_path / "one" / "a" / "z.jpg")
    assert (pictures[1].size, pictures[1].licence) == (5, "CC0")
    assert open_source(pictures[1].root).read(pictures[1].key) == b"12345"


def test_missing_folder_and_folder_without_pictures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"leak_guard.*no such folder"):
        require_folders((SourceConfig(uri=str(tmp_path / "nowhere")),), "leak_guard")
    with pytest.raises(SourceError, match="no picture there"):
        list_pictures((SourceConfig(uri=str(tmp_path)),))


def test_the_embedded_corpus_is_a_source() -> None:
    pictures, _ = list_pictures((SourceConfig(uri="embedded:held_out"),), "guard")
    assert [picture.source for picture in pictures] == [
        "guard-0/chelsea.png",
        "guard-0/coffee.png",
        "guard-0/flower.jpg",
    ]
