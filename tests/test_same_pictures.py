"""Fixed seeds draw the pictures that they drew before the package was rearranged.

Bit for bit where an entry of this environment is stored, and up to rounding everywhere else.
"""

import itertools

import jax
import numpy as np
import pytest

from tests import same_pictures
from tests.same_pictures import PLANS

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="the stored pictures were drawn on a CPU"
)


@pytest.fixture(scope="module", params=PLANS)
def drawn(request):
    """What every plan of a family draws. Tests of one family run one after the other."""
    return {plan: same_pictures.draw(request.param, plan) for plan in PLANS[request.param]}


@pytest.fixture
def family(request):
    return request.node.callspec.params["drawn"]


def test_every_plan_draws_pictures_of_its_own(drawn):
    """Otherwise equal digests would say nothing of the plans."""
    for (one, (first, _)), (other, (second, _)) in itertools.combinations(drawn.items(), 2):
        differing = (first != second).mean((1, 2, 3))
        assert (differing > 0.1).all(), (one, other, differing)


def test_pictures_and_tokens_are_the_stored_ones_bit_for_bit(drawn, family):
    here = same_pictures.environment()
    stored = same_pictures.stored_digests().get(here, {})
    ours = {f"{family}/{plan}": same_pictures.digests(drawing) for plan, drawing in drawn.items()}
    if not stored.keys() & ours.keys():  # the demo model is trained anew now and then
        pytest.skip(f"nothing of {family} stored for {here}: see tests/same_pictures.py")
    assert ours == {name: stored[name] for name in ours}


def test_pictures_are_the_stored_ones_up_to_rounding(drawn, family):
    """One seed of a family at least draws the stored picture with every plan.

    Other processors and releases sum in other orders, which moves a value by about 1e-6 of the
    range: a byte by one step where it lies at the border of two, and then only one in some
    thousand. A token that falls the other way at a tie changes all that follows in its picture,
    with every plan where it lies in a scale that they share. A picture draws a few thousand bits,
    each as likely to fall so as its probability moves (1e-6): not two pictures at once.
    """
    stored = same_pictures.stored_pictures()
    same = np.array([True, True])
    for plan, (ours, _) in drawn.items():
        expected = stored[f"{family}/{plan}"]
        assert ours.shape == expected.shape
        apart = np.abs(ours.astype(int) - expected)
        same &= (apart <= 1).all((1, 2, 3)) & ((apart > 0).mean((1, 2, 3)) < 0.01)
    assert same.any()
