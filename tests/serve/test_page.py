"""The page in a real browser: what it shows, how it refuses, and that it fits a phone.

Screenshots are left in SPARVAR_ARTEFACTS, or in the test's folder.
"""

import io
import os
import shutil
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.serve.process import PLAN, Server

pytestmark = pytest.mark.slow
OTHER = "skip_last_scales(5)"
MEASURED = "skip_last_scales(2)"  # the last plan is the usual one there; scale 4 is measured
PROMPT = "a green owl"
SECONDS = 120
PHONE = (390, 844)


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="the page is driven by selenium")
    driver = shutil.which("chromedriver")
    if driver is None:
        pytest.skip("no chromedriver: install Debian's chromium-driver")
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture(scope="module")
def web(tiny, tmp_path_factory):
    pytest.importorskip("gradio", reason="the page needs sparvar-jax[page]")
    cache = tmp_path_factory.getbasetemp() / "serve-cache"
    plans = [part for plan in (PLAN, OTHER, MEASURED) for part in ("--plan", plan)]
    options = ("--no-open", "--prompt-tokens", "32", *plans)
    server = Server(tiny, cache, *options, command="web")
    yield server.start()
    if server.alive:
        server.stop()


@pytest.fixture
def page(browser, web):
    """The page, as wide as a desk."""
    browser.set_window_size(1000, 1100)
    browser.get(web.address)
    until(lambda: button(browser, "Draw"))
    return browser


def until(condition):
    deadline = time.monotonic() + SECONDS
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def button(browser, text):
    """The visible main button of that name."""
    buttons = browser.find_elements("css selector", "button.primary")
    return next((one for one in buttons if one.is_displayed() and one.text == text), None)


def field(browser, label):
    """The visible input field of that label."""
    for block in browser.find_elements("css selector", "label"):
        if block.is_displayed() and block.text.startswith(label):
            return block.find_element("css selector", "textarea, input")
    raise AssertionError(f"no field {label}")


def write(browser, label, text):
    place = field(browser, label)
    place.clear()
    place.send_keys(text)


def choose(browser, label, value):
    lists = browser.find_elements("css selector", f"input[aria-label='{label}']")
    next(one for one in lists if one.is_displayed()).click()
    options = until(lambda: browser.find_elements("css selector", "[role=option]"))
    next(one for one in options if one.text.strip().endswith(value)).click()


def open_tab(browser, name):
    tabs = browser.find_elements("css selector", "button[role=tab]")
    next(tab for tab in tabs if tab.text == name).click()


def shown(browser):
    """Addresses of the pictures that are seen."""
    images = browser.find_elements("css selector", "img")
    return [image.get_attribute("src") for image in images if image.is_displayed()]


def fetched(address):
    with Image.open(io.BytesIO(httpx.get(address).content)) as picture:
        return np.asarray(picture.convert("RGB"))


def says(browser, text):
    return text in browser.find_element("css selector", "body").text


def keep(browser, name, folder):
    browser.save_screenshot(str(Path(os.environ.get("SPARVAR_ARTEFACTS", folder)) / name))


def test_draw_with_previews_and_with_another_plan(page, pipe, tmp_path):
    write(page, "Prompt", PROMPT)
    write(page, "Seed", "7")
    for plan in (PLAN, OTHER):
        choose(page, "Plan", plan)
        page.execute_script(
            "window.seen = new Set(); new MutationObserver(() => document.querySelectorAll('img')"
            ".forEach(i => window.seen.add(i.src))).observe(document, {subtree: true, "
            "childList: true, attributes: true})"
        )
        button(page, "Draw").click()
        expected = pipe(PROMPT, plan=plan, seed=7)[0]

        def last(expected=expected):
            found = shown(page)
            return found and np.array_equal(fetched(found[0]), expected)

        until(last)
        until(lambda: says(page, "Drawn in"))
        if plan == PLAN:  # three scales: the first two were seen on the way
            assert page.execute_script("return window.seen.size") >= 2
    keep(page, "draw.png", tmp_path)


def test_compare_two_plans(page, pipe, tmp_path):
    open_tab(page, "Compare plans")
    until(lambda: button(page, "Compare"))
    write(page, "Prompt", PROMPT)
    button(page, "Compare").click()
    until(lambda: says(page, "on average"))
    until(lambda: len(shown(page)) == 3)
    one, other, apart = (fetched(address).astype(int) for address in shown(page))
    np.testing.assert_array_equal(one, pipe(PROMPT, plan=PLAN, seed=0)[0])
    np.testing.assert_array_equal(other, pipe(PROMPT, plan=OTHER, seed=0)[0])
    np.testing.assert_array_equal(apart, np.minimum(np.abs(one - other) * 4, 255))
    assert says(page, f"differ by {np.abs(one - other).mean():.2f} of 255")
    keep(page, "compare.png", tmp_path)


def test_bad_input_is_refused_in_words(page):
    for prompt, said in (("owl " * 40, "at most 32: shorten it"), (" ", "at least one word")):
        write(page, "Prompt", prompt)
        button(page, "Draw").click()
        until(lambda said=said: says(page, said))


def test_attention_is_shown(page, tmp_path):
    open_tab(page, "Attention")
    until(lambda: button(page, "Measure"))
    button(page, "Measure").click()
    until(lambda: says(page, "Density of"))
    until(lambda: shown(page))
    assert max(fetched(address).std() for address in shown(page)) > 1
    keep(page, "attention.png", tmp_path)


def test_it_fits_a_phone(page, tmp_path):
    page.set_window_size(*PHONE)
    until(lambda: page.execute_script("return innerWidth") <= 500)
    for tab in ("Draw", "Compare plans", "Attention"):
        open_tab(page, tab)
        wide = page.execute_script("return document.scrollingElement.scrollWidth - innerWidth")
        assert wide <= 0
    keep(page, "phone.png", tmp_path)


def test_sigterm_does_not_wait_for_open_pages(page, web):
    began = time.monotonic()
    assert web.stop() == 0
    assert time.monotonic() - began < 20
