"""The page of a run, from a real curation and a real evaluation, opened in a real browser."""

import itertools
import json
import re
import shutil
import urllib.parse
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datagen.dataset import SELECTION, read_json, read_table, write_table
from datagen.degradations.steps import STEPS
from datagen.picture.region import decode_whole
from datagen.source.embedded import materialise
from infra.config import dump_config
from infra.storage import open_store
from infra.tracking import TrackingConfig
from pipeline.curves import read_history
from pipeline.report import curves, write_report
from pipeline.report.degradations import degradations
from pipeline.report.results import results, task_title
from pipeline.stages import Stage, run_stages
from tests.support.browser import open_page
from training.evaluate import EvaluateConfig, Restoration, SuperResolution, evaluate
from training.export import save_export
from training.models import DyNetConfig, EDSRConfig, build_model
from training.pretrain import PretrainConfig

# A file may have this name on Linux.
HOSTILE = """<img src=x onerror=alert(1)><script>document.title="owned"<b>&{{7*7}}'"""
SECRET = "not-for-the-page"
URI = f"postgresql://ird:{SECRET}@db.example/mlflow"


class Page(HTMLParser):
    """What the assertions need of a DOM: the attributes of every element, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self._raw = ""

    def handle_data(self, data: str) -> None:
        if not self._raw:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def by_id(self, name: str) -> dict[str, str | None]:
        return next(attributes for _, attributes in self.elements if attributes.get("id") == name)


@pytest.fixture(scope="module")
def run_folder(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as ``ird demo`` leaves it: curated, evaluated with untrained networks, registered, restored."""
    root = tmp_path_factory.mktemp("run")

    def dataset(folder: Path) -> dict[str, int]:
        shutil.copytree(small_dataset, folder / "out")
        _rename_in_selection(folder / "out", "flat.png", HOSTILE)
        return {"peak_memory": 3 * 2**29}

    def pretrain(folder: Path) -> dict[str, int]:
        out = folder / "out"
        data = {"dataset": str(root / "dataset/out"), "patch": 48, "batch": 8}
        settings = {"out": str(out), "steps": 40, "model": {"name": "dynet"}, "data": data}
        dump_config(PretrainConfig.model_validate(settings), out / "config.yaml")
        lines = [{"step": s, "loss": 2.0 / s, "loss_small": 2.1 / s, "loss_large": 1.9 / s} for s in (10, 20, 10, 30)]
        torn = '{"step": 40, "lo'
        (out / "metrics.jsonl").write_text("\n".join([*map(json.dumps, lines), torn]))
        return {"peak_memory": 2**30}

    def measured(folder: Path) -> dict[str, int]:
        pictures = root / "held_out"
        materialise(root / "embedded")
        pictures.mkdir()
        shutil.copyfile(root / "embedded" / "held_out" / "coffee.png", pictures / f"{HOSTILE}.png")
        dynet, edsr = DyNetConfig(dim=8, prompts="none"), EDSRConfig(blocks=1, features=8)
        for config in (dynet, edsr):
            save_export(build_model(config), config, root / config.name, {})
        evaluate(
            EvaluateConfig(
                pictures=str(pictures),
                out=str(folder / "out"),
                crop=96,
                restoration=Restoration(model=str(root / "dynet"), recipe="all_in_one_3"),
                super_resolution=SuperResolution(model=str(root / "edsr")),
                tracking=TrackingConfig(enabled=False),
            )
        )
        return {}

    def restore(folder: Path) -> dict[str, str]:
        made = root / "evaluate" / "out" / "pictures" / "noise_50" / HOSTILE
        for part, method in (("degraded", "degraded"), ("small", "dynet-small"), ("large", "dynet-large")):
            (folder / part).mkdir()
            shutil.copyfile(made / f"{method}.png", folder / part / f"{HOSTILE}.png")
        return {"task": "noise_50"}

    steps: list[tuple[str, Callable[[Path], dict]]] = [
        ("dataset", dataset),
        ("pretrain", pretrain),
        ("evaluate", measured),
        ("register", lambda folder: {"model": "models:/ird-demo@demo", "version": 3, "uri": URI}),
        ("restore", restore),
    ]
    run_stages([Stage(name, name, run, {}) for name, run in steps], root, print)
    (root / "mlflow.json").write_text(json.dumps({"run_id": "0"}))
    return root


