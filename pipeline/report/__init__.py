"""The page of a demo run: one self-contained HTML file that says what was done, and shows it.

One module a section, each reading what the stages left in the run's folder; ``page`` puts them together.
"""

from pipeline.report.page import write_report

__all__ = ["write_report"]
