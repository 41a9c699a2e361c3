"""A Python environment that holds given requirements, what those need, and nothing else; made without a download."""

import importlib.metadata
import sys
import venv
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

_LAUNCHER = """#!{python}
import sys
from {module} import {function}
sys.exit({function}())
"""


def make_environment(folder: Path, requirements: Iterable[str]) -> Path:
    """Make a virtual environment in ``folder`` with links to the distributions installed here.

    Every requirement must be installed here in the very version that it asks for: this proves that a list of
    requirements is complete, and would install what the tests ran with.

    Returns:
        The environment's ``bin``.
    """
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    wanted = _closure(Requirement(line) for line in requirements)
    owners = Counter(top for found in wanted for top in _tops(found))
    for found in wanted:
        for top in _tops(found):
            if owners[top] == 1:
                (site / top).symlink_to(found.locate_file(top))  # type: ignore[arg-type]
        for file in found.files or []:
            if owners[file.parts[0]] > 1:  # a folder that several share
                link = site / file
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.exists():
                    link.symlink_to(found.locate_file(file))  # type: ignore[arg-type]
        for entry in found.entry_points.select(group="console_scripts"):
            script = folder / "bin" / entry.name
            function = entry.attr.split(".")[0]
            script.write_text(
                _LAUNCHER.format(python=folder / "bin" / "python", module=entry.module, function=function)
            )
            script.chmod(0o755)
    return folder / "bin"


def _closure(requirements: Iterable[Requirement]) -> list[Distribution]:
    found: dict[str, Distribution] = {}
    done: set[tuple[str, str]] = set()
    waiting = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while waiting:
        requirement, extra = waiting.pop()
        if (requirement.name, extra) in done:
            continue
        done.add((requirement.name, extra))
        distribution = importlib.metadata.distribution(requirement.name)
        if not requirement.specifier.contains(distribution.version.partition("+")[0], prereleases=True):
            raise AssertionError(f"{requirement} is asked for, {distribution.version} is installed")
        found[distribution.metadata["Name"].lower()] = distribution
        for text in distribution.requires or []:
            needed = Requirement(text)
            environment = {**default_environment(), "extra": extra}
            if needed.marker is None or needed.marker.evaluate(environment):
                waiting += [(needed, other) for other in ("", *needed.extras)]
    return list(found.values())


def _tops(distribution: Distribution) -> set[str]:
    return {
        file.parts[0]
        for file in distribution.files or []
        if file.parts[0] not in ("..", "__pycache__") and (len(file.parts) > 1 or file.suffix != ".pth")
    }


if __name__ == "__main__":
    print(make_environment(Path(sys.argv[1]), sys.argv[2:]))
