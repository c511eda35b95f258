"""What the site of the documentation has beyond the pages in `docs/`: files from elsewhere."""

import pathlib
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
MOVED = {"](../results/": "](figures/", "](../SECURITY.md": "](security.md", "](../docs/": "](../"}
MOVED |= {"](../colabs/": "](colabs/"}


def on_files(files: Files, config: Any) -> Files:
    """Adds them."""
    files.append(File.generated(config, "security.md", abs_src_path=str(ROOT / "SECURITY.md")))
    for file in sorted((ROOT / "results").iterdir()):
        files.append(File.generated(config, f"figures/{file.name}", abs_src_path=str(file)))
    for file in sorted((ROOT / "colabs").glob("*.ipynb")):
        files.append(File.generated(config, f"colabs/{file.name}", abs_src_path=str(file)))
    return files


def on_page_markdown(markdown: str, **about: Any) -> str:
    """Links to them."""
    for before, after in MOVED.items():
        markdown = markdown.replace(before, after)
    return markdown
