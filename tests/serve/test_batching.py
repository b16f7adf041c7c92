"""Who is drawn with whom, when, and what happens to those who leave."""

import threading
import time

import numpy as np
import pytest

from sparvar_jax.serve.batching import Batcher, Ticket
from sparvar_jax.serve.errors import Refused
from sparvar_jax.serve.menu import Menu, preview_steps
from sparvar_jax.serve.metrics import Metrics
from sparvar_jax.serve.schema import ImageRequest
from sparvar_jax.serve.settings import Settings
from tests.serve.toy import BROKEN, SCALES, ToyPipe

PLANS = ("skip_last_scales(4)", "skip_last_scales(5)")
LONG = "a red apple left of a green triangle wearing a blue owl on the red photograph of a circle"


class House:
    """A batcher over a gated toy, and what it told."""

    def __init__(self, folder, **settings):
        self.pipe = ToyPipe(folder, gated=True)
        self.settings = Settings(plans=PLANS, **({"batches": (1, 2, 4)} | settings))
        self.menu = Menu(self.pipe, self.settings)
        self.batcher = Batcher(self.pipe, self.settings, Metrics())
        self.told = {}

    def tickets(self, *seeds, prompt="an apple", previews=(), **fields):
        bucket = self.menu.order(ImageRequest(prompt=prompt, **fields)).bucket
        return [self._ticket(bucket, prompt, seed, previews) for seed in seeds]

    def _ticket(self, bucket, prompt, seed, previews):
        told = self.told.setdefault(seed, [])
        return Ticket(bucket, prompt, None, seed, previews, told.append)

    def submit(self, *seeds, **options):
        tickets = self.tickets(*seeds, **options)
        self.batcher.submit(tickets)
        return tickets

    def draw(self, batches=1):
        """Let so many batches pass."""
        self.pipe.gate.release(SCALES * batches)

    def greys(self, seed):
        return [int(event.pixels[0, 0, 0]) for event in self.told[seed]]


@pytest.fixture
def house(tiny):
    made = []

    def make(**settings):
        made.append(House(tiny, **settings))
        made[-1].batcher.start()
        return made[-1]

    yield make
    for one in made:
        one.draw(100)
        one.batcher.close()


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_free_device_takes_all_of_a_kind_and_fills_up(house):
    home = house()
    home.submit(1, 2, 3)
    until(lambda: home.pipe.batches)
    home.draw()
    until(lambda: home.told[3])
    # Three are drawn as four, the last one twice, and told once each.
    assert home.pipe.batches == [[1, 2, 3, 3]]
    assert [home.greys(seed) for seed in (1, 2, 3)] == [[1], [2], [3]]


def test_two_batches_take_turns(house):
    """One is drawn, seven wait: half of the eight go next, and a lone ninth waits for company."""
    home = house()
    home.submit(0)
    until(lambda: home.pipe.batches == [[0]])
    home.submit(*range(1, 8))
    home.draw()
    until(lambda: len(home.pipe.batches) == 2)
    assert home.pipe.batches[1] == [1, 2, 3, 4]
    until(lambda: home.batcher.drawing == 4)
    home.draw()
    # The other three are fewer than the four on the device: they wait until it is free.
    until(lambda: len(home.pipe.batches) == 3)
    assert home.pipe.batches[2] == [5, 6, 7, 7]
    home.draw()
    until(lambda: home.told[7])


def test_only_pictures_of_one_bucket_share_a_batch(house):
    home = house()
    home.submit(0)
    until(lambda: home.pipe.batches)
    home.submit(1)
    home.submit(2, plan=PLANS[1])
    home.submit(3, guidance_scale=4.0)
    home.submit(4, prompt=f"{LONG} and {LONG}")
    home.submit(5)
    home.draw(5)
    until(lambda: all(home.told[seed] for seed in range(6)))
    assert sorted(home.pipe.batches[1:]) == [[1, 5], [2], [3], [4]]
    assert home.pipe.batches[1] == [1, 5]  # the oldest first


def test_previews_come_before_the_picture(house):
    home = house()
    home.submit(9, previews=(0, 1))
    home.submit(8)
    home.draw(2)
    until(lambda: home.told[8] and len(home.told[9]) == 3)
    assert home.greys(9) == [7, 8, 9]
    assert [event.preview for event in home.told[9]] == [0, 1, None]
    assert home.greys(8) == [8]


