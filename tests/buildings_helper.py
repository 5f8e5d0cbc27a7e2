"""Two small cities for tests of retrieval: near-duplicates of a few places, among other pictures."""

from pathlib import Path

import numpy as np
from PIL import Image

PLACES = ("hall", "tower", "bridge")


def _picture(seed: int) -> Image.Image:
    """Coarse forms in two colours of its own."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (2, 3))
    forms = Image.fromarray(colours[rng.integers(0, 2, (8, 10))].astype(np.uint8))
    return forms.resize((96, 76), Image.Resampling.BICUBIC)


def write_city(folder: Path, city: str, *, prefix: str = "", seed: int = 0) -> Path:
    """`jpg/` and `lab/` as the Oxford group publishes them; of each place three pictures, cut a little closer each."""
    for part in ("jpg", "lab"):
        (folder / part).mkdir(parents=True)
    for number in range(8):
        _picture(seed + 100 + number).save(folder / "jpg" / f"{city}_other_{number:06}.jpg", quality=95)
    for place, kind in enumerate(PLACES):
        whole, names = _picture(seed + place), [f"{city}_{kind}_{number:06}" for number in range(3)]
        for number, name in enumerate(names):
            less = 2 * (2 - number)
            whole.crop((less, less, 96 - less, 76 - less)).save(folder / "jpg" / f"{name}.jpg", quality=95)
        lists = {
            "query": f"{prefix}{names[2]} 4 4 92 72",
            "good": "\n".join(names[:2]),
            "ok": names[2],
            "junk": f"{city}_other_000001",
        }
        for name, text in lists.items():
            (folder / "lab" / f"{kind}_1_{name}.txt").write_text(text + "\n")
    return folder
