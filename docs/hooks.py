"""For mkdocs: the README is the first page of the site, CONTRIBUTING and CHANGELOG are pages."""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md"} | {name: name for name in ("CONTRIBUTING.md", "CHANGELOG.md")}


def on_files(files: Files, config: object) -> Files:
    """Adds the pages that lie in the repository's root."""
    for page, source in PAGES.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=text))
    return files
