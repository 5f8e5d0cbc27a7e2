"""Hooks of mkdocs: pages that are generated, and links from the pages to files outside docs/.

The pages of docs/ are read on GitHub, too. There a link such as ../src/deepcluster/training/loop.py leads to the file; here
the hooks make a page of it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from commands import PAGE, command_pages
from functions import functions_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = "reference/commands"
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
# Files outside docs/ that are pages of the site.
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "CITATION.cff": "citing.md",
    "examples/quickstart.ipynb": "tutorials/quickstart.md",
}
LANGUAGES = {".py": "python", ".ipynb": "json", ".sh": "bash", ".toml": "toml", ".yml": "yaml"}
# Short options in the text, which are not broken at their hyphens.
_OPTION = re.compile(r"<code>(-[^<>]{1,28})</code>")
_LINK = re.compile(r"(\]\(|href=\")([^)#\s:\"]+)((?:#[^)\s\"]*)?[)\"])")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """List the commands in the navigation; leave out pages that do not exist."""
    config.nav = _navigation(config.nav, set(command_pages()))
    config.watch.extend(str(ROOT / name) for name in ("src", "CHANGELOG.md", "CONTRIBUTING.md"))
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    made = {f"{COMMANDS}/{name}": text for name, text in command_pages().items()}
    made["reference/python.md"] = functions_page()
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        made[PAGES[name]] = (ROOT / name).read_text(encoding="utf-8")
    if NOTEBOOK.exists():
        made[PAGES["examples/quickstart.ipynb"]] = _notebook_page(json.loads(NOTEBOOK.read_text(encoding="utf-8")))
    texts = [(ROOT / "docs" / one.src_uri, one.content_string) for one in files.documentation_pages()]
    texts += [(ROOT / name, made[PAGES[name]]) for name in ("CHANGELOG.md", "CONTRIBUTING.md")]
    for path, text in texts:
        for _, target, _ in _LINK.findall(text):
            if (there := _outside(path, target)) and there.is_file() and _name(there) not in PAGES:
                made[_source_uri(there)] = _source_page(there)
    for uri, text in made.items():
        level = InclusionLevel.NOT_IN_NAV if uri.startswith("source/") else InclusionLevel.UNDEFINED
        files.append(File.generated(config, uri, content=text, inclusion=level))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make the links that lead out of docs/ lead to pages of the site."""
    uri = page.file.src_uri
    if uri == "index.md":
        page.meta["hide"] = ["navigation"]
    home = {there: name for name, there in PAGES.items() if there.startswith("project/")}
    path = ROOT / home[uri] if uri in home else ROOT / "docs" / uri

    def link(found: re.Match[str]) -> str:
        begin, target, end = found.groups()
        there = _outside(path, target)
        if there is None and uri not in home:
            return found[0]
        if there is None:  # CONTRIBUTING.md links to docs/data.md.
            new = (path.parent / target).resolve().relative_to(ROOT / "docs").as_posix()
        else:
            new = PAGES.get(_name(there)) or _source_uri(there)
        return f"{begin}{os.path.relpath(new, Path(uri).parent).replace(os.sep, '/')}{end}"

    return _LINK.sub(link, markdown)


def on_page_content(html: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keep options in one line, and make links of the pages that docstrings name."""
    html = _OPTION.sub(r'<code class="option">\1</code>', html)
    if page.file.src_uri != "reference/python.md":
        return html
    there = {one.src_uri for one in files.documentation_pages()}
    return PAGE.sub(lambda name: f'<a href="../{name[1]}.html">{name[1]}</a>' if f"{name[1]}.md" in there else name[1], html)


def _navigation(entries: Any, commands: set[str]) -> Any:
    """Return the navigation with the commands in it, and without pages that are not there."""
    kept = []
    for entry in entries:
        ((title, value),) = entry.items()
        if isinstance(value, list):
            value = _navigation(value, commands)
        elif value == COMMANDS:
            pages = [{name.removesuffix(".md"): f"{COMMANDS}/{name}"} for name in sorted(commands - {"index.md"})]
            value = [f"{COMMANDS}/index.md", *pages]
        elif not (ROOT / "docs" / value).exists() and not value.startswith(("reference/", "project/")):
            value = value if value == PAGES["examples/quickstart.ipynb"] and NOTEBOOK.exists() else None
        if value:
            kept.append({title: value})
    return kept


def _outside(page: Path, target: str) -> Path | None:
    """Return the file or folder of ours outside docs/ to which a link of a page leads, or None."""
    there = (page.parent / target).resolve()
    inside = there.is_relative_to(ROOT / "docs") or not there.is_relative_to(ROOT)
    return None if inside or not there.exists() else there / "__init__.py" if there.is_dir() else there


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _source_uri(path: Path) -> str:
    return f"source/{_name(path)}.md"


def _source_page(path: Path) -> str:
    language = LANGUAGES.get(path.suffix, "text")
    head = "---\nsearch:\n  exclude: true\nhide:\n  - navigation\n---\n"
    return f"{head}\n# {_name(path)}\n\n~~~~{language}\n{path.read_text(encoding='utf-8')}~~~~\n"


def _notebook_page(notebook: dict[str, Any]) -> str:
    """Return a notebook as a page: its text, code, and printed output."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).replace("](../docs/", "](../")  # From examples/ to docs/tutorials/.
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code" and source.strip():
            parts.append(f"```python\n{source}\n```")
            texts = ["".join(output.get("text", output.get("data", {}).get("text/plain", []))) for output in cell["outputs"]]
            if any(texts):
                parts.append("```text\n" + "\n".join(text.rstrip() for text in texts if text) + "\n```")
    parts.append("The notebook is `examples/quickstart.ipynb` of the repository.")
    return "\n\n".join(parts) + "\n"
