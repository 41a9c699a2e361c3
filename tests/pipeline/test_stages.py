"""The chain of stages: what is done again, what is not, and what an interruption leaves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.stages import Stage, read_record, run_stages


def chain(ran: list[str], settings: Mapping[str, Any] | None = None, fail: str = "") -> list[Stage]:
    def work(name: str) -> Any:
        def run(folder: Path) -> Mapping[str, Any]:
            ran.append(name)
            (folder / "made.txt").write_text(
                (folder / "made.txt").read_text() + "+" if (folder / "made.txt").exists() else name
            )
            if fail == name:
                raise RuntimeError(name)
            return {"made": name}

        return run

    parents = {"a": [], "b": ["a"], "c": [], "d": ["b", "c"]}
    return [
        Stage(n, n.upper(), work(n), {"value": (settings or {}).get(n)}, after=after) for n, after in parents.items()
    ]


def test_everything_once_then_nothing(tmp_path: Path) -> None:
    ran: list[str] = []
    records = run_stages(chain(ran), tmp_path, lambda line: None)
    assert ran == ["a", "b", "c", "d"] and records["d"]["made"] == "d" and records["d"]["done"]
    assert run_stages(chain(ran), tmp_path, lambda line: None) == records and len(ran) == 4


def test_a_changed_setting_redoes_what_depends_on_it(tmp_path: Path) -> None:
    ran: list[str] = []
    run_stages(chain(ran), tmp_path, lambda line: None)
    ran.clear()
    run_stages(chain(ran, {"b": 1}), tmp_path, lambda line: None)
    assert ran == ["b", "d"]
    assert (tmp_path / "b" / "made.txt").read_text() == "b"  # the outdated folder was emptied first


def test_a_failure_resumes_at_its_stage_in_the_folder_it_left(tmp_path: Path) -> None:
    ran: list[str] = []
    with pytest.raises(RuntimeError):
        run_stages(chain(ran, fail="c"), tmp_path, lambda line: None)
    assert not read_record(tmp_path / "c")["done"]
    ran.clear()
    run_stages(chain(ran), tmp_path, lambda line: None)
    assert ran == ["c", "d"] and (tmp_path / "c" / "made.txt").read_text() == "c+"
