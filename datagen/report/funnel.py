"""The funnel: what each reason takes away, from all inputs down to what is kept."""

import dataclasses
from typing import NamedTuple

from datagen.config import DatagenConfig
from datagen.report.corpus import Corpus
from datagen.report.words import ORDER, ORDER_AFTER_SCORES, plural, reason_meaning, reason_title


@dataclasses.dataclass(frozen=True)
class Step:
    """One reason. ``left`` pictures remain after it; shares are of all inputs."""

    verdict: str
    reason: str
    title: str
    meaning: str
    count: int
    left: int
    share: float
    left_share: float


class Stage(NamedTuple):
    """Who took the pictures away: the scan or the selection."""

    title: str
    steps: list[Step]


def funnel(corpus: Corpus) -> list[Stage]:
    """Every reason in the order in which it is asked, first those of the scan."""
    stages = []
    left = corpus.inputs
    for name, title in (("scan", "Scan: files and headers"), ("select", "Selection: leaks, measures, copies")):
        steps = []
        found = [(verdict, reason, n) for (judge, verdict, reason), n in corpus.outcomes.items() if judge == name]
        for verdict, reason, count in sorted(found, key=lambda of: position(*of[:2])):
            if verdict in ("kept", "measured"):
                continue
            left -= count
            steps.append(
                Step(
                    verdict,
                    reason,
                    reason_title(reason),
                    reason_meaning(reason),
                    count,
                    left,
                    count / max(1, corpus.inputs),
                    left / max(1, corpus.inputs),
                )
            )
        if steps:
            stages.append(Stage(title, steps))
    return stages


def position(verdict: str, reason: str) -> tuple[bool, int, str]:
    """Sorts verdicts and reasons: failures first, then as they are asked for."""
    if reason in ORDER:
        place = ORDER.index(reason)
    elif reason in ORDER_AFTER_SCORES:
        place = len(ORDER) + 1 + ORDER_AFTER_SCORES.index(reason)
    else:
        place = len(ORDER)
    return verdict != "failed", place, reason


def fate_by_size(config: DatagenConfig) -> list[tuple[str, str]]:
    """What becomes of a picture of a size under a configuration, from small to large: (which, what)."""
    scan, select, tiles = config.scan, config.select, config.tiles
    fates = [
        (
            f"shorter side below {plural(scan.min_side, 'pixel')}",
            "rejected by the header as too small: not decoded, not measured (scan.min_side)",
        )
    ]
    if select.min_side > scan.min_side:
        fates.append(
            (
                f"shorter side from {scan.min_side} to {select.min_side - 1} pixels",
                "measured, then rejected as too small; a lower select.min_side brings them in without a new scan",
            )
        )
    if tiles.size is None:
        return [*fates, ("all others", "kept whole, one sample each, whatever their size (tiles.size is null)")]
    if tiles.whole_below > max(scan.min_side, select.min_side):
        fates.append(
            (
                f"longer side below {plural(tiles.whole_below, 'pixel')}",
                "kept whole, one sample each, at their own size (tiles.whole_below)",
            )
        )
    most = f", the sharpest {tiles.max_per_picture} of them at most" if tiles.max_per_picture else ""
    small = (
        f"; where a side is shorter than {tiles.size} the tile has that side's length"
        if max(scan.min_side, select.min_side) < tiles.size
        else ""
    )
    fates.append(
        (
            f"longer side {tiles.whole_below} pixels or more",
            f"cut into squares of {tiles.size} pixels that overlap by {tiles.max_overlap:.0%} at most{most}; blurred "
            f"or flat ones are left out (tiles.min_laplacian_variance {tiles.min_laplacian_variance:g}, "
            f"tiles.max_flat_fraction {tiles.max_flat_fraction:g}){small}",
        )
    )
    return fates
