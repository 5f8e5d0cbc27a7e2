"""The page in a notebook: below the cell that made it."""

from html import escape

from deepcluster.core.html import block, line
from deepcluster.core.paths import ResultPath
from deepcluster.core.text import size

# A notebook keeps what it shows; a larger page is only named. Height in pixels.
MOST_INLINE_BYTES, HEIGHT = 20_000_000, 720


class Page(ResultPath):
    """The path of an HTML page, which a notebook shows."""

    def _repr_html_(self) -> str:
        if not self.is_file():
            return block(line(f"{self} does not exist any more"))
        n_bytes = self.stat().st_size
        if n_bytes > MOST_INLINE_BYTES:
            return block(line(f"{self} has {size(n_bytes)}, too many for a notebook: open it in a browser"))
        # The page as an attribute: VS Code shows no files in frames, Jupyter none above its folder. Links to parts of the
        # page are relative to the base, which otherwise is the notebook.
        html = self.read_text(encoding="utf-8").replace("<head>", '<head><base href="about:srcdoc">', 1)
        style = f"box-sizing:border-box;width:100%;height:{HEIGHT}px;border:1px solid #8884;border-radius:6px"
        return f'<iframe title="{escape(str(self))}" style="{style}" srcdoc="{escape(html)}"></iframe>'
