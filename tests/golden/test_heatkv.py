"""HeatKV's schedule from its published orders: how many pairs go when, and which."""

import numpy as np
import pytest

from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.policies import head_orders
from sparvar_jax.policies.head_orders import HeadOrders
from sparvar_jax.policies.per_head import with_orders
from tests.golden.support import golden_stems, load_golden, load_sidecar

STEMS = golden_stems("policy_heatkv*")
CASES = [(stem, case) for stem in STEMS for case in load_sidecar(stem)["cases"]]
SQUARE = infinity_schedule()


def orders_of(stem, case):
    """The stored order with as many pairs as a case has layers and heads."""
    sidecar, tensors = load_golden(stem)
    about = sidecar["cases"][case]
    layers, heads = about["layers"], about["heads"]
    stored = next(
        value for key, value in tensors.items()
        if key.startswith("orders.") and value.shape[1] == layers * heads
    )  # fmt: skip
    flat = tuple(tuple(int(layer) * heads + int(head) for head, layer in row) for row in stored)
    return about, tensors, HeadOrders(layers, heads, about["sink_scales"], flat)


@pytest.mark.parametrize(("stem", "case"), CASES)
def test_counts_of_the_simple_rule(stem, case):
    about, tensors, orders = orders_of(stem, case)
    ours = [
        head_orders.removed_count(orders, SQUARE, about["budget"], scale)
        for scale in range(len(SQUARE))
    ]
    np.testing.assert_array_equal(ours, tensors[f"count.{case}"])


@pytest.mark.parametrize(("stem", "case"), CASES)
def test_the_strict_schedule_removes_the_same_and_some_earlier(stem, case):
    about, tensors, orders = orders_of(stem, case)
    earlier = about["entries_where_the_strict_schedule_removes_earlier_than_the_simple_rule"]
    for scale, more in enumerate(earlier):
        ours = head_orders.hidden(orders, SQUARE, about["budget"], scale)
        strict = tensors[f"removed.{case}"][scale].astype(bool)
        assert not (ours & ~strict)[: max(scale - orders.sinks, 0)].any()
        assert int((strict & ~ours)[: max(scale - orders.sinks, 0)].sum()) == more, scale


@pytest.mark.parametrize(("stem", "case"), CASES)
def test_heads_see_what_the_budget_leaves(stem, case):
    """The plan against counting: the first pairs of every stored order are blind, no others."""
    about, tensors, orders = orders_of(stem, case)
    plan = with_orders(dense_plan(SQUARE, orders.layers), orders, about["budget"])
    peak, pairs = SQUARE.scales[-1].offset, orders.layers * orders.heads
    for scale, count in enumerate(tensors[f"count.{case}"]):
        rows = 0
        sights = [plan.steps[scale].segment(n).attention.sight for n in range(orders.layers)]
        for source in range(scale):
            number = source - orders.sinks
            blind = set() if number < 0 else set(orders.orders[number][:count])
            seen = {
                layer * orders.heads + head
                for layer, heads in enumerate(sights)
                for head, own in enumerate(heads)
                if source in own
            }
            assert seen == set(range(pairs)) - blind
            rows += len(seen) * SQUARE.scales[source].tokens
        assert rows <= max(about["budget"] * peak, 0) * pairs or not count


@pytest.mark.parametrize("stem", STEMS)
def test_shipped_orders_are_the_stored_ones(stem):
    stored = {
        k.removeprefix("orders."): v for k, v in load_golden(stem)[1].items() if "orders" in k
    }
    for name in head_orders.names():
        if name in stored:
            ours = head_orders.read_orders(name)
            pairs = [[divmod(pair, ours.heads)[::-1] for pair in order] for order in ours.orders]
            np.testing.assert_array_equal(pairs, stored[name])
