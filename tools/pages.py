"""The documentation site beside what MkDocs does itself: the root's pages, links out of docs/, docstrings."""

import re
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
OF_ROOT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
"""Files outside docs/ that are pages of the site, and what they are called there."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for name, page in OF_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as the site needs them: between pages relative, to other files of the repository in full."""
    name = page.file.src_uri
    folder = ROOT if name in OF_ROOT.values() else (DOCS / name).parent

    def rewrite(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        if not match[1] or not target.exists():
            return match[0]  # an address or a place in the page; what is broken the strict build finds
        path = target.relative_to(ROOT).as_posix()
        if target.is_relative_to(DOCS) or path in OF_ROOT:
            uri = OF_ROOT.get(path) or target.relative_to(DOCS).as_posix()
            link = "../" * name.count("/") + uri
        else:
            link = f"{config.repo_url}/{'tree' if target.is_dir() else 'blob'}/main/{path}"
        return f"]({link}"

    return re.sub(r"\]\(([^)#\s]*)", rewrite, markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Pictures lead to themselves in full size, which a phone needs."""
    return re.sub(r'<img [^>]*src="(?!https?:)([^"]*)"[^>]*>', r'<a href="\1">\g<0></a>', html)


class Docstrings(griffe.Extension):
    """Our docstrings as Markdown: roles such as ``:func:`name``` become links, examples blocks of code."""

    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        _translate(pkg)


def _translate(item: griffe.Object) -> None:
    if item.docstring:
        text = re.sub(r":[a-z]+:`~?([^`]+)`", lambda match: _link(match[1], item), item.docstring.value)
        item.docstring.value = re.sub(
            r"(?m)^( *)(>>> .*(?:\n+\1(?:>>>|\.\.\.).*|\n\1\S.*)*)", r"\1```pycon\n\1\2\n\1```", text
        )
    for member in item.members.values():
        if not member.is_alias:
            _translate(member)


def _link(name: str, item: griffe.Object) -> str:
    """A link where the site has the name, else the name."""
    try:
        path = name if name.startswith("freqfusion.") else item.resolve(name)
        found = item.package[path.removeprefix("freqfusion.")]
        if found.is_module and "op" in found.members:
            found = found["op"][found.name]  # ops.carafe names a folder, and a function of its file op.py
        path = found.canonical_path
    except (griffe.GriffeError, KeyError):  # of another package, or private
        path = name
    return f'<autoref identifier="{path}" optional>`{name}`</autoref>'
