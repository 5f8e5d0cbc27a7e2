"""Colours of classes, and the font, of pictures with masks and boxes."""

from collections.abc import Iterable, Sequence

from PIL import ImageFont

from deepcluster.evaluation.datasets.dense import BACKGROUND, IGNORED

Colour = tuple[int, int, int]
PAPER, INK, FAINT = (255, 255, 255), (40, 40, 40), (120, 120, 120)

# Not VOC's own palette: four of its colours vanish on dark photos, and of its 20 some pairs are one colour to users with a
# red-green deficiency. These 20 were chosen by their smallest distance (OKLab) as seen by normal, by deuteranopic and by
# protanopic eyes (Machado et al., 2009): there it is 0.079 for the closest pair, with VOC's 0.006.
PALETTE: tuple[Colour, ...] = (
    (0, 136, 187),
    (187, 255, 0),
    (187, 0, 17),
    (187, 153, 0),
    (85, 51, 153),
    (85, 204, 221),
    (85, 51, 255),
    (204, 68, 136),
    (51, 187, 119),
    (221, 221, 136),
    (34, 255, 221),
    (204, 136, 255),
    (187, 102, 68),
    (153, 0, 102),
    (102, 119, 255),
    (153, 0, 204),
    (153, 204, 0),
    (238, 153, 170),
    (255, 0, 187),
    (0, 102, 34),
)


def colours_of(numbers: Iterable[int], class_names: Sequence[str]) -> dict[int, Colour]:
    """Return the colours of the classes in a picture; background and ignored pixels have none.

    Up to 20 classes have the same colour in each picture. With more, a class whose colour is taken gets the next free one.
    """
    first = int(class_names[0] == BACKGROUND)
    shown = sorted({number for number in numbers if first <= number != IGNORED})
    colours: dict[int, Colour] = {}
    for number in shown:
        order = [PALETTE[(number - first + step) % len(PALETTE)] for step in range(len(PALETTE))]
        colours[number] = next((colour for colour in order if colour not in colours.values()), order[0])
    return colours


def ink_on(colour: Colour) -> Colour:
    """Return black or white, whichever has the higher contrast with a colour (WCAG 2)."""
    linear = [(one / 255 / 12.92) if one <= 10 else ((one / 255 + 0.055) / 1.055) ** 2.4 for one in colour]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return (0, 0, 0) if (light + 0.05) / 0.05 > 1.05 / (light + 0.05) else (255, 255, 255)


def font_of(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own scalable font: the same on all machines."""
    return ImageFont.load_default(size)


def shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Return a text on one line, cut off with an ellipsis where it is wider than `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    fitting = (text[:end].rstrip() + "…" for end in range(len(text) - 1, 0, -1))
    return next((one for one in fitting if font.getlength(one) <= width), "")
