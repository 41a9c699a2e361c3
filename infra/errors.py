"""What a message to a person is made of: one base for refusals, and no secret in any of them."""

import re


class Refusal(Exception):
    """The message says what is wrong, where, and what to do; the commands print it and nothing else."""


def without_password(text: str) -> str:
    """``text`` with user and password taken out of every URL in it."""
    return re.sub(r"://[^/@\s]*@", "://***@", text)
