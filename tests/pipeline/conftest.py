"""Fixtures of the pipeline's tests."""

from tests.support.registry import command, export, pushed, run_id, settings  # noqa: F401  (pytest finds them here)
