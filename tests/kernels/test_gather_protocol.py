"""The hand-over of buffers in the gather kernel, played step by step: it must never stand still."""

import itertools

import pytest

from pallas_kernels.hopper.tuning import GatherConfig

ITEMS = 5


def producer(config, stages):
    """What the producer waits for and does: queries of every item, then its stages of keys."""
    for item in range(ITEMS):
        yield "released", item - config.query_buffers
        yield "do loaded", item
        for stage in range(item * stages, (item + 1) * stages):
            yield "consumed", stage - config.stages
            yield "do announced", stage - config.lag
    yield "do announced", ITEMS * stages - 1


def consumer(stages):
    """What a consumer waits for and does; a query buffer is released when the next item begins."""
    for item in range(ITEMS):
        yield "loaded", item
        yield "do released", item - 1
        for stage in range(item * stages, (item + 1) * stages):
            yield "announced", stage
            yield "do consumed", stage


def ends(config, stages):
    """Whether both sides come to their end when every item has so many stages."""
    reached = dict.fromkeys(("loaded", "released", "announced", "consumed"), -1)
    sides = [producer(config, stages), consumer(stages)]
    waiting = [next(side, None) for side in sides]
    moved = True
    while moved:
        moved = False
        for number, side in enumerate(sides):
            while waiting[number] is not None:
                what, value = waiting[number]
                name = what.removeprefix("do ")
                if what == name and reached[name] < value:
                    break
                reached[name] = max(reached[name], value)
                waiting[number], moved = next(side, None), True
    return waiting == [None, None]


@pytest.mark.parametrize(
    ("stages", "lag", "buffers"),
    [(s, lag, b) for s, b in itertools.product((3, 4, 6), (2, 3)) for lag in range(1, s)],
)
def test_items_have_just_as_many_stages_as_they_need(stages, lag, buffers):
    config = GatherConfig(stages=stages, lag=lag, query_buffers=buffers)
    least = config.least_stages
    assert all(ends(config, stages) for stages in range(least, least + 4))
    assert least == 1 or not ends(config, least - 1)


def test_one_query_buffer_is_refused():
    with pytest.raises(ValueError, match="query_buffers must be at least 2"):
        GatherConfig(query_buffers=1)
