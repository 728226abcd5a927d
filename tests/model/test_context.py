"""Which control sites are measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.context import choose_context, require_wells, wells_needed
from model.errors import NoControlsError, TooFewControlsError
from model.layout import SiteKey

SITES = st.lists(st.builds(SiteKey, st.sampled_from(["A01", "B02", "C03", "D04"]), st.integers(0, 9)), min_size=1)


@given(SITES, st.integers(1, 20), st.randoms())
def test_the_choice_depends_on_the_set_of_sites_alone(sites, most, random):
    shuffled = sites * 2
    random.shuffle(shuffled)
    chosen = choose_context(sites, most)
    assert choose_context(shuffled, most) == chosen
    assert sorted([*chosen.used, *chosen.left_out]) == sorted(set(sites))
    assert len(chosen.used) == min(most, len(set(sites)))
    assert list(chosen.used) == sorted(chosen.used)


@given(SITES, st.integers(1, 20))
def test_wells_are_thinned_evenly(sites, most):
    chosen = choose_context(sites, most)
    used = {well: sum(site.well == well for site in chosen.used) for well in {site.well for site in sites}}
    for site in chosen.left_out:
        assert used[site.well] >= max(used.values()) - 1


def test_no_control_and_too_few_are_told():
    with pytest.raises(NoControlsError):
        choose_context([], 5)
    assert (wells_needed(3, 4), wells_needed(4, 4), wells_needed(9, 4)) == (1, 0, 0)
    require_wells(4, 4)
    with pytest.raises(TooFewControlsError, match="send 3 more") as refused:
        require_wells(1, 4)
    assert refused.value.members["wells_needed"] == 3
