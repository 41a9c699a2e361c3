"""The commands that README.md gives to type."""

import re
import shlex

from tests.support.dataset import REPOSITORY


def readme_command(start: str) -> list[str]:
    """The words of the one command that begins so; continued lines are joined, comments dropped."""
    blocks = re.findall(r"```bash\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = [line for line in lines if line.startswith(start)]
    assert len(found) == 1, (start, lines)
    return shlex.split(found[0], comments=True)
