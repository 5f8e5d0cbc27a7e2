"""A folder in the layout of Cityscapes for tests: drawn streets, with the labelIds that the original files have."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROAD, SIDEWALK, BUILDING, POLE, VEGETATION, SKY, PERSON, CAR = 7, 8, 11, 17, 21, 23, 24, 26
# labelIds that do not count: unlabeled, ego vehicle, out of roi, static, parking.
UNLABELED, EGO_VEHICLE, OUT_OF_ROI, STATIC, PARKING = 0, 1, 3, 4, 9
COLOURS = {
    ROAD: (96, 92, 98),
    SIDEWALK: (176, 160, 168),
    BUILDING: (150, 96, 72),
    POLE: (214, 214, 90),
    VEGETATION: (52, 128, 48),
    SKY: (150, 190, 232),
    PERSON: (226, 40, 70),
    CAR: (28, 40, 170),
    EGO_VEHICLE: (20, 20, 24),
    STATIC: (120, 120, 60),
    PARKING: (190, 140, 190),
}
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt",)}


def write_streets(
    root: Path, *, train: int = 6, val: int = 2, height: int = 64, seed: int = 0, train_ids: bool = False
) -> Path:
    """Write `leftImg8bit` and `gtFine` of drawn streets, twice as wide as high; with `train_ids`, labelTrainIds as well.

    Classes: road, sidewalk, building, pole, vegetation, sky, person, car; and pixels that do not count (the hood of the car,
    a parking place, a frame).
    """
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        for number in range(count):
            city = CITIES[part][number % len(CITIES[part])]
            stem = f"{city}_{number:06}_{19:06}"
            image, labels = draw_street(height, rng)
            for folder, name, content in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", labels),
                *([("gtFine", "gtFine_labelTrainIds", _train_ids(labels))] if train_ids else []),
            ):
                path = root / folder / part / city / f"{stem}_{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(content).save(path)
    return root


def _train_ids(labels: np.ndarray) -> np.ndarray:
    from torchvision.datasets import Cityscapes

    table = np.full(256, 255, np.uint8)
    for one in Cityscapes.classes:
        table[one.id] = 255 if one.train_id < 0 else one.train_id
    return table[labels]


def draw_street(height: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return a noisy photo (H, 2 H, 3) and its labelIds (H, 2 H)."""
    width = 2 * height
    canvas = Image.new("L", (width, height), SKY)
    draw = ImageDraw.Draw(canvas)
    horizon = round(height * rng.uniform(0.42, 0.52))
    middle = round(width * rng.uniform(0.42, 0.58))
    for left in range(0, width, height // 3):
        top = round(horizon * rng.uniform(0.15, 0.6))
        draw.rectangle((left, top, left + height // 3 - rng.integers(0, 4), height), fill=BUILDING)
    for _ in range(3):
        x, size = int(rng.integers(0, width)), round(height * rng.uniform(0.1, 0.2))
        draw.ellipse((x - size, horizon - 2 * size, x + size, horizon), fill=VEGETATION)
    draw.rectangle((0, horizon, width, height), fill=SIDEWALK)
    draw.polygon(((middle - 4, horizon), (middle + 4, horizon), (width * 0.95, height), (width * 0.05, height)), fill=ROAD)
    draw.polygon(((0, height * 0.8), (width * 0.12, height * 0.8), (0, height)), fill=PARKING)
    for _ in range(2):
        x = int(rng.choice([rng.integers(2, width // 3), rng.integers(2 * width // 3, width - 4)]))
        draw.rectangle((x, height // 5, x + max(1, height // 40), horizon + height // 8), fill=POLE)
    for _ in range(2):
        x, y, size = (
            middle + int(rng.integers(-height // 2, height // 3)),
            int(rng.integers(5, 9)) * height // 10,
            height // 7,
        )
        draw.rounded_rectangle((x, y - size, x + 2 * size, y), radius=3, fill=CAR)
    x, size = int(rng.integers(width // 10, width // 3)), height // 4
    draw.rectangle((x, horizon, x + size // 3, horizon + size), fill=PERSON)
    draw.ellipse((x, horizon - size // 3, x + size // 3, horizon), fill=PERSON)
    draw.rectangle((0, height * 0.93, width, height), fill=EGO_VEHICLE)
    draw.rectangle((0, 0, width - 1, height - 1), outline=OUT_OF_ROI)
    labels = np.asarray(canvas)
    colours = np.zeros((256, 3))
    for label, colour in COLOURS.items():
        colours[label] = np.array(colour) + rng.normal(0, 8, 3)
    photo = colours[labels] + rng.normal(0, 9, (height, width, 3))
    return photo.clip(0, 255).astype(np.uint8), labels
