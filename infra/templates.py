"""Jinja templates, read under one set of rules."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def templates(folder: Path, *, markup: bool = True) -> Environment:
    """The templates in ``folder``. What a page is given is escaped, and a name that it is not given is an error.

    Args:
        markup: False for plain text, which keeps what it is given and its last line break.
    """
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=markup,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=not markup,
    )
