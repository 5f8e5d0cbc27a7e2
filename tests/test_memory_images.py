"""Images in memory as data: the rows of the files they came from, and a sentence where it is not clear what they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_runs import train_small

import deepcluster
from deepcluster.core.errors import InputError
from deepcluster.data.decode import decode
from deepcluster.data.sources import fingerprint, open_source

DRAW = np.random.default_rng(0)


def noise(*shape: int) -> Any:
    return DRAW.integers(0, 256, shape, np.uint8)


def read_all(data: Any) -> list[Any]:
    source = open_source(data)
    return [decode(source.read(index)) for index in range(len(source))]


RGB, BATCH, GREY = noise(40, 50, 3), noise(5, 40, 50, 3), noise(40, 50)
CASES: dict[str, tuple[Any, list[Any] | None]] = {
    "height, width, channels": (RGB, [RGB]),
    "grey": (GREY, [np.stack([GREY] * 3, 2)]),
    "one channel": (GREY[..., None], [np.stack([GREY] * 3, 2)]),
    "a batch": (BATCH, list(BATCH)),
    "a batch of one": (RGB[None], [RGB]),
    "a batch of greys": (BATCH[..., 0], [np.stack([one] * 3, 2) for one in BATCH[..., 0]]),
    "channels first": (BATCH.transpose(0, 3, 1, 2), list(BATCH)),
    "a tensor": (torch.from_numpy(RGB).permute(2, 0, 1), [RGB]),
    "a tensor of a batch": (torch.from_numpy(BATCH).permute(0, 3, 1, 2), list(BATCH)),
    "a tensor of 3 images of 3 pixels": (torch.from_numpy(noise(3, 3, 3, 3)), None),
    "numbers from 0 to 1": (BATCH / 255, list(BATCH)),
    "a tensor of numbers from 0 to 1": (torch.from_numpy(RGB / 255).half().permute(2, 0, 1), None),
    "two values": (GREY > 127, [np.stack([(GREY > 127) * np.uint8(255)] * 3, 2)]),
    "of Pillow": (Image.fromarray(RGB), [RGB]),
    "several of Pillow": ([Image.fromarray(one) for one in BATCH], list(BATCH)),
    "a generator": ((one for one in BATCH), list(BATCH)),
    "a tuple of different sizes": ((RGB, noise(7, 9)), None),
    "arrays and images": ([RGB, Image.fromarray(BATCH[0])], [RGB, BATCH[0]]),
    "transparent": (np.dstack([RGB, np.zeros((40, 50), np.uint8)]), [np.full_like(RGB, 255)]),
}


@pytest.mark.parametrize("name", CASES)
def test_what_images_in_memory_may_be(name: str) -> None:
    data, expected = CASES[name]
    found = read_all(data)
    for one, other in zip(found, expected or found, strict=True):
        assert one.dtype == np.uint8 and one.shape[2] == 3 and np.array_equal(one, other)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (noise(3, 40, 50), "one image of 3 channels, or 3 grey images.*transpose"),
        (noise(40), "an array of 40 numbers, which are no images"),
        (noise(2, 40, 50, 5), "an array of 2 x 40 x 50 x 5 numbers"),
        (noise(0, 40, 50, 3), "an array of 0 x 40 x 50 x 3"),
        (noise(2, 2, 2, 2, 2), "2 x 2 x 2 x 2 x 2"),
        (RGB.astype(np.int64), r"int64 from .* to 25.*astype\('uint8'\)"),
        (RGB.astype(np.float64), "float64 from"),
        (RGB / 255 - 0.5, "from -0.5 to 0.5"),
        (np.full((4, 4), np.nan), "from nan to nan"),
        ([RGB, "a.jpg"], "at place 1 a value of type str"),
        ([RGB, noise(4)], "image 1 is an array of 4 numbers"),
        ([RGB, BATCH], "image 1 is an array of 5 x 40 x 50 x 3"),
    ],
)
def test_what_is_not_clear_is_asked(data: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_source(data)


@given(orientation=st.integers(1, 8), mode=st.sampled_from(["RGB", "L", "P", "RGBA", "CMYK"]), seed=st.integers(0, 99))
def test_an_image_of_pillow_is_what_its_file_is(
    orientation: int, mode: str, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), np.uint8)
    ending = {"P": "png", "RGBA": "png"}.get(mode, "jpg")
    file = tmp_path_factory.mktemp("one") / f"é {seed}.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).convert(mode).save(file, exif=exif)
    with Image.open(file) as image:
        (one,), (other,) = read_all(image), read_all(file)
        assert open_source(image).name(0) == open_source(file).name(0) == file.name
    assert np.array_equal(one, other)


def test_rows_are_those_of_the_files(trained: Path, images: Path) -> None:
    files = sorted(images.iterdir())[:6]
    model = deepcluster.load(trained)
    whole = deepcluster.assign(model, images)
    pixels = np.stack([decode(file.read_bytes()) for file in files])
    forms: list[Any] = [files, list(map(str, files)), [Image.open(file) for file in files], pixels]
    for form in forms:
        rows = deepcluster.assign(model, form)
        assert rows.cluster_N.tolist() == whole.cluster_N[:6].tolist()
        np.testing.assert_allclose(rows.distance_N, whole.distance_N[:6], atol=1e-4)
        if form is not pixels:
            assert rows.names == [file.name for file in files]
        assert rows._repr_html_().count("<img ") == 6
    for one in (files[2], str(files[2]), Image.open(files[2]), pixels[2], torch.from_numpy(pixels[2]).permute(2, 0, 1)):
        row = deepcluster.assign(model, one)
        assert len(row) == 1 and row.cluster_N[0] == whole.cluster_N[2]
        embedding = deepcluster.embed(model, one).embedding_ND
        np.testing.assert_allclose(embedding, deepcluster.embed(model, files[2]).embedding_ND, atol=1e-5)


def test_files_are_given_one_by_one(images: Path, tmp_path: Path) -> None:
    some = sorted(images.iterdir())[:3]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.png").write_bytes(some[0].read_bytes())
    far = open_source([some[1], tmp_path / "other" / "c.png", some[0]])
    assert [far.path(index) for index in range(3)] == [some[1], tmp_path / "other" / "c.png", some[0]]
    mixed = open_source([tmp_path / "other", *some])
    assert len(mixed) == 4 and len({mixed.name(index) for index in range(4)}) == 4
    assert len(open_source(f"{images}/*.png")) == len(list(images.glob("*.png")))
    with pytest.raises(InputError, match="given twice"):
        open_source([some[0], some[0]])
    with pytest.raises(InputError, match="does not exist"):
        open_source([some[0], images / "none.png"])
    with pytest.raises(InputError, match="does not exist"):
        open_source("none.png")


def test_a_run_of_images_in_memory(trained: Path, images: Path, tmp_path: Path) -> None:
    """It is resumed with the same images, and with no others; later it says that the images have to be given."""
    pixels = np.stack([decode(file.read_bytes()) for file in sorted(images.iterdir())])
    run, other = (deepcluster.Run(train_small(data, tmp_path / str(n), epochs=1)) for n, data in enumerate((pixels, images)))
    assert len(run.clusters) == 60 and run.images() is None
    assert train_small(pixels, run, epochs=2, resume=True) == run and len(run.metrics) == 2
    with pytest.raises(InputError, match="not those of this run"):
        train_small(pixels[:, ::-1], run, epochs=3, resume=True)
    assert other.metrics[0]["loss"] == pytest.approx(run.metrics[0]["loss"], rel=1e-5)
    with pytest.raises(InputError, match="in the memory of another process"):
        open_source(run.config["data"]["address"])
    assert fingerprint(open_source(pixels)) != fingerprint(open_source(pixels[::-1]))
