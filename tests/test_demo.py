"""The demo page: its functions on tiny untrained networks, and the page in a real browser.

Needs gradio, which the extra ``dev`` does not bring, and for the browser Chromium, chromedriver and selenium.
"""

import html
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gradio")
pytest.importorskip("safetensors")

import gradio as gr
from PIL import Image

import freqfusion
import freqfusion.zoo
from freqfusion.drawing.figures import WRONG_COLOUR

APP = Path(__file__).parents[1] / "space" / "app.py"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
SIZE = (50, 70)
BACKBONE = "efficientnet_lite0"
OBJECTS = {"channels": 32, "head_channels": 32, "min_size": 50, "max_size": 90, "box_detections_per_img": 5}

pytestmark = pytest.mark.demo


def write_picture(path: Path, size: tuple[int, int] = SIZE) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def write_truth(path: Path, size: tuple[int, int] = SIZE) -> Path:
    """Two objects, numbered."""
    values = np.zeros(size, np.uint16)
    values[5:20, 10:30], values[30:45, 40:60] = 1, 2
    Image.fromarray(values).save(path)
    return path


def save(folder: Path, network: str, classes: list[str], fusion: str, **options: Any) -> None:
    torch.manual_seed(0)
    things = [name for name in classes if name != "background"]
    count = len(things) if "rcnn" in network else len(classes)
    model = freqfusion.create_model(network, count, fusion, **options)
    freqfusion.save_pretrained(model.half(), folder, classes=classes)
    write_picture(folder / "example.jpg")
    if "faster" not in network:
        write_truth(folder / "truth.png")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The module of the page with four networks: one with a plain partner, two of objects."""
    root = tmp_path_factory.mktemp("released")
    cells = ["background", "cell"]
    save(root / "pixels", "fpn_small", cells, "freqfusion")
    save(root / "pixels_bilinear", "fpn_small", cells, "bilinear")
    save(root / "masks", f"mask_rcnn_{BACKBONE}", ["cell"], "freqfusion", **OBJECTS)
    save(root / "boxes", f"faster_rcnn_{BACKBONE}", ["red", "white"], "freqfusion", **OBJECTS)
    released: Any = ModuleType("freqfusion.zoo.released")
    released.list_released = lambda: sorted(folder.name for folder in root.iterdir())
    released.released_folder = lambda name: root / name
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "freqfusion.zoo.released", released)
        patch.setattr(freqfusion.zoo, "released", released, raising=False)
        spec = importlib.util.spec_from_file_location("demo_app", APP)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "demo_app", module)
        spec.loader.exec_module(module)
        yield module


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of all Markdown tables by their first cell."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if "|" in line
    ]
    return {row[0]: row[1:] for row in rows}


def explorer_of(frame: str) -> dict[str, Any]:
    """What the page in a frame knows."""
    page = html.unescape(frame)
    return json.loads(re.findall(r'id="explorer-data">(.*?)</script>', page, re.DOTALL)[0])


def test_example_of_a_network_with_a_partner(app: Any) -> None:
    slider, errors, text, frame = app.show("pixels", None, None)
    plain, ours = slider["value"]
    assert slider["label"] == "bilinear | FreqFusion"
    assert plain.shape == ours.shape == (*SIZE, 3)
    rows = rows_of(text)
    assert rows["share of the pixels"] == ["bilinear", "FreqFusion"]
    assert errors["visible"]
    truth = torch.from_numpy(np.asarray(Image.open(app.released.released_folder("pixels") / "truth.png")) > 0)
    for place, name in enumerate(("pixels_bilinear", "pixels")):
        labels = app.run(name, app.read_image(app.released.released_folder(name) / "example.jpg")).labels
        wrong = (errors["value"][place] == WRONG_COLOUR).all(-1)
        np.testing.assert_array_equal(wrong, (labels != truth).numpy())
        union = [((labels == k) | (truth == k)).sum() for k in (0, 1)]
        both = [((labels == k) & (truth == k)).sum() for k in (0, 1)]
        mean = np.mean([float(b / u) for b, u in zip(both, union, strict=True)])
        assert rows["mIoU"][place] == f"{mean:.1%}"
        assert float(rows["cell"][place].strip("<%")) == pytest.approx(
            100 * float((labels == 1).float().mean()), abs=0.06
        )
    data = explorer_of(frame)
    assert data["variants"] == ["before", "after"]
    assert data["levels"] == [f"decode_head.fpn.fusions.{k}" for k in range(3)]


def test_masks_are_judged_as_foreground(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SURE", 0.0)
    slider, errors, text, _ = app.show("masks", None, None)
    assert slider["label"] == "the photograph | FreqFusion"
    image = app.read_image(app.released.released_folder("masks") / "example.jpg")
    np.testing.assert_array_equal(slider["value"][0], image.permute(1, 2, 0))
    assert len(errors["value"]) == 2
    rows = rows_of(text)
    assert 0 < int(rows["cell"][0]) <= 5
    assert set(rows) >= {"mIoU", "boundary IoU, 2 pixels"}


def test_boxes_have_no_errors(app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "SURE", 0.0)
    picture, truth = write_picture(tmp_path / "a.png"), write_truth(tmp_path / "b.png")
    _, errors, text, _ = app.show("boxes", str(picture), str(truth))
    assert not errors["visible"]
    assert "a mask does not judge" in text
    assert sum(int(row[0]) for name, row in rows_of(text).items() if name in ("red", "white")) > 0


def test_maps_of_a_detector_show_the_image_alone(app: Any) -> None:
    image = app.read_image(app.released.released_folder("boxes") / "example.jpg")
    result = app.run("boxes", image)  # 50 x 70 in a batch of 64 x 96
    sizes = [tuple(one.outputs[1].shape[-2:]) for one in result.maps.values()]
    assert sizes == [(3, 4), (6, 9), (12, 18)]


def test_large_pictures_shrink(app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "LONGEST", 64)
    picture = write_picture(tmp_path / "a.png", (60, 200))
    image, labels, note = app.read(str(picture), str(write_truth(tmp_path / "b.png", (60, 200))), 2)
    assert image.shape == (3, 19, 64)
    assert labels.shape == (19, 64)
    assert set(labels.unique().tolist()) == {0, 1}
    assert note.startswith("Scaled down from 200x60 to 64x19 pixels.")


def test_one_pixel(app: Any, tmp_path: Path) -> None:
    slider, _, _, _ = app.show("pixels", str(write_picture(tmp_path / "a.png", (1, 1))), None)
    assert slider["value"][0].shape == (1, 1, 3)


@pytest.mark.parametrize(
    "name, content, said",
    [
        (
            "broken<b>.jpg",
            b"\xff\xd8\xff\xe0 not a picture",
            "broken&lt;b&gt;.jpg: cannot be read as a picture",
        ),
        ("empty.png", b"", "empty.png: cannot be read"),
    ],
)
def test_broken_picture(app: Any, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(gr.Error) as raised:
        app.show("pixels", str(tmp_path / name), None)
    assert raised.value.message.startswith(said)
    assert str(tmp_path) not in raised.value.message
    assert not raised.value.print_exception


def test_unfitting_truth(app: Any, tmp_path: Path) -> None:
    picture, truth = write_picture(tmp_path / "a.png"), write_truth(tmp_path / "b.png", (40, 70))
    with pytest.raises(gr.Error, match=r"b\.png: has 70x40 pixels, the picture 70x50\."):
        app.show("pixels", str(picture), str(truth))
    Image.fromarray(np.full(SIZE, 7, np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"c\.png: must hold classes from 0 to 2, or 255"):
        app.read(str(picture), str(tmp_path / "c.png"), 3)


def test_huge_picture_is_refused_unread(app: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "MOST_PIXELS", 3000)
    with pytest.raises(gr.Error, match=r"a\.png: has more than"):
        app.show("pixels", str(write_picture(tmp_path / "a.png")), None)


def test_no_networks(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.released, "list_released", list)
    with pytest.raises(SystemExit, match="pip install freqfusion-weights"):
        app.page()


@pytest.fixture
def address(app: Any) -> Iterator[str]:
    blocks = app.page()
    _, local, _ = blocks.launch(prevent_thread_lock=True, quiet=True, css=app.CSS)
    yield local
    blocks.close()


@pytest.fixture
def driver() -> Iterator[Any]:
    if not (CHROMIUM and DRIVER):
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,1000"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def test_in_the_browser(driver: Any, address: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(driver, 60)

    def body() -> str:
        return driver.find_element(By.TAG_NAME, "body").text

    driver.get(address)
    wait.until(lambda _: "boundary IoU" in body() and driver.find_elements(By.TAG_NAME, "iframe"))
    assert "Errors, orange: bilinear | FreqFusion" in body()

    picture = write_picture(tmp_path / "mine.png", (40, 1100))
    driver.find_elements(By.CSS_SELECTOR, "input[type=file]")[0].send_keys(str(picture))
    wait.until(lambda _: "Scaled down from 1100x40 to 1024x37 pixels." in body())
    assert "boundary IoU" not in body()  # the truth was the example's
    shown = "return [...document.images].map((image) => [image.naturalWidth, image.naturalHeight])"
    wait.until(lambda _: driver.execute_script(shown).count([1024, 37]) == 2)

    frame = wait.until(lambda _: driver.find_element(By.TAG_NAME, "iframe"))
    driver.execute_script("arguments[0].scrollIntoView()", frame)
    driver.switch_to.frame(frame)
    readout = driver.find_element(By.ID, "explorer-readout")
    before = readout.text
    canvas = driver.find_element(By.ID, "explorer-canvas-1")
    ActionChains(driver).move_to_element_with_offset(canvas, 40, 0).click().perform()
    wait.until(lambda _: readout.text != before and "Chosen pixel" in readout.text)
    driver.switch_to.default_content()

    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    driver.find_element(By.CSS_SELECTOR, "button[aria-label=Clear]").click()
    wait.until(lambda _: "boundary IoU" in body())
    driver.find_elements(By.CSS_SELECTOR, "input[type=file]")[0].send_keys(str(broken))
    wait.until(lambda _: "broken.png: cannot be read as a picture" in body())

    assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]
    assert len(asked) > 10
    assert [url for url in asked if not url.startswith((address, "data:", "blob:", "about:"))] == []
