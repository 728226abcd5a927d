"""Which control sites enter the statistics.

One forward pass measures the whole context (statistics of chunks cannot be averaged beyond the first layer), so a plate
with more control sites than fit is thinned evenly over its wells, always in the same way.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from model.errors import NoControlsError, TooFewControlsError
from model.layout import SiteKey

MAX_CONTEXT_SITES = 128
"""How many sites are measured in one pass, unless a bundle says otherwise."""


@dataclass(frozen=True)
class Context:
    """The control sites that are measured, and those left out because the context is full; both sorted."""

    used: tuple[SiteKey, ...]
    left_out: tuple[SiteKey, ...] = ()

    @property
    def wells(self) -> tuple[str, ...]:
        """The wells measured, sorted: sites of one well are correlated, so wells are what counts."""
        return tuple(sorted({site.well for site in self.used}))


def choose_context(sites: Iterable[SiteKey], max_sites: int) -> Context:
    """Choose at most ``max_sites`` sites, evenly over wells: every well's first site, then every well's second, ….

    The choice depends on the set of sites alone, never on the order they came in.

    Raises:
        NoControlsError: there is no site.
    """
    by_well: dict[str, list[SiteKey]] = defaultdict(list)
    for site in sorted(set(sites)):
        by_well[site.well].append(site)
    if not by_well:
        raise NoControlsError("no control sites: send the plate's negative-control wells to …/controls")
    rounds = sorted((rank, site) for members in by_well.values() for rank, site in enumerate(members))
    chosen = [site for _, site in rounds[:max_sites]]
    return Context(used=tuple(sorted(chosen)), left_out=tuple(sorted(site for _, site in rounds[max_sites:])))


def wells_needed(wells: int, minimum_wells: int) -> int:
    """How many more control wells the bundle's minimum asks for."""
    return max(0, minimum_wells - wells)


def require_wells(wells: int, minimum_wells: int) -> None:
    """Check the bundle's minimum.

    Raises:
        TooFewControlsError: fewer control wells than that.
    """
    needed = wells_needed(wells, minimum_wells)
    if needed:
        raise TooFewControlsError(
            f"{wells} control wells are kept, the bundle needs {minimum_wells}: send {needed} more", wells_needed=needed
        )
