"""The images that excite a channel most: against a full sort, stopped, drawn, listed and copied."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_helper import make_model, write_classes
from PIL import Image
from torch import Tensor, nn

from deepcluster.core.errors import InputError, Interrupted, TrainingError
from deepcluster.core.files import check_new_folder
from deepcluster.core.work import Interruption
from deepcluster.data.decode import decode
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.views import ClusterView
from deepcluster.models.trunk import normalise
from deepcluster.run.model import Model
from deepcluster.visualization.best_images import Best, TopImages, find_top_images
from deepcluster.visualization.grid import GAP, TILE, image_tile, page_of, photo_box
from deepcluster.visualization.options import TopImagesOptions
from deepcluster.visualization.stages import parse_channels
from deepcluster.visualization.top_images import file_name, save_top_images

STAGES = "conv1,conv3,features"


@pytest.fixture
def model(tmp_path: Path) -> Model:
    """A model with biases such that every image excites every channel of the first stages, and most of the others."""
    made = make_model(tmp_path / "cache")
    for layer in made.trunk.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.constant_(layer.bias, 5)
    return made


@pytest.fixture
def photos(tmp_path: Path) -> ImageSource:
    """15 images of three colours, one of them three times, and an unreadable one in the middle."""
    folder = write_classes(tmp_path / "photos", 5)
    (folder / "class1" / "002.png").write_bytes(b"no picture")
    for twin in ("class0/001a.png", "class2/004a.png"):
        (folder / twin).write_bytes((folder / "class0" / "001.png").read_bytes())
    return open_source(folder)


def all_maps(model: Model, source: ImageSource, stage: str) -> dict[int, Tensor]:
    """Return the map (C, H, W) of every readable image, computed one by one."""
    maps = {}
    for index in range(len(source)):
        if source.name(index) != "class1/002.png":
            view_1CHW = ClusterView(model.image_size)([torch.from_numpy(decode(source.read(index)).copy())])
            with torch.no_grad():
                maps[index] = model.trunk.stage(normalise(view_1CHW), stage)[0]
    return maps


@pytest.mark.parametrize("rank", ["peak", "mean"])
def test_a_full_sort_of_all_scores_gives_the_same(tmp_path: Path, photos: ImageSource, rank: str) -> None:
    model = make_model(tmp_path / "cache")
    top = find_top_images(model, photos, TopImagesOptions(stage=STAGES, count=4, rank=rank))
    assert [one.stage for one in top.stages] == STAGES.split(",")
    for one in top.stages:
        maps = all_maps(model, photos, one.stage)
        for row, channel in enumerate(one.channels):
            of_image = {i: (m[channel].max() if rank == "peak" else m[channel].mean()).item() for i, m in maps.items()}
            best = [index for index in sorted(of_image, key=lambda index: (-of_image[index], index)) if of_image[index]][:4]
            shown = len(one.images(row))
            np.testing.assert_allclose(one.scores_SK[row, :shown], [of_image[index] for index in best], rtol=1e-4, atol=1e-6)
            # Batches sum in another order and may swap near-equals: each image has the score that it should have.
            found = one.indices_SK[row, :shown].tolist()
            assert len(set(found)) == len(found)
            np.testing.assert_allclose(
                [of_image[index] for index in found], one.scores_SK[row, :shown], rtol=1e-4, atol=1e-6
            )
            for index, (down, across) in zip(found, one.cells_SK2[row, :shown].tolist(), strict=True):
                assert maps[index][channel, down, across] == pytest.approx(maps[index][channel].max().item(), rel=1e-4)


def assert_same(one: TopImages, other: TopImages) -> None:
    assert one.unreadable == other.unreadable
    for a, b in zip(one.stages, other.stages, strict=True):
        assert a.channels == b.channels
        for name in ("scores_SK", "indices_SK", "cells_SK2", "dead_S"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)


def test_equal_images_are_in_the_order_of_the_data_whatever_the_batches(model: Model, photos: ImageSource) -> None:
    options = TopImagesOptions(stage=STAGES, count=20)
    whole = find_top_images(model, photos, options)
    assert_same(whole, find_top_images(model, photos, options, batch_size=3))
    names = [photos.name(index) for index in range(len(photos))]
    twins = [names.index(name) for name in ("class0/001.png", "class0/001a.png", "class2/004a.png")]
    for one in whole.stages:
        lively = [row for row in range(len(one.channels)) if len(one.images(row)) == 16]
        assert len(lively) > 0.3 * len(one.channels)
        for row in lively:
            order = one.indices_SK[row].tolist()
            places = [order.index(twin) for twin in twins]
            assert len({one.scores_SK[row, place] for place in places}) == 1
            assert places == sorted(places)
            assert names.index("class1/002.png") not in order
            # 17 images, 16 of which can be read: the rest of the 20 is empty.
            assert order[16:] == [-1] * 4
            assert np.isneginf(one.scores_SK[row, 16:]).all()


def test_running_best_against_a_sort_of_random_scores_with_many_ties() -> None:
    rng = np.random.default_rng(0)
    scores_NC = rng.integers(0, 5, (200, 7)).astype(np.float32)
    best = Best.none(7, 12, torch.device("cpu"))
    first = 0
    while first < 200:
        end = min(200, first + int(rng.integers(1, 30)))
        map_BCHW = torch.zeros(end - first, 7, 2, 3)
        map_BCHW[:, :, 1, 2] = torch.from_numpy(scores_NC[first:end])
        best = best.merge(map_BCHW, torch.arange(first, end), "peak")
        first = end
    order_NC = np.lexsort((np.broadcast_to(np.arange(200)[:, None], (200, 7)), -scores_NC), axis=0)
    np.testing.assert_array_equal(best.indices_CK.numpy(), order_NC[:12].T)
    np.testing.assert_array_equal(best.scores_CK.numpy(), np.take_along_axis(scores_NC, order_NC, 0)[:12].T)
    np.testing.assert_array_equal(best.lowest_C.numpy(), scores_NC.min(0))
    assert set(best.cells_CK[best.scores_CK > 0].tolist()) == {5}


class StopAfter(Interruption):
    """Requests a stop at the n-th check."""

    def __init__(self, checks: int) -> None:
        super().__init__(advice="run the same command again")
        self.left = checks

    def check(self, save: Any = None) -> None:
        self.left -= 1
        self.requested = "SIGINT" if self.left == 0 else None
        super().check(save)


def test_a_stop_ends_the_search_and_keeps_nothing(tmp_path: Path, photos: ImageSource) -> None:
    options, cache = TopImagesOptions(stage=STAGES, count=3), tmp_path / "cache"
    with pytest.raises(Interrupted, match="run the same command again"):
        find_top_images(make_model(cache, interruption=StopAfter(4)), photos, options, batch_size=2)
    assert not (cache / "unfinished").exists()
    again = find_top_images(make_model(cache), photos, options, batch_size=2)
    assert_same(again, find_top_images(make_model(tmp_path / "other"), photos, options, batch_size=2))


def test_dead_channels_are_reported(tmp_path: Path, photos: ImageSource) -> None:
    model = make_model(tmp_path / "cache")
    norm = model.trunk.features[1]  # type: ignore[index]
    with torch.no_grad():
        norm.weight[[5, 9]] = 0
        norm.bias[5], norm.bias[9] = -1, 1  # nothing passes the ReLU; the same for every image
    top = find_top_images(model, photos, TopImagesOptions(stage="conv1", channels="4-10"))
    (stage,) = top.stages
    assert [stage.channels[row] for row in np.flatnonzero(stage.dead_S)] == [5, 9]
    (file,) = save_top_images(top, tmp_path / "out", data="photos")
    facts = json.loads(file.read_text())
    assert facts["dead"] == [5, 9]
    assert list(facts["channels"]) == ["4", "6", "7", "8", "10"]
    assert facts["pages"][0]["channels"] == [4, 6, 7, 8, 10]


def test_images_that_do_not_excite_a_channel_are_left_out(model: Model, photos: ImageSource) -> None:
    options = TopImagesOptions(stage="conv1", channels="5", count=16)
    before = find_top_images(model, photos, options).stages[0]
    with torch.no_grad():
        # Now the seventh image's peak is just below zero, before the ReLU.
        model.trunk.features[1].bias[5] -= before.scores_SK[0, 6] + 1e-4  # type: ignore[index]
    after = find_top_images(replace(model), photos, options).stages[0]
    assert after.images(0) == range(6)
    np.testing.assert_array_equal(after.indices_SK[0], [*before.indices_SK[0, :6].tolist(), *[-1] * 10])
    assert not after.dead_S.any()


@pytest.mark.parametrize("reduce_to", [0, 24])
@pytest.mark.parametrize(("height", "width"), [(20, 20), (60, 41), (37, 90), (16, 700)])
def test_a_box_in_the_view_is_found_in_the_photo(height: int, width: int, reduce_to: int) -> None:
    # The colours of the photo tell where a pixel of the view comes from.
    y_HW, x_HW = np.mgrid[:height, :width] + 0.5
    scale = 255 / max(height, width)
    photo_HWC = np.stack([x_HW * scale, y_HW * scale, x_HW * 0], 2).round().astype(np.uint8)
    small_HWC = decode(photo_HWC, shorter_side=reduce_to or None)
    view_CHW = ClusterView(32)([torch.from_numpy(small_HWC.copy())])[0]
    for down, across in ((3, 3), (16, 5), (9, 28), (28, 28)):
        left, top, right, bottom = photo_box(
            (across, down, across + 1, down + 1), ClusterView(32), height, width, reduce_to=reduce_to
        )
        pixel = 1 / scale + max(height, width) * 0.004  # of rounding, twice
        assert view_CHW[0, down, across] / scale == pytest.approx((left + right) / 2, abs=2 * pixel)
        assert view_CHW[1, down, across] / scale == pytest.approx((top + bottom) / 2, abs=2 * pixel)
        assert right - left == pytest.approx(bottom - top, rel=0.1)


def test_what_is_written(tmp_path: Path, model: Model, photos: ImageSource) -> None:
    top = find_top_images(model, photos, TopImagesOptions(stage="conv2", channels="0-39", count=9))
    (file,) = save_top_images(top, tmp_path / "out", data="photos", copies=tmp_path / "copies")
    assert file == tmp_path / "out" / "conv2" / "top-images.json"
    facts, stage = json.loads(file.read_text()), top.stages[0]
    known = {"stage": "conv2", "model": "untrained:alexnet-small", "weights": model.weights, "data": "photos", "count": 9}
    assert known.items() <= facts.items()
    assert facts | {"rank": "peak", "images": 16, "unreadable": 1, "image_size": 16, "dead": []} == facts
    assert facts["receptive_field"] == {"size": 15, "stride": 4, "offset": -6}
    assert [page["pairs"] for page in facts["pages"]] == ["pairs-1.png", "pairs-2.png"]
    assert [len(page["channels"]) for page in facts["pages"]] == [32, 8]
    for row, (channel, images) in enumerate(facts["channels"].items()):
        assert int(channel) == stage.channels[row]
        assert [one["name"] for one in images] == [photos.name(index) for index in stage.indices_SK[row].tolist()]
        assert [one["score"] for one in images] == stage.scores_SK[row].tolist()
        for rank, one in enumerate(images):
            down, across = stage.cells_SK2[row, rank].tolist()
            top_edge, left_edge = max(0, down * 4 - 6), max(0, across * 4 - 6)
            assert one["view_box"] == [left_edge, top_edge, min(16, across * 4 + 9), min(16, down * 4 + 9)]
            # Photos of 20 px become 18, of which the middle 16 are seen.
            edges = [(edge + 1) * 20 / 18 for edge in one["view_box"]]
            assert one["box"] == [*map(int, np.floor(edges[:2])), *map(int, np.ceil(edges[2:]))]
    for page in facts["pages"]:
        with Image.open(file.parent / page["pairs"]) as picture:
            assert picture.mode == "RGB"
            assert np.asarray(picture).std() > 10
    _check_copies(tmp_path / "copies" / "conv2", facts, photos)


def _check_copies(folder: Path, facts: dict, photos: ImageSource) -> None:  # type: ignore[type-arg]
    assert sorted(path.name for path in folder.iterdir()) == [f"channel-{channel:02d}" for channel in range(40)]
    names = {photos.name(index): index for index in range(len(photos))}
    for channel, images in facts["channels"].items():
        there = sorted((folder / f"channel-{int(channel):02d}").iterdir())
        assert [path.name for path in there] == [f"{n}-{one['name'].replace('/', '__')}" for n, one in enumerate(images, 1)]
        assert [path.read_bytes() for path in there] == [photos.read(names[one["name"]]) for one in images]


def test_fewer_pages_leave_none_of_before(tmp_path: Path, model: Model, photos: ImageSource) -> None:
    old = tmp_path / "out" / "conv1" / "blocks-1.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"a page of version 0.1.0")
    for channels, pages in (("0-39", 2), ("1,7", 1)):
        top = find_top_images(model, photos, TopImagesOptions(stage="conv1", channels=channels, count=2))
        save_top_images(top, tmp_path / "out", data="photos")
        assert len(list((tmp_path / "out" / "conv1").glob("*.png"))) == pages


def test_images_of_an_array_are_copied_as_png(tmp_path: Path, model: Model) -> None:
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (6, 20, 20, 3), dtype=np.uint8)
    np.save(tmp_path / "photos.npy", pixels_NHWC)
    source = open_source(tmp_path / "photos.npy")
    top = find_top_images(model, source, TopImagesOptions(stage="conv1", channels="3", count=10))
    save_top_images(top, tmp_path / "out", data="photos.npy", copies=tmp_path / "copies")
    (folder,) = (tmp_path / "copies" / "conv1").iterdir()
    copies = sorted(folder.iterdir())
    assert len(copies) == 6
    for path, index in zip(copies, top.stages[0].indices_SK[0].tolist(), strict=False):
        with Image.open(path) as copy:
            np.testing.assert_array_equal(np.asarray(copy), pixels_NHWC[index])


def test_a_photo_that_went_away_after_the_search(tmp_path: Path, model: Model, photos: ImageSource) -> None:
    top = find_top_images(model, photos, TopImagesOptions(stage="conv1", channels="0", count=16))
    Path(str(photos.path(0))).unlink()
    (file,) = save_top_images(top, tmp_path / "out", data="photos", copies=tmp_path / "copies")
    (gone,) = (one for one in json.loads(file.read_text())["channels"]["0"] if one["name"] == photos.name(0))
    assert gone["box"] is None
    assert len(list((tmp_path / "copies").rglob("*.png"))) == 15


def test_the_patch_is_cut_from_the_photo_and_framed_in_it() -> None:
    photo_HWC = np.zeros((60, 60, 3), np.uint8)
    photo_HWC[20:40, 30:60] = (0, 200, 0)
    view, part = (0, 0, 60, 60), (30, 20, 60, 40)
    plain = image_tile(photo_HWC, view, part, patch=False)
    pair = image_tile(photo_HWC, view, part, patch=True)
    assert (plain.shape, pair.shape) == ((TILE, TILE, 3), (TILE, 2 * TILE + GAP, 3))
    whole, patch = pair[:, :TILE], pair[:, TILE + GAP :]
    height, pad = round(TILE * 20 / 30), (TILE - round(TILE * 20 / 30)) // 2
    assert (patch[pad : pad + height] == (0, 200, 0)).all()
    assert not (patch[: pad - 1] == (0, 200, 0)).all(2).any()
    changed_y, changed_x = np.nonzero((whole != plain).any(2))
    assert (changed_y.min(), changed_y.max()) == pytest.approx((TILE / 3, TILE * 2 / 3), abs=2)
    assert (changed_x.min(), changed_x.max()) == pytest.approx((TILE / 2, TILE), abs=2)


def test_a_channel_of_many_images_takes_several_rows() -> None:
    tile = image_tile(np.full((20, 20, 3), 90, np.uint8), (0, 0, 20, 20), (5, 5, 10, 10), patch=True)
    short, long = (page_of({1: [(tile, "a")] * count}) for count in (9, 10))
    assert short.width == long.width
    assert long.height > 1.9 * short.height


@pytest.mark.parametrize(
    ("text", "clip", "expected"),
    [
        ("all", False, (0, 1, 2, 3, 4, 5, 6, 7)),
        ("0-3", False, (0, 1, 2, 3)),
        ("5", False, (5,)),
        (" 6, 1 , 5-7", False, (6, 1, 5, 7)),
        ("6-63", True, (6, 7)),
        ("1,99", True, (1,)),
    ],
)
def test_channels(text: str, clip: bool, expected: tuple[int, ...]) -> None:
    assert parse_channels(text, 8, stage="conv1", clip=clip) == expected


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("8", "there is no channel 8; conv1 has 8 channels, 0 to 7"),
        ("0-8", "there is no channel 8"),
        ("3-1", "3-1 runs backwards"),
        ("-1", "should be all, or numbers such as 0-63"),
        ("", "should be all"),
        ("1,,2", "should be all"),
        ("1.5", "should be all"),
        ("²", "should be all"),
        ("every", "conv1 has 8 channels"),
    ],
)
def test_no_such_channels(text: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        parse_channels(text, 8, stage="conv1")


def test_no_channel_is_left_of_a_range() -> None:
    with pytest.raises(InputError, match="channels=9-20 names none; conv1 has 8 channels"):
        parse_channels("9-20", 8, stage="conv1", clip=True)


def test_several_stages_take_the_channels_that_they_have(model: Model, photos: ImageSource) -> None:
    top = find_top_images(model, photos, TopImagesOptions(stage="conv1,conv2", channels="90-120", count=1))
    assert [one.channels for one in top.stages] == [tuple(range(90, 96)), tuple(range(90, 121))]
    with pytest.raises(InputError, match="there is no channel 96; conv1 has 96 channels"):
        find_top_images(model, photos, TopImagesOptions(stage="conv1", channels="90-120"))


def test_wrong_input(tmp_path: Path, model: Model, photos: ImageSource) -> None:
    with pytest.raises(InputError, match="no stage 'conv7'"):
        find_top_images(model, photos, TopImagesOptions(stage="conv7"))
    with pytest.raises(InputError, match="unknown rank 'peek'"):
        TopImagesOptions(rank="peek")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"none of the images can be read; a\.png: not an image: text"):
        find_top_images(model, open_source(tmp_path / "bad"), TopImagesOptions(stage="conv1"))
    with pytest.raises(InputError, match="is not an empty folder"):
        check_new_folder(tmp_path / "bad", "--copies")
    with pytest.raises(InputError, match="is a file or can't be written to"):
        check_new_folder(tmp_path / "bad" / "a.png" / "copies", "--copies")
    top = find_top_images(model, photos, TopImagesOptions(stage="conv1", channels="0", count=1))
    with pytest.raises(InputError, match="is a file; name a folder"):
        save_top_images(top, tmp_path / "bad" / "a.png", data="photos")


def test_names_that_file_systems_refuse() -> None:
    assert file_name('a/b:c*"d".png') == "a__b_c__d_.png"
    assert file_name("x\n\0y.png") == "x__y.png"
    assert len(file_name("ü" * 300 + ".png").encode()) <= 200
    assert file_name("ü" * 300 + ".png").endswith("ü.png")
    assert "/" not in file_name("../../etc/passwd")


def test_activations_that_are_no_numbers(tmp_path: Path, photos: ImageSource) -> None:
    model = make_model(tmp_path / "cache")
    with torch.no_grad():
        model.trunk.features[1].bias[3] = torch.nan  # type: ignore[index]
    with pytest.raises(TrainingError, match="conv1 of untrained:alexnet-small gives activations that are not finite"):
        find_top_images(model, photos, TopImagesOptions(stage="conv1"))