def _rename_in_selection(out: Path, name: str, new: str) -> None:
    """Give one file of the corpus another name, in both tables that hold it."""
    store = open_store(out)
    tables = [SELECTION, *(entry.key for entry in store.list("curation/inventory/"))]
    for key in tables:
        table = read_table(store, key)
        for column in {"source", "key"} & set(table.column_names):
            values = [v.replace(name, new) for v in table.column(column).to_pylist()]
            table = table.set_column(table.column_names.index(column), column, pa.array(values, pa.string()))
        write_table(store, key, table)


@pytest.fixture(scope="module")
def opened(run_folder: Path, chromium: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Page, np.ndarray]:
    """The page as the browser has it after its scripts, and a screenshot."""
    folder = tmp_path_factory.mktemp("page")
    dom, screenshot = open_page(chromium, write_report(run_folder, folder / "report.html"), folder)
    return Page(dom), decode_whole(screenshot.read_bytes())


def test_every_picture_is_loaded_and_has_a_text(opened: tuple[Page, np.ndarray]) -> None:
    page, _ = opened
    (html,) = page.all("html")
    pictures = page.all("img")
    assert html["data-broken-images"] == "0"
    assert int(html["data-images"] or 0) == len(pictures) > 100
    assert all(picture["alt"] for picture in pictures)


def test_the_page_needs_nothing_but_itself(opened: tuple[Page, np.ndarray], run_folder: Path, tmp_path: Path) -> None:
    page, _ = opened
    links = [(a, v) for _, attributes in page.elements for a, v in attributes.items() if a in ("src", "href", "srcset")]
    assert {urllib.parse.urlparse(value).scheme for _, value in links} == {"data", ""}
    assert all(str(value).startswith(("data:image/jpeg;base64,", "#")) for _, value in links)
    html = write_report(run_folder, tmp_path / "report.html").read_text()
    assert "url(" not in html and "@import" not in html
    assert len(html) < 8e6
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'; img-src data:;")


def test_the_funnel_is_that_of_the_curation(opened: tuple[Page, np.ndarray], run_folder: Path) -> None:
    page, _ = opened
    store = open_store(run_folder / "dataset" / "out")
    verdicts = Counter(read_table(store, SELECTION).column("verdict").to_pylist())
    funnel = page.by_id("funnel")
    for verdict in ("kept", "rejected", "failed"):
        assert funnel[f"data-{verdict}"] == str(verdicts[verdict]) != "0"
    assert funnel["data-inputs"] == str(sum(verdicts.values()))
    assert "does not add up" not in page.text
    facts = read_json(store, "dataset.json")
    assert facts["id"] in page.text
    # Each reason's measure, and both sides of what was found twice.
    assert re.search(r"shorter side 64 < 256", page.text)
    assert re.search(r"same picture as\s*rocket\.jpg", page.text)
    assert re.search(r"same picture as\s*coffee\.png", page.text)
    assert "no picture could be decoded" in page.text


def test_names_of_files_are_text_and_nothing_else(opened: tuple[Page, np.ndarray]) -> None:
    page, _ = opened
    assert page.text.count(HOSTILE) >= 8  # curation, table, strips, sliders
    assert len(page.all("script")) == 1
    assert not [1 for _, attributes in page.elements for name in attributes if name.startswith("on")]


def test_headings_are_in_order(opened: tuple[Page, np.ndarray]) -> None:
    page, _ = opened
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    assert {link["href"] for link in page.all("a")} <= {f"#{e['id']}" for _, e in page.elements if e.get("id")}


def test_the_screenshot_shows_the_pictures(opened: tuple[Page, np.ndarray]) -> None:
    """Thousands of colours: neither a blank page nor an error page of the browser."""
    _, screenshot = opened
    assert screenshot.shape[1] == 1280
    assert len(np.unique(screenshot @ np.array([1 << 16, 1 << 8, 1]))) > 20_000


