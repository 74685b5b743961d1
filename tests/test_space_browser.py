"""The Space as people meet it: a browser clicks through every tab, results appear, nothing is asked of another machine."""

import base64
import io
import json
import os
import shutil
import time
from urllib.parse import urlsplit

import pytest
from PIL import Image
from space_server import serving

REQUIRED = os.environ.get("DRIFTING_BROWSER") == "required"  # where a skip would hide a broken page
PATIENCE = 120  # seconds for a result, on a machine that is busy

pytest.importorskip("gradio")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::ResourceWarning")]  # of selenium's connections

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --disable-dev-shm-usage --window-size=1280,1000"
)


def found(*names: str) -> str:
    """The first of these programs that there is."""
    for name in names:
        if path := shutil.which(name):
            return path
    if REQUIRED:
        raise AssertionError(f"DRIFTING_BROWSER=required, and there is no {names[0]}: apt-get install chromium chromium-driver")
    pytest.skip(f"there is no {names[0]}: apt-get install chromium chromium-driver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not REQUIRED:
        pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = found("chromium", "chromium-browser", "google-chrome")
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(found("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("space"), "demo") as (where, _, _):
        yield where


def until(look, what: str):
    """What `look` returns as soon as it is something."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if got := look():
            return got
        time.sleep(0.05)  # between two looks; the deadline is above
    raise AssertionError(f"not seen within {PATIENCE} s: {what}")


def one(browser, selector: str):
    """The visible element of a selector, awaited."""
    return until(lambda: next((e for e in browser.find_elements("css selector", selector) if e.is_displayed()), None), selector)


def tab(browser, name: str) -> None:
    until(lambda: next((e for e in browser.find_elements("css selector", "button[role=tab]") if e.text == name), None), name).click()


def picture(browser, where: str, but: str = "") -> str:
    """The address of a picture that has arrived, another one than `but`."""

    def arrived():
        script = f"const i = document.querySelector('{where} img'); return i && i.complete && i.naturalWidth > 100 ? i.src : ''"
        source = browser.execute_script(script)
        return source if source != but else ""

    return until(arrived, f"picture in {where}")


def inked(browser, canvas: str) -> int:
    """How many pixels of a canvas are painted."""
    script = f"return document.querySelector('canvas[data-is=\"{canvas}\"]').toDataURL().split(',')[1]"
    with Image.open(io.BytesIO(base64.b64decode(browser.execute_script(script)))) as image:
        return sum(image.getchannel("A").histogram()[64:])


def step(browser) -> int:
    return int(browser.execute_script("return document.querySelector('[data-is=stage]').dataset.step ?? -1"))


@pytest.fixture
def opened(browser, address):
    """The page, newly loaded; while it is open, its console tells no error."""
    browser.get("about:blank")  # a page that is left while it listens complains: that is thrown away here
    browser.get_log("browser")
    browser.get(address)
    one(browser, "#drawn")
    yield browser
    assert [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_images_are_there_without_a_click_and_another_seed_gives_others(opened):
    first = picture(opened, "#drawn")
    assert "40 images in one network call" in one(opened, "#draw-time").text
    one(opened, ".next-seed").click()
    picture(opened, "#drawn", but=first)


def test_a_wrong_class_is_a_message(opened):
    picture(opened, "#drawn")
    field = one(opened, "#labels input")
    field.send_keys("sneeker\n")
    told = one(opened, ".toast-body")
    assert "no class is named 'sneeker'; did you mean 'Sneaker'?" in told.text
    assert "Traceback" not in opened.page_source


def test_walks_and_styles_appear_with_their_tabs(opened):
    tab(opened, "Interpolate")
    first = picture(opened, "#walked")
    one(opened, "input[type=radio][value='two noises']").click()
    picture(opened, "#walked", but=first)
    tab(opened, "Styles")
    picture(opened, "#styled")


def test_the_playground_moves_and_stops(opened):
    tab(opened, "Playground")
    until(lambda: step(opened) > 3, "particles that drift")
    assert inked(opened, "particles-target") > 300
    assert inked(opened, "particles") > 300
    assert inked(opened, "generated") > 300
    assert inked(opened, "curve") > 300
    one(opened, "#stop").click()
    until(lambda: (before := step(opened), time.sleep(1.0), step(opened) == before)[2], "a standstill")
    assert step(opened) < 240
    stopped = step(opened)
    one(opened, "#play").click()
    until(lambda: 0 <= step(opened) < stopped, "the first step again")


def test_a_drawing_is_a_target(opened):
    from selenium.webdriver.common.action_chains import ActionChains

    tab(opened, "Playground")
    until(lambda: step(opened) > 0, "the first play")
    one(opened, "#target input").click()
    until(
        lambda: next((e for e in opened.find_elements("css selector", "li[role=option]") if e.text.strip("✓ \n") == "my drawing"), None), ""
    ).click()
    canvas = one(opened, "#sketch canvas")
    line = ActionChains(opened).move_to_element(canvas).click_and_hold()
    for _ in range(8):
        line = line.move_by_offset(8, -8)
    line.release().perform()

    def drawn():
        script = "return [...document.querySelectorAll('.toast-body')].map(e => e.innerText).join()"
        assert "empty" not in opened.execute_script(script)
        return 3 < step(opened) < 230 and inked(opened, "particles-target") > 300

    until(drawn, "a play of the drawing")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", ["Draw", "Interpolate", "Styles", "Playground"])
def test_nothing_is_wider_than_the_screen(opened, name, width):
    tab(opened, name)  # a phone hides some of the tabs in a menu
    how = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", how)
    try:
        until(lambda: opened.execute_script("return innerWidth") == width, "the new width")
        until(lambda: opened.execute_script("return document.documentElement.scrollWidth") <= width, f"{name} within {width} pixels")
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_no_request_went_to_another_machine(browser):
    """Of all that was clicked above; pytest runs in order."""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    addresses = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert len(addresses) > 20
    spoken = [urlsplit(url) for url in addresses]  # data:, blob: and the browser's own chrome: are of this machine
    assert [url for url in spoken if url.scheme in ("http", "https", "ws", "wss") and url.hostname != "127.0.0.1"] == []
