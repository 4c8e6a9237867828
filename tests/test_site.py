"""The documentation site: builds without a warning, every link leads somewhere, and nothing comes from elsewhere."""

import importlib
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import freqfusion

pytest.importorskip("material")
pytest.importorskip("mkdocstrings_handlers.python")

ROOT = Path(__file__).parents[1]
LOADED = {"img": "src", "script": "src", "iframe": "src", "source": "src", "video": "src", "object": "data"}
"""What a browser fetches by itself, beside the sheets and icons of ``<link>``."""
BADGES = ("img.shields.io", "badge.fury.io", "github.com")


class Html(HTMLParser):
    """Anchors, links and fetched addresses of a file."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        has = {name: value or "" for name, value in attrs}
        self.ids |= {has[name] for name in ("id", "name") if name in has}
        if tag == "a" and "href" in has:
            self.links.append(has["href"])
        elif tag in LOADED and LOADED[tag] in has:
            self.fetched.append(has[LOADED[tag]])
        elif tag == "link" and has.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(has["href"])


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {
        name: value for name, value in os.environ.items() if name not in ("SITE_URL", "REPOSITORY_URL")
    }
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Html]:
    """Every page but that of missing addresses, which is served at any depth."""
    files = [file for file in site.rglob("*.html") if file.name != "404.html"]
    assert len(files) > 50
    return {file: Html(file.read_text(encoding="utf-8")) for file in files}


def test_links_lead_to_files_and_places_that_exist(pages: dict[Path, Html]) -> None:
    for page, html in pages.items():
        for link in html.links + html.fetched:
            address = urlsplit(link)
            if address.scheme:
                continue
            target = (page.parent / unquote(address.path)).resolve() if address.path else page
            target = target / "index.html" if target.is_dir() else target
            assert target.is_file(), (page, link)
            if address.fragment:
                assert unquote(address.fragment) in pages[target].ids, (page, link)


def test_links_out_of_the_folder_go_to_the_repository(pages: dict[Path, Html]) -> None:
    """Of files and folders that are there; none of them is missing on the site."""
    found = 0
    for page, html in pages.items():
        for link in html.links:
            named = re.fullmatch(r"https://github\.com/OWNER/freqfusion/(blob|tree)/main/([^#]+)(#.*)?", link)
            if named:
                found += 1
                target = ROOT / named[2]
                assert target.is_dir() if named[1] == "tree" else target.is_file(), (page, link)
    assert found > 20


def test_nothing_comes_from_elsewhere(site: Path, pages: dict[Path, Html]) -> None:
    for page, html in pages.items():
        others = {urlsplit(link).netloc for link in html.fetched}
        assert others <= {"", *BADGES}, page
        text = page.read_text(encoding="utf-8")
        assert 'data-md-component="source"' not in text, "the theme's script would ask api.github.com"
        assert 'class="mermaid"' not in text, "the theme's script would fetch mermaid"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet


@pytest.mark.parametrize(
    ("term", "place"),
    [
        ("downgrade_", "api/upgrade/"),
        ("IndexNet", "api/fusion/"),
        ("nuclei", "results/detection/"),
        ("doctor", ""),
    ],
)
def test_search_index(site: Path, term: str, place: str) -> None:
    entries = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    assert any(entry["location"].partition("#")[0] == place and term in entry["text"] for entry in entries)


@pytest.mark.parametrize("page", sorted((ROOT / "docs/api").glob("*.md")), ids=lambda page: page.stem)
def test_public_names_are_in_the_reference(site: Path, pages: dict[Path, Html], page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    if page.stem == "index":
        assert {name for name in freqfusion.__all__ if f"[`{name}`][freqfusion." not in text} == set()
        return
    ids = pages[site / "api" / page.stem / "index.html"].ids
    described = re.findall(r"^::: (\S+)", text, re.MULTILINE)
    assert described
    for name in described:
        if name.endswith(tuple(f".op.{operator}" for operator in freqfusion.ops.__all__)):
            assert name in ids
            continue
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", ()):
            assert {f"{name}.{public}", f"{name}.{public}.op.{public}"} & ids, (name, public)


def test_docstrings_read_well(pages: dict[Path, Html]) -> None:
    """No role, no example and no reference stands there as typed."""
    for page in pages:
        if page.parts[-3] == "api":
            text = re.sub(r"<pre.*?</pre>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
            found = re.search(r":(?:func|class|meth|mod|attr|data):|&gt;&gt;&gt;|<autoref|<blockquote", text)
            assert not found, (page, text[found.start() - 100 : found.end() + 100] if found else "")
