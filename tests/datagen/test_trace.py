import hashlib
from pathlib import Path

import pytest
from PIL import Image

from datagen.dataset import read_dataset_json, read_samples
from datagen.source.embedded import corpus_files
from datagen.trace import find_pictures, read_names, trace
from infra.storage import open_store
from tests.datagen.conftest import run_datagen

SOURCE = "source-0/astronaut.png"
SHA256 = hashlib.sha256(corpus_files("pictures")["astronaut.png"]).hexdigest()


@pytest.mark.parametrize("target", [SOURCE, SHA256, "embedded:pictures/astronaut.png"], ids=["source", "sha256", "uri"])
def test_a_picture_is_found_by_any_of_its_names(built: Path, target: str) -> None:
    store = open_store(built)
    assert find_pictures(read_names(store), target).column("source").to_pylist() == [SOURCE]
    text, found = trace(store, [target])
    assert found and read_dataset_json(store)["id"] in text
    for row in read_samples(store).to_pylist():
        assert (row["key"] in text) == (row["source"] == SOURCE)


def test_a_sample_key_and_the_hash_of_pixels_lead_back(built: Path) -> None:
    store = open_store(built)
    row = read_samples(store).to_pylist()[0]
    assert row["source"] in find_pictures(read_names(store), row["key"]).column("source").to_pylist()
    pixels = find_pictures(read_names(store), SOURCE).column("pixel_sha256").to_pylist()[0]
    assert find_pictures(read_names(store), pixels).column("source").to_pylist() == [SOURCE]


def test_a_rejected_picture_says_why(built: Path) -> None:
    text, found = trace(open_store(built), ["source-0/coffee_leak.jpg"])
    assert found and "rejected (leak: guard-0/coffee.png)" in text and "sample" not in text


def test_a_local_file_is_known_by_content_and_a_changed_copy_by_its_hash(built: Path, tmp_path: Path) -> None:
    same, copy, other = tmp_path / "same.png", tmp_path / "copy.jpg", tmp_path / "other.png"
    same.write_bytes(corpus_files("pictures")["astronaut.png"])
    with Image.open(same) as image:
        image.transpose(Image.Transpose.ROTATE_90).resize((300, 300)).save(copy, quality=70)
    Image.effect_noise((200, 200), 80).save(other)
    store = open_store(built)
    assert SOURCE in trace(store, [str(same)])[0]
    text, found = trace(store, [str(copy)])
    assert found and f"like {SOURCE}" in text
    text, found = trace(store, [str(other), SOURCE])
    assert not found and "not in this corpus\n" in text and SHA256 in text
    assert trace(store, ["astronaut.png"]) == (
        f"astronaut.png\n  not in this corpus under that name; did you mean {SOURCE}?",
        False,
    )


def test_the_command_answers_with_its_exit_code(built: Path) -> None:
    done = run_datagen("trace", f"out={built}", SHA256)
    assert done.returncode == 0 and SOURCE in done.stdout, done.stderr
    assert run_datagen("trace", f"out={built}", "0" * 64).returncode == 1
