"""The explorer in a real browser. Needs Chromium, chromedriver and the package selenium; skipped without them."""

import base64
import io
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytest.importorskip("selenium")

import matplotlib
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from freqfusion.analysis.explorer import Scene, build_explorer, cosine_map
from freqfusion.analysis.measure import FeatureStudy, Observation
from freqfusion.analysis.page import write_study
from freqfusion.drawing.page_parts import Html, Report, Section, write_report

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

CLASSES = ["sky", 'wall <b>"&', "tree"]
SIZE = (48, 64)
LEVELS = ("top", "fine")
VARIANTS = ("before", "after")
SAME, OTHER, POINTED = "explorer-same", "explorer-other", "explorer-pointed"


def make_scene(name, seed):
    random = np.random.default_rng(seed)
    labels = np.zeros(SIZE, np.int64)
    labels[20:, 10:40] = 1
    labels[30:, 30:] = 2
    labels[:4] = 255
    prediction = np.where(labels == 255, 0, labels)
    prediction[10:24, 5:20] = 2
    image = random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)
    maps = {
        level: {variant: random.normal(size=(48 // step, 64 // step, 80)) + 0.4 for variant in VARIANTS}
        for level, step in zip(LEVELS, (8, 4), strict=True)
    }
    return Scene(name, maps, labels, image, {"": prediction})


@pytest.fixture(scope="module")
def scenes():
    return [make_scene("first", 1), make_scene("second <i>", 2)]


@pytest.fixture(scope="module")
def explorer(scenes):
    return build_explorer(scenes, CLASSES, [(70, 130, 180), (180, 120, 60), (20, 140, 20)], VARIANTS)


@pytest.fixture(scope="module")
def driver():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(driver, explorer, tmp_path):
    write_report(tmp_path / "report.html", Report("t", "h", "l", [Section("x", [Html(explorer.html)])]))
    driver.get((tmp_path / "report.html").as_uri())
    yield Page(driver)
    assert driver.get_log("browser") == []  # no error or warning, whatever a test did


class Page:
    def __init__(self, driver):
        self.driver = driver
        self.panels = self.find("explorer-panels")
        self.driver.execute_script("arguments[0].scrollIntoView()", self.panels)

    def find(self, name):
        return self.driver.find_element(By.ID, name)

    def values(self, name):
        texts = [self.find(f"{name}-{side}") for side in (0, 1)]
        for element in texts:
            value = element.get_attribute("data-value")
            assert element.text == (f"{float(value):.3f}" if value else "-")
        return [float(element.get_attribute("data-value") or "nan") for element in texts]

    def picture(self, index):
        return self.driver.execute_script(
            "return arguments[0].toDataURL()", self.find(f"explorer-canvas-{index}")
        )

    def pictures(self):
        return [self.picture(index) for index in range(3)]

    def go(self, canvas, x, y, click=False):
        """Move the mouse to a share of the canvas."""
        element = self.find(f"explorer-canvas-{canvas}")
        # offsets count from the middle of the part that can be seen
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        size = element.size
        offset = round((x - 0.5) * size["width"]), round((y - 0.5) * size["height"])
        actions = ActionChains(self.driver).move_to_element_with_offset(element, *offset)
        (actions.click() if click else actions).perform()

    def press(self, *keys, shift=False):
        actions = ActionChains(self.driver)
        if shift:
            actions.key_down(Keys.SHIFT)
        actions.send_keys(*keys)
        if shift:
            actions.key_up(Keys.SHIFT)
        actions.perform()

    def read(self):
        return self.find("explorer-readout").text


def expected(explorer, scene, level, probe):
    """The maps of both variants for a cell of ``level``."""
    return [cosine_map(explorer.packed[scene, level, variant], *probe) for variant in VARIANTS]


def class_means(scene, values, label):
    middles = [(2 * np.arange(n) + 1) * side // (2 * n) for n, side in zip(values.shape, SIZE, strict=True)]
    cells = scene.labels[np.ix_(*middles)]
    return values[cells == label].mean(), values[(cells != label) & (cells != 255)].mean()


def test_click_shows_the_similarities_that_python_computes(page, explorer, scenes):
    before = page.pictures()
    page.go(1, 0.55, 0.80, click=True)  # cell (9, 8) of 12 x 16: wall
    assert all(old != new for old, new in zip(before, page.pictures(), strict=True))
    assert "Chosen pixel: column 35, row 38; label tree; predicted tree." in page.read()
    page.go(2, 0.10, 0.30)
    WebDriverWait(page.driver, 5).until(lambda _: "Pointed" in page.read())
    assert "Pointed pixel: column 6, row 14; label sky; predicted tree." in page.read()
    maps = expected(explorer, "first", "fine", (9, 8))
    assert page.values(POINTED) == pytest.approx([values[3, 1] for values in maps], abs=1e-12)
    for side, values in enumerate(maps):
        same, other = class_means(scenes[0], values, label=2)
        assert page.values(SAME)[side] == pytest.approx(same, abs=1e-12)
        assert page.values(OTHER)[side] == pytest.approx(other, abs=1e-12)
    lowest = min(values.min() for values in maps)
    assert float(page.find("explorer-low").text) == np.floor(10 * lowest) / 10


def test_colours_are_those_of_the_similarities(page, explorer):
    page.go(1, 0.55, 0.80, click=True)
    values = expected(explorer, "first", "fine", (9, 8))
    low = float(page.find("explorer-low").text)
    for side, canvas in ((0, 1), (1, 2)):
        png = base64.b64decode(page.picture(canvas).partition(",")[2])
        shown = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
        shades = np.clip(np.round(255 * (values[side] - low) / (1 - low)), 0, 255).astype(int)
        colours = matplotlib.colormaps["viridis"](shades, bytes=True)[..., :3]
        for row, column in ((0, 0), (3, 1), (11, 15), (2, 9)):
            place = int((row + 0.5) / 12 * shown.shape[0]), int((column + 0.5) / 16 * shown.shape[1])
            np.testing.assert_allclose(shown[place], colours[row, column], atol=1)


def test_keys_move_the_pixels_and_choose(page, explorer):
    assert "Chosen pixel: column 34, row 26" in page.read()  # the middle of cell (6, 8)
    page.go(0, 0.53, 0.54, click=True)
    page.press(Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP)
    assert "Chosen pixel: column 26, row 22; label wall" in page.read()
    page.press(Keys.ARROW_DOWN, shift=True)
    assert page.find("explorer-pointed-0").text != "-"
    page.press("1")
    assert page.driver.execute_script("return document.querySelectorAll('#explorer-levels input')[0].checked")
    assert "Level 1, top: before 6 x 8 pixels, 64 principal axes" in page.find("explorer-note").text
    kept = [explorer.packed["first", "top", variant].kept for variant in VARIANTS]
    for share in kept:
        assert f"keep {100 * share:.1f} %" in page.find("explorer-note").text
    for key, name in (("l", "labels"), ("p", "prediction"), ("i", "picture")):
        pictures = page.pictures()
        page.press(key)
        assert page.find(f"explorer-{name}").is_selected()
        assert page.picture(1) != pictures[1]
        page.press(key)
        assert page.pictures() == pictures
    page.press("]")
    assert Select(page.find("explorer-scene")).first_selected_option.text == "second <i>"
    page.press("]")
    assert Select(page.find("explorer-scene")).first_selected_option.text == "first"
    for _ in range(20):
        page.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    assert "Chosen pixel: column 60, row 44" in page.read()  # stays inside


def test_tab_reaches_the_maps_and_their_name_is_told(page):
    focused = None
    for _ in range(12):
        page.press(Keys.TAB)
        focused = page.driver.switch_to.active_element.get_attribute("id")
        if focused == "explorer-panels":
            break
    assert focused == "explorer-panels"
    assert "Arrow keys" in page.panels.get_attribute("aria-label")
    assert page.find("explorer-readout").get_attribute("aria-live") == "polite"
    assert page.find("explorer-canvas-2").get_attribute("aria-label") == "similarity map, after"


def test_ignored_pixel_has_no_class_means(page):
    page.go(0, 0.5, 0.02, click=True)
    assert "label ignored" in page.read()
    assert page.find("explorer-same-0").text == "-"
    assert page.find("explorer-other-1").text == "-"


def test_whole_report_loads(driver, tmp_path):
    one = make_scene("first", 1)
    maps = {
        "fine": {name: torch.from_numpy(x).permute(2, 0, 1).float() for name, x in one.maps["fine"].items()}
    }
    image = torch.from_numpy(one.image).permute(2, 0, 1)
    study = FeatureStudy(CLASSES, [(70, 130, 180), (180, 120, 60), (20, 140, 20)])
    labels = torch.from_numpy(one.labels)
    study.add(Observation("first", maps, labels, image, {"": labels % 255}), show=True)
    write_study(study, tmp_path, "a test")
    driver.get((tmp_path / "report.html").as_uri())
    page = Page(driver)
    page.go(0, 0.3, 0.7, click=True)
    assert "Chosen pixel: column 19, row 33; label wall" in page.read()
    widths = driver.execute_script("return [...document.images].map((image) => image.naturalWidth)")
    assert len(widths) == 6
    assert all(width > 300 for width in widths)
    assert driver.get_log("browser") == []


@pytest.mark.parametrize("width", [360, 1280])
def test_fits_a_phone(page, width):
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 2, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        assert page.driver.execute_script("return document.documentElement.scrollWidth") <= width
        left, right = (page.find(f"explorer-canvas-{index}").rect for index in (1, 2))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]
        assert right["width"] > 150
        page.go(2, 0.1, 0.9, click=True)
        assert "Chosen pixel: column 6, row 43" in page.read()
    finally:
        page.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_page_is_dark(page):
    grounds = []
    for scheme in ("dark", "light"):
        page.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        )
        grounds.append(page.driver.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(20, 21, 25)", "rgb(255, 255, 255)"]
