"""Which pictures a command line names, and where their results go."""

from pathlib import Path

import pytest

from infra.config import ConfigError
from pipeline.places import plan
from tests.support.s3 import S3Server

FILES = ("a.png", "deep/b.JPG", "deep/er/c.tif", "deep/notes.txt", ".hidden/d.png")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in FILES:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("sources", "out", "expected"),
    [
        (["in"], "out", {"a.png": "out/a.png", "deep/b.JPG": "out/deep/b.JPG", "deep/er/c.tif": "out/deep/er/c.tif"}),
        (["in/**/*.tif"], "out", {"deep/er/c.tif": "out/deep/er/c.tif"}),
        (["in/*/*"], "out", {"deep/b.JPG": "out/deep/b.JPG"}),
        (["in/a.png", "in/deep/b.JPG"], "out", {"a.png": "out/a.png", "b.JPG": "out/b.JPG"}),
        (["in/a.png"], "out", {"a.png": "out/a.png"}),
        (["in/a.png"], "b.webp", {"a.png": "b.webp"}),
        (["in/a.png"], "in/deep", {"a.png": "in/deep/a.png"}),
    ],
)
def test_sources_become_jobs(folder: Path, sources: list[str], out: str, expected: dict[str, str]) -> None:
    jobs = {job.name: str(job.result) for job in plan(sources, out).jobs}
    # A pattern looks into hidden folders as little as a folder does, unless it names them.
    jobs = {name: result for name, result in jobs.items() if not name.startswith(".")}
    assert jobs == {name: str(folder / result) for name, result in expected.items()}


@pytest.mark.parametrize(
    ("sources", "out", "complaint"),
    [
        (["none.png"], "out", "no such file or folder"),
        (["in/*.webp"], "out", "no picture has such a name"),
        (["in/a.png"], "in/a.png", "is the input itself"),
        (["in/a.png"], "in", "is the input itself"),
        (["in/a.png", "in/deep/b.JPG"], "in", "in/a.png is an input itself"),
        (["in/a.png", "in/deep/../a.png"], "out", "would both be written as a.png"),
        (["in/a.png"], "out.gif", "choose one of"),
        (["in"], "-", "one picture to the standard output"),
        (["-", "in"], "out", "give it alone"),
        (["-"], "out", "needs a file name"),
        (["in"], "in/a.png", "is a file"),
    ],
)
def test_what_makes_no_sense_is_refused(folder: Path, sources: list[str], out: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan(sources, out)


def test_buckets(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    s3_server.take_over(monkeypatch)
    s3_server.client.create_bucket(Bucket="places")
    for name in ("a.png", "x/b.jpg", "x/c.txt"):
        s3_server.client.put_object(Bucket="places", Key=name, Body=name.encode())
    assert [(j.name, str(j.result)) for j in plan(["s3://places"], "s3://places-out/r").jobs] == [
        ("a.png", "s3://places-out/r/a.png"),
        ("x/b.jpg", "s3://places-out/r/x/b.jpg"),
    ]
    assert [job.name for job in plan(["s3://places/*/*.jpg"], "out").jobs] == ["x/b.jpg"]
    (job,) = plan(["s3://places/x/b.jpg"], "s3://places/y/z.png").jobs
    assert (job.given.read(), str(job.result)) == (b"x/b.jpg", "s3://places/y/z.png")
    with pytest.raises(ConfigError, match="no pictures there"):
        plan(["s3://places/none"], "out")
    with pytest.raises(ConfigError, match="is the input itself"):
        plan(["s3://places/a.png"], "s3://places")
