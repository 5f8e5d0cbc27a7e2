"""Names and numbers as users read them."""

import pytest

from deepcluster.core.text import are, count_of


@pytest.mark.parametrize(
    ("number", "noun", "counted", "said"),
    [
        (0, "image", "0 images", "0 images are"),
        (1, "image", "1 image", "1 image is"),
        (2, "class", "2 classes", "2 classes are"),
        (1, "class", "1 class", "1 class is"),
        (1234, "readable image", "1,234 readable images", "1,234 readable images are"),
    ],
)
def test_one_thing_is_in_the_singular(number: int, noun: str, counted: str, said: str) -> None:
    assert count_of(number, noun) == counted
    assert are(number, noun) == said