def test_figures_of_the_table_are_those_of_the_evaluation(opened: tuple[Page, np.ndarray], run_folder: Path) -> None:
    page, _ = opened
    text = re.sub(r"\s+", " ", page.text)
    means = json.loads((run_folder / "evaluate/out/results.json").read_text())["means"]
    table = results(run_folder)
    assert table is not None
    assert [task.name for task in table.tasks] == list(dict.fromkeys(row["task"] for row in means))
    for row in means:
        assert f"{row['psnr']:.2f} {row['ssim']:.4f}" in text
    noisy = {row["method"]: row["psnr"] for row in means if row["task"] == "noise_50"}
    assert f"Noise, sigma 50: input {noisy['degraded']:.2f} dB → DyNet small {noisy['dynet-small']:.2f} dB" in text
    # An untrained EDSR is far below bicubic, and the page says so.
    sr = {row["method"]: row["psnr"] for row in means if row["task"] == "sr_x2"}
    assert sr["edsr"] < sr["bicubic"]
    assert "Below bicubic: EDSR." in text and f"−{sr['bicubic'] - sr['edsr']:.2f}" in text
    assert "Y of YCbCr, border of 2 pixels shaved" in text


def test_every_step_of_the_recipes_is_shown(run_folder: Path) -> None:
    section = degradations(run_folder)
    assert section is not None
    titles = " ".join(row.title.lower() for row in section.steps)
    names = {name.replace("_", " ") for name in STEPS}
    assert not {name for name in names if name not in titles}
    assert [trained.recipe for trained in section.trained] == ["dynet_pretrain"]
    for row in section.trained[0].rows:
        assert section.clean.uri not in {picture.uri for _, picture in row.pictures}


def test_curves_survive_a_resume_and_a_torn_line(run_folder: Path) -> None:
    history = read_history(run_folder / "pretrain/out/metrics.jsonl")
    assert [row["step"] for row in history] == [10, 20, 30]
    drawn = dict(curves.curves(run_folder))
    chart = drawn["DyNet co-pretraining"]
    assert chart is not None and drawn["EDSR"] is None
    assert [series.label for series in chart.series] == ["mean of what was trained", "large variant", "small variant"]
    for series in chart.series:
        heights = [y for _, y, *_ in series.points]
        assert heights == sorted(heights) and heights[0] >= curves.TOP and heights[-1] <= curves.HEIGHT - curves.BOTTOM
    ticks = [y for y, _ in chart.y_ticks]
    assert ticks == sorted(ticks, reverse=True)


def test_the_registry_section_has_commands_and_no_password(opened: tuple[Page, np.ndarray], run_folder: Path) -> None:
    page, _ = opened
    assert "ird restore --model models:/ird-demo@demo --variant small IN OUT" in page.text
    assert "mlflow ui --backend-store-uri 'postgresql://***@db.example/mlflow'" in page.text
    assert SECRET not in page.text


def test_stages_that_have_not_run_are_said_so(tmp_path: Path) -> None:
    root = tmp_path / "run"
    root.mkdir()
    page = Page(write_report(root, tmp_path / "report.html").read_text())
    assert "0 of 10 stages done" in page.text
    assert page.text.count("Not run yet") >= 7
    assert not page.all("img") and "could not be made" not in page.text


def test_what_a_killed_stage_left_does_not_stop_the_page(run_folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(run_folder, root)
    (root / "evaluate/out/results.json").write_text('{"rows": [')
    (root / "pretrain/stage.json").write_text("")
    next((root / "restore/small").iterdir()).write_bytes(b"not a picture")
    page = Page(write_report(root, tmp_path / "report.html").read_text())
    assert page.text.count("This section could not be made") == 3
    assert "23 inputs = " in page.text


def test_names_of_tasks_in_words() -> None:
    assert task_title("noise_50") == "Noise, sigma 50"
    assert task_title("blind_sr_x4") == "Super-resolution ×4, unseen blur"
    assert task_title("low_light") == "Low light"
