"""A hook of MkDocs: pages of the site that lie outside ``docs/``, and links to them.

README.md is the site's first page, and CHANGELOG.md and the like are pages of it (``PAGES``). Pages link to files of
the repository as they do on a code host; a linked file that is no page becomes one, which shows its text
(``source/...``). So the site needs no address of a code host, and ``mkdocs build --strict`` checks every link on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "running-benchmarks.md",
}
LANGUAGES = {".py": "python", ".toml": "toml", ".yml": "yaml", ".md": "markdown", ".jsonl": "json"}
MOST_CHARACTERS = 20_000
"""Of a file that is shown; longer ones are cut."""

LINK = re.compile(r"(?P<before>\]\(|(?:src|href)=\")(?P<target>[^)\s\"#:]+)(?P<after>(?:#[^)\s\"]*)?[)\"])")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Add the pages outside ``docs/`` and the files that any page links to."""
    for path, uri in PAGES.items():
        if (ROOT / path).exists():
            files.append(File.generated(config, uri, content=(ROOT / path).read_text("utf-8")))
    pages = [f.src_uri for f in files.documentation_pages()]
    for path in sorted({target for page in pages for target in _linked(page)}):
        uri = site_path(path)
        if uri not in files.src_uris:
            files.append(File.generated(config, uri, content=_shown(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository become links to pages of the site."""
    here = page.file.src_uri
    if here == "index.md":
        page.meta["hide"] = ["navigation"]
    if here.startswith("source/"):
        page.meta["search"] = {"exclude": True}
    return _outside_code(markdown, lambda text: LINK.sub(lambda link: _on_site(link, here), text))


def repository_path(uri: str) -> str:
    """Where the page ``uri`` lies in the repository."""
    return next((path for path, page in PAGES.items() if page == uri), f"docs/{uri}")


def site_path(path: str) -> str:
    """The page of the site that shows the file or folder ``path`` of the repository."""
    if path in PAGES:
        return PAGES[path]
    return path.removeprefix("docs/") if path.startswith("docs/") else f"source/{path}.md"


def _on_site(link: re.Match[str], here: str) -> str:
    path = _target(link["target"], here)
    if path is None:
        return link[0]
    relative = posixpath.relpath(site_path(path), posixpath.dirname(here) or ".")
    return f"{link['before']}{relative}{link['after']}"


def _target(target: str, here: str) -> str | None:
    """The path in the repository that a link on the page ``here`` leads to; None where there is no such file."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(repository_path(here)), target))
    return path if (ROOT / path).exists() else None


def _linked(page: str) -> set[str]:
    """The files outside ``docs/`` that a page links to."""
    path = ROOT / repository_path(page)
    if not path.exists():
        return set()
    text = FENCED.sub("", path.read_text("utf-8"))
    targets = {_target(link["target"], page) for link in LINK.finditer(text)}
    return {t for t in targets if t is not None and not t.startswith("docs/") and t not in PAGES}


def _shown(path: Path) -> str:
    """A page with the text of a file, or the names in a folder."""
    name = path.relative_to(ROOT).as_posix()
    if path.is_dir():
        return f"# {name}\n\n" + "\n".join(f"- `{p.name}`" for p in sorted(path.iterdir()) if p.name[0] not in "._")
    text = path.read_text("utf-8")
    cut = "" if len(text) <= MOST_CHARACTERS else f"\nThe first {MOST_CHARACTERS:,} of {len(text):,} characters.\n"
    language = LANGUAGES.get(path.suffix, "text")
    return f"# {name}\n{cut}\n````{language}\n{text[:MOST_CHARACTERS].rstrip()}\n````\n"


def _outside_code(markdown: str, change: Any) -> str:
    parts, end = [], 0
    for block in FENCED.finditer(markdown):
        parts += [change(markdown[end : block.start()]), block[0]]
        end = block.end()
    return "".join([*parts, change(markdown[end:])])