def test_work_that_nobody_wants_stops_between_scales(house):
    home = house()
    tickets = home.submit(1, 2)
    until(lambda: home.pipe.batches)
    home.batcher.drop(tickets[:1])
    home.pipe.gate.release()
    until(lambda: home.pipe.asked == 2)  # whether anyone waits was looked at after the first
    home.batcher.drop(tickets[1:])
    home.pipe.gate.release()
    until(lambda: home.batcher.drawing == 0)
    assert home.pipe.scales == 2 < SCALES
    assert home.told == {1: [], 2: []}
    home.submit(3)
    home.draw()
    until(lambda: home.told[3])


def test_the_queue_is_bounded_and_places_are_freed(house):
    home = house(waiting=3, most_pictures=2)
    home.submit(0)
    until(lambda: home.batcher.drawing == 1)
    waiting = home.submit(1, plan=PLANS[1])
    home.submit(2, 3, guidance_scale=4.0)
    with pytest.raises(Refused, match="3 pictures wait") as refusal:
        home.submit(4)
    assert refusal.value.status == 429
    home.batcher.drop(waiting)
    home.submit(4)
    home.draw(3)
    until(lambda: home.told[2] and home.told[4])
    assert not home.told[1]


def test_a_failure_is_told_and_the_next_batch_is_drawn(house):
    home = house()
    home.submit(1, prompt=BROKEN)
    home.submit(2)
    home.draw()
    until(lambda: home.told[1] and home.told[2])
    error = home.told[1][0].error
    assert (error.status, str(error)) == (500, "the picture could not be drawn")
    assert home.batcher.drawing == 0


def test_closing_draws_what_waits_and_takes_no_more(house):
    home = house(batches=(1,))
    home.submit(1, 2, 3)
    closing = threading.Thread(target=home.batcher.close)
    closing.start()
    home.draw(3)
    closing.join(20)
    assert [home.greys(seed) for seed in (1, 2, 3)] == [[1], [2], [3]]
    with pytest.raises(Refused, match="shutting down"):
        home.submit(4)


def test_other_work_waits_for_a_free_device_and_then_goes_first(house):
    home = house(batches=(1,))
    home.submit(1)
    until(lambda: home.pipe.batches)
    order = []
    done = home.batcher.alone(lambda: order.append(len(home.pipe.batches)) or "found")
    home.submit(2)
    with pytest.raises(Refused, match="busy"):
        home.batcher.alone(lambda: None)
    home.draw(2)
    assert done.result(20) == "found"
    until(lambda: home.told[2])
    assert order == [1]


def test_flagged_pictures_are_held_back(house):
    home = house(flagged=lambda pictures: pictures[:, 0, 0, 0] > 100)
    home.submit(99, 200, previews=(0,))
    home.draw()
    until(lambda: len(home.told[99]) == 2 and home.told[200])
    assert home.greys(99) == [97, 99]
    (event,) = home.told[200]
    assert event.held_back
    assert event.pixels is None


def test_previews_are_spread_over_the_scales():
    assert preview_steps(13, 3) == (2, 5, 8)
    assert preview_steps(13, 0) == ()
    assert preview_steps(3, 3) == (0, 1)
    assert preview_steps(1, 3) == ()


def test_all_that_is_taken_is_compiled_before(tiny):
    """Every order's bucket is one of those compiled, whatever numbers it names."""
    pipe = ToyPipe(tiny)
    settings = Settings(plans=PLANS, sizes=("32x32", "64x64"), unguided=True)
    menu = Menu(pipe, settings)
    known = {(b.plan, b.shape, b.prompt, b.negative, b.guidance == 1) for b in menu.buckets()}
    for fields in (
        {},
        {"plan": PLANS[1], "size": "64x64", "guidance_scale": 7.5},
        {"guidance_scale": 1},
        {"negative_prompt": " ".join([LONG] * 6), "prompt": f"{LONG} and {LONG}"},
    ):
        bucket = menu.order(ImageRequest(**({"prompt": "an owl"} | fields))).bucket
        asked = (bucket.plan, bucket.shape, bucket.prompt, bucket.negative, bucket.guidance == 1)
        assert asked in known
    assert np.prod([2, 2, 4, 1 + 4]) + 2 * 2 * 4 == len(list(menu.buckets()))
    for wrong, said in (
        ({"sizes": ("33x32",)}, "cannot draw 33x32, but 32x32"),
        ({"sizes": ("big",)}, "WIDTHxHEIGHT"),
        ({"plans": ("none",)}, "unknown policy"),
    ):
        with pytest.raises(ValueError, match=said):
            Menu(pipe, Settings(**wrong))
