"""The report in a real browser: what it loads, how it fits, and how the keyboard moves in it."""

import functools
import http.server
import itertools
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from kdad_dist.report.page import write_report
from kdad_dist.sweep.page import write_page
from kdad_dist.sweep.plan import plan_variants
from tests.helpers_run import make_run, write_explained
from tests.needs import require_or_skip
from tests.sweeps import finish

pytestmark = pytest.mark.browser
ATTACK = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
LONG = "a_very_long_name_without_any_place_to_break_" * 4
QUIET = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--disable-quic", "--hide-scrollbars"),
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        require_or_skip("browser", "chromium and chromedriver are not both installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in QUIET:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=Service(driver)) as chrome:
        yield chrome


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of an ordinary report of two categories."""
    run = make_run(tmp_path_factory.mktemp("run"), categories=("tile", "nut"))
    return write_report(run).as_uri()


@pytest.fixture(scope="module")
def rebuilt_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report whose method reconstructs the images."""
    run = tmp_path_factory.mktemp("rebuilt")
    return write_report(make_run(run, reconstructs=True)).as_uri()


@pytest.fixture(scope="module")
def explained_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report that shows what classifiers look at."""
    run = make_run(tmp_path_factory.mktemp("explained"))
    write_explained(run, ("cat", LONG))
    return write_report(run).as_uri()


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a report whose every name is markup, and far too long."""
    run = tmp_path_factory.mktemp("hostile")
    make_run(run, categories=(ATTACK, LONG), defect_types=(ATTACK, LONG), name=ATTACK + LONG)
    return write_report(run).as_uri()


@pytest.fixture(scope="module")
def sweep_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of a sweep's page, with one chart of figures and two of losses."""
    out = tmp_path_factory.mktemp("sweep") / "ways"
    sweep = plan_variants("classkd_cifar10", [f"output={out}"], "classkd_cifar10", 1)
    for job in sweep.jobs:
        finish(job, accuracy=0.9)
        lines = [{"step": 1, "loss": 2, "cross_entropy": 2}, {"step": 1, "val_loss": 2}]
        (job.run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    write_page(sweep)
    return (out / "report.html").as_uri()


def sized(browser: webdriver.Chrome, width: int, height: int = 844) -> None:
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def events(browser: webdriver.Chrome, method: str) -> list[dict[str, Any]]:
    entries = (json.loads(e["message"])["message"] for e in browser.get_log("performance"))
    return [entry["params"] for entry in entries if entry["method"] == method]


def open_everything(browser: webdriver.Chrome) -> None:
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")


def test_it_loads_nothing_and_complains_of_nothing(browser: webdriver.Chrome, page: str) -> None:
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page)
    requested = [event["request"]["url"] for event in events(browser, "Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:")] == [page]
    assert browser.get_log("browser") == []


def test_over_http_nothing_but_the_page_is_asked_for(
    browser: webdriver.Chrome, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    write_report(make_run(tmp_path))
    handler = functools.partial(Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        browser.get(f"http://127.0.0.1:{server.server_address[1]}/report.html")
        server.shutdown()
    assert asked == ["/report.html"]


def test_every_picture_is_shown(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    open_everything(browser)
    widths = browser.execute_script("return [...document.images].map(i => i.naturalWidth)")
    assert len(widths) > 30
    assert min(widths) > 0


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
@pytest.mark.parametrize(
    "kind", ["page", "rebuilt_page", "explained_page", "hostile_page", "sweep_page"]
)
def test_no_width_makes_the_page_scroll_sideways(
    browser: webdriver.Chrome, request: pytest.FixtureRequest, kind: str, width: int
) -> None:
    sized(browser, width)
    browser.get(request.getfixturevalue(kind))
    open_everything(browser)
    script = "const d = document.documentElement; return [d.scrollWidth, innerWidth]"
    assert browser.execute_script(script) == [width, width]


def test_text_in_charts_is_readable_on_a_phone(browser: webdriver.Chrome, page: str) -> None:
    sized(browser, 390)
    browser.get(page)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('details[open] svg text, #training svg text')]"
        ".map(t => parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a)"
    )
    assert min(heights) >= 10


@pytest.mark.parametrize(("width", "least"), [(320, 85), (390, 100), (768, 150), (1280, 240)])
def test_reconstructions_can_be_seen_beside_their_images(
    browser: webdriver.Chrome, rebuilt_page: str, width: int, least: int
) -> None:
    sized(browser, width)
    browser.get(rebuilt_page)
    sides = browser.execute_script(
        "return [...document.querySelectorAll('.panels.of4')].map(p => {"
        " const [a, b] = [...p.querySelectorAll('img')].map(i => i.getBoundingClientRect());"
        " return [a.width, b.width, b.top - a.top, b.left > a.right]})"
    )
    assert len(sides) > 5
    for image, reconstruction, lower, right in sides:
        assert image == reconstruction > least
        assert abs(lower) < 1 and right


def test_labels_of_charts_stay_inside_them(browser: webdriver.Chrome, page: str) -> None:
    for width in (390, 1280):
        sized(browser, width)
        browser.get(page)
        open_everything(browser)
        outside = browser.execute_script(
            "return [...document.querySelectorAll('svg text')].filter(t => {"
            " const a = t.getBoundingClientRect(),"
            " b = t.closest('figure').getBoundingClientRect();"
            " return a.left < b.left || a.right > b.right || a.bottom > b.bottom})"
            ".map(t => t.textContent)"
        )
        assert outside == []


def test_charts_of_a_sweep_leave_no_hole(browser: webdriver.Chrome, sweep_page: str) -> None:
    sized(browser, 1280)
    browser.get(sweep_page)
    ends = browser.execute_script(
        "return [...document.querySelectorAll('.even')].map(grid => [grid.children.length,"
        " grid.lastElementChild.getBoundingClientRect().right, grid.getBoundingClientRect().right])"
    )
    assert [charts for charts, *_ in ends] == [1, 2]
    assert all(abs(last - whole) < 1 for _, last, whole in ends)


def test_headings_descend_one_level_at_a_time(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    script = "return [...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])"
    levels = browser.execute_script(script)
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(deeper <= level + 1 for level, deeper in itertools.pairwise(levels))


def test_it_has_one_of_each_landmark(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    for tag in ("header", "nav", "main", "footer"):
        assert len(browser.find_elements("css selector", f"body > {tag}")) == 1
    assert browser.find_element("tag name", "html").get_attribute("lang") == "en"


def press(browser: webdriver.Chrome, *keys: str) -> None:
    actions = ActionChains(browser)
    for key in keys:
        actions.send_keys(key)
    actions.perform()


def test_the_keyboard_reaches_everything_that_can_be_used(
    browser: webdriver.Chrome, page: str
) -> None:
    sized(browser, 1280)
    browser.get(page)
    reached = []
    for _ in range(60):
        press(browser, Keys.TAB)
        focused = browser.switch_to.active_element
        reached.append((focused.tag_name, focused.text.partition("\n")[0]))
        outline = focused.value_of_css_property("outline-style")
        assert focused.tag_name == "body" or outline != "none", reached[-1]
        if reached[-1] == ("summary", "Environment"):
            break
    assert reached[0] == ("a", "Skip to the results")
    assert ("div", "Test images, per category and defect type. 1 is perfect; an AUROC of 0.5 is "
            "chance.") in reached  # fmt: skip
    assert [text for tag, text in reached if tag == "summary"] == [
        *("tile", "nut", "Configuration", "Environment")
    ]


def test_the_skip_link_leads_to_the_results(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    press(browser, Keys.TAB)
    assert browser.switch_to.active_element.rect["x"] >= 0
    press(browser, Keys.ENTER)
    assert browser.switch_to.active_element.tag_name == "main"


def test_enter_opens_a_closed_category(browser: webdriver.Chrome, page: str) -> None:
    browser.get(page)
    closed = browser.find_elements("css selector", "details:not([open])")[0]
    assert not closed.find_element("css selector", "svg").is_displayed()
    browser.execute_script("arguments[0].querySelector('summary').focus()", closed)
    press(browser, Keys.ENTER)
    assert closed.find_element("css selector", "svg").is_displayed()


def test_markup_in_names_is_shown_and_does_nothing(
    browser: webdriver.Chrome, hostile_page: str
) -> None:
    browser.get_log("browser")
    browser.get(hostile_page)
    open_everything(browser)
    assert browser.title == f"{ATTACK}{LONG}: report"
    assert browser.find_elements("tag name", "script") == []
    assert ATTACK in browser.find_element("tag name", "h1").text
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_follows_the_colour_scheme(browser: webdriver.Chrome, page: str, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(page)
    colour = browser.find_element("tag name", "body").value_of_css_property("background-color")
    red = int(colour.partition("(")[2].split(",")[0])
    assert (red > 200) == (scheme == "light")


def test_it_works_without_javascript(browser: webdriver.Chrome, page: str) -> None:
    sized(browser, 1280)
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get(page)
        press(browser, *([Keys.TAB] * 2), Keys.ENTER)
        shot = browser.execute_cdp_cmd("Page.captureScreenshot", {})
        tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert browser.current_url == f"{page}#results"
    assert len(shot["data"]) > 10_000
    names = [node.get("name", {}).get("value") for node in tree["nodes"]]
    assert {"Results", "Image AUROC", "ROC curves", "Lowest-scoring defective images"} <= set(names)
