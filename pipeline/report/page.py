"""Put the sections together. The page is written whatever state the run is in: a failed run needs it most."""

import base64
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from datagen.progress import spoken
from datagen.report.page import breakable
from infra.files import write_atomically
from infra.templates import templates
from pipeline.report import curves
from pipeline.report.curation import curation
from pipeline.report.degradations import degradations
from pipeline.report.results import comparisons, decibels, results, sliders
from pipeline.report.run import GIB, registry_facts, run_facts

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"


@dataclass(frozen=True)
class Section:
    """What a section shows. ``problem`` says what is wrong with what the stage has left."""

    data: Any = None
    problem: str = ""


def write_report(root: Path, path: Path) -> Path:
    """Write the page of the run in ``root`` (the ``out`` of ``ird demo``) to ``path``; return ``path``.

    Stages that have not run are shown as such. The page asks for nothing but itself: its pictures, plots, style and
    script are inside, and its content security policy forbids the rest.

    Raises:
        OSError: ``path`` cannot be written.
    """
    root = Path(root).absolute()
    environment = templates(TEMPLATES)
    environment.filters |= {"duration": spoken, "gib": gib, "mb": megabytes, "db": decibels, "breakable": breakable}
    script, style = ((TEMPLATES / name).read_text() for name in ("report.js", "report.css"))
    page = environment.get_template("report.html").render(
        script=script,
        style=style,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        written=datetime.now().astimezone(),
        run=run_facts(root),
        geometry=curves,
        curation=_section(curation, root),
        degradations=_section(degradations, root),
        curves=_section(curves.curves, root),
        results=_section(results, root),
        comparisons=_section(comparisons, root),
        sliders=_section(sliders, root),
        registry=_section(registry_facts, root),
    )
    write_atomically(path, page.encode())
    return path


def gib(memory: int) -> str:
    """Bytes in GiB."""
    return f"{memory / GIB:.2f} GiB"


def megabytes(size: int) -> str:
    """Bytes in MB."""
    return f"{size / 1e6:.1f} MB"


def _section(build: Callable[[Path], Any], root: Path) -> Section:
    try:
        return Section(build(root))
    # A run that was killed or failed may have left anything; the other sections are still worth showing.
    except Exception as error:
        return Section(problem=f"{type(error).__name__}: {error}")
