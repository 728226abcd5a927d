"""Draws: the same for all, without wells sent twice where it can be helped, and of the classes asked for."""

import math
from collections import Counter

import numpy as np
import pytest

from tests.training.plates import made_up_plate
from training.queries import ALL, DEFAULT, Cell, Draws, control_draws, query_draws

PLATE = made_up_plate("P", classes=4, sites=2)  # 8 control wells, 40 treated: 10 a class
LABELS = dict(zip(PLATE.wells.tolist(), PLATE.labels.tolist(), strict=True))


def classes_of(query):
    return Counter(LABELS[well] for well in query.tolist())


def test_draws_depend_on_the_plate_and_the_cell_alone():
    cell, draws = Cell(query=4, alpha=0.1), Draws(queries=5)
    first, again = query_draws(PLATE, cell, draws), query_draws(made_up_plate("P", classes=4), cell, draws)
    assert [query.tolist() for query in first] == [query.tolist() for query in again]
    other = query_draws(made_up_plate("Q", classes=4), cell, draws)
    assert [query.tolist() for query in first] != [query.tolist() for query in other]


def test_the_default_cell_is_the_whole_plate():
    (controls,), (query,) = control_draws(PLATE, DEFAULT.controls, Draws()), query_draws(PLATE, DEFAULT, Draws())
    assert set(controls) == set(PLATE.wells[PLATE.controls])
    assert set(query) == set(PLATE.wells[PLATE.treated])


def test_fewer_control_wells_lie_among_more_of_the_same_draw():
    one, four = (control_draws(PLATE, count, Draws(controls=3)) for count in (1, 4))
    assert [len(wells) for wells in four] == [4, 4, 4]
    assert all(set(few) < set(many) for few, many in zip(one, four, strict=True))
    assert len({tuple(wells) for wells in four}) == 3


def test_as_many_control_wells_as_there_are_can_be_drawn_once_and_more_not_at_all():
    assert len(control_draws(PLATE, 8, Draws())) == 1
    assert control_draws(PLATE, 9, Draws()) == []
    assert [len(wells) for wells in control_draws(PLATE, 0, Draws())] == [0]


def test_unshifted_queries_send_no_well_twice_before_all_have_been_sent():
    queries = query_draws(PLATE, Cell(query=8), Draws(queries=6))
    assert len({well for query in queries[:5] for well in query.tolist()}) == 40
    assert len(set(queries[5])) == 8
    assert query_draws(PLATE, Cell(query=41), Draws()) == []


@pytest.mark.parametrize("cell", [DEFAULT, Cell(query=2), Cell(query=2, alpha=0.1), Cell(query=2, alpha=0)])
def test_a_plate_of_controls_alone_has_no_query(cell):
    assert query_draws(made_up_plate("P", controls=48), cell, Draws()) == []


def test_one_class_queries_take_the_classes_in_turn():
    queries = query_draws(PLATE, Cell(query=10, alpha=0), Draws(queries=8))
    assert all(len(classes_of(query)) == 1 and len(set(query)) == 10 for query in queries)
    assert Counter(LABELS[query[0]] for query in queries) == {0: 2, 1: 2, 2: 2, 3: 2}


def test_a_class_with_too_few_wells_sends_them_again_evenly_and_no_other_class():
    for query in query_draws(PLATE, Cell(query=23, alpha=0), Draws(queries=4)):
        assert len(query) == 23
        assert set(Counter(query.tolist()).values()) == {2, 3}


@pytest.mark.parametrize("alpha", [0.01, 0.1, 1.0, 1000.0])
def test_class_shares_spread_as_those_of_a_dirichlet_multinomial(alpha):
    size, draws, classes = 8, 3000, 4
    counts = np.array(
        [
            [classes_of(query)[label] for label in range(classes)]
            for query in query_draws(PLATE, Cell(query=size, alpha=alpha), Draws(queries=draws))
        ]
    )
    assert (counts.sum(1) == size).all()
    share = 1 / classes
    variance = size * share * (1 - share) * (size + classes * alpha) / (1 + classes * alpha)
    assert counts.mean() == pytest.approx(size * share)
    assert counts.var(axis=0).mean() == pytest.approx(variance, rel=0.1)


def test_cells_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="give query_wells"):
        Cell(alpha=0.1)
    for wrong in ({"controls": -2}, {"query": 0}, {"query": 4, "alpha": -1.0}, {"query": 4, "alpha": math.nan}):
        with pytest.raises(ValueError, match="no such cell"):
            Cell(**wrong)
    assert Cell().controls == ALL
