"""Frozen segmentation: cells against loops over pixels, scikit-learn and permutations; whole evaluations on drawn images."""

import shutil
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models_helper import make_model
from PIL import Image, ImageDraw
from ranks_helper import At, in_ranks
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn
from torch.nn.functional import interpolate, one_hot

from deepcluster.core.distributed import ONE_PROCESS, Ranks, joined
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.options import Checked
from deepcluster.core.work import Work
from deepcluster.evaluation.datasets.masks import open_masks
from deepcluster.evaluation.dense.frozen import clusters as segmentation_clusters
from deepcluster.evaluation.dense.frozen import knn as segmentation_knn
from deepcluster.evaluation.dense.frozen import linear as segmentation_linear
from deepcluster.evaluation.dense.frozen.cells import sample_cells
from deepcluster.evaluation.dense.frozen.clusters import match, merged
from deepcluster.evaluation.dense.frozen.knn import vote
from deepcluster.evaluation.dense.frozen.maps import frozen_maps
from deepcluster.evaluation.dense.frozen.options import (
    SegmentationClustersOptions,
    SegmentationKnnOptions,
    SegmentationLinearOptions,
)
from deepcluster.evaluation.dense.frozen.places import Axis, inside, nearest_cells, shares, upsampled
from deepcluster.evaluation.dense.frozen.predictions import predictions
from deepcluster.evaluation.logistic import fit_logistic
from deepcluster.evaluation.measures.confusion import segmentation_scores
from deepcluster.evaluation.results import Results
from deepcluster.models.archs import make_trunk
from deepcluster.models.geometry import Geometry, geometry
from deepcluster.models.trunk import FEATURES, Trunk
from deepcluster.run.model import Model
from deepcluster.run.resumable import weights_hash

REAL = Path(__file__).parents[2] / "shared" / "data" / "voc-from-coco"
COLOURS = {0: (40, 40, 40), 1: (220, 30, 30), 2: (30, 220, 30), 3: (30, 30, 220)}
LINEAR, KNN, CLUSTERS = segmentation_linear, segmentation_knn, segmentation_clusters
SMALL: dict[Any, Checked] = {
    LINEAR: SegmentationLinearOptions(side=48, cells=4_000, stages="conv1,conv2"),
    KNN: SegmentationKnnOptions(side=48, memory=4_000, stages="conv1,conv2", k=5),
    CLUSTERS: SegmentationClustersOptions(side=48, cells=4_000, stages="conv1,conv2", overclusters=20, runs=2),
}


class Pixels(Trunk):
    """A trunk whose first stage is the image itself; of one size only, if one is given."""

    def __init__(self, only: int = 0, stages: tuple[str, ...] = ("image", FEATURES)) -> None:
        super().__init__()
        self.arch, self.dim, self.sobel, self.only = "pixels", 3, None, only
        self.stages, self.embed_stage = stages, FEATURES
        if only:
            self.image_size = only
        self.same = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.same.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.same(x_BCHW).mean((2, 3))

    def walk(self, x_BCHW: Tensor) -> Iterator[tuple[str, Tensor]]:
        if self.only and tuple(x_BCHW.shape[2:]) != (self.only, self.only):
            raise RuntimeError("another size")
        maps = {"image": self.same(x_BCHW), FEATURES: self.same(x_BCHW).mean((2, 3), keepdim=True)}
        yield from ((name, maps[name]) for name in self.stages)

    def convolutions(self) -> nn.Module:
        return self.same


def write_drawn(root: Path, *, seed: int = 0, train: int = 8, val: int = 6, size: tuple[int, int] = (48, 40)) -> Path:
    """A VOC folder of coloured rectangles, one class per colour, on grey; masks have a border of 255 around the image."""
    folder, rng = root / "VOC2012", np.random.default_rng(seed)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    names = [f"{number:03}" for number in range(train + val)]
    for number, name in enumerate(names):
        width, height = size if number % 2 else size[::-1]
        image, mask = Image.new("RGB", (width, height), COLOURS[0]), Image.new("L", (width, height))
        for place, kind in enumerate(rng.permutation([1, 2, 3])[:2]):
            left, top = int(rng.integers(1, 6)) + place * (width // 2 - 2), int(rng.integers(2, height - 24))
            box = (left, top, left + width // 2 - 6, top + 20)
            ImageDraw.Draw(image).rectangle(box, fill=COLOURS[int(kind)])
            ImageDraw.Draw(mask).rectangle(box, fill=int(kind))
        ImageDraw.Draw(mask).rectangle((0, 0, width - 1, height - 1), outline=255)
        noisy = np.array(image) + rng.integers(0, 12, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noisy).save(folder / "JPEGImages" / f"{name}.jpg", quality=98, subsampling=0)
        mask.save(folder / "SegmentationClass" / f"{name}.png")
    lists = folder / "ImageSets/Segmentation"
    (lists / "train.txt").write_text("\n".join(names[:train]))
    (lists / "val.txt").write_text("\n".join(names[train:]))
    return root


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawn(tmp_path_factory.mktemp("drawn"))


def whole(values_CIJ: Tensor, pair: tuple[Axis, Axis]) -> Tensor:
    return torch.cat([*upsampled(values_CIJ.permute(1, 2, 0), pair)]).permute(2, 0, 1)


axes = st.builds(
    lambda stride, offset, cells, pixels, scaled: Axis(Geometry(stride, offset), cells, pixels, scaled),
    st.integers(1, 9),
    st.sampled_from([0.0, 0.5, 2.0, 3.5, 7.0]),
    st.integers(1, 5),
    st.integers(1, 24),
    st.integers(1, 40),
)


@given(st.tuples(axes, axes), st.integers(0, 2**32 - 1))
def test_classes_of_cells_are_those_of_a_loop_over_pixels(pair: tuple[Axis, Axis], seed: int) -> None:
    """A pixel counts by the part of its area that is within half a stride of the centre of the cell."""
    rng = np.random.default_rng(seed)
    mask = rng.choice([0, 1, 2, 255], (pair[0].pixels, pair[1].pixels)).astype(np.uint8)
    found = shares(mask, pair, 3)
    within = inside(pair)
    for cell in range(pair[0].cells * pair[1].cells):
        areas, whole = np.zeros(3), 0.0
        for row, column in np.ndindex(mask.shape):
            part = 1.0
            for axis, number, pixel in zip(pair, divmod(cell, pair[1].cells), (row, column), strict=True):
                ratio = axis.scaled / axis.pixels
                centre = (axis.geometry.offset + axis.geometry.stride * number + 0.5) / ratio
                half = axis.geometry.stride / ratio / 2
                part *= max(0.0, min(pixel + 1, centre + half) - max(pixel, centre - half))
            whole += part
            if mask[row, column] != 255:
                areas[mask[row, column]] += part
        least = 1e-3 * np.prod([axis.geometry.stride * axis.pixels / axis.scaled for axis in pair])
        if abs(areas.sum() - least) > 1e-9:
            expected = areas / areas.sum() if areas.sum() > least else np.zeros(3)
            np.testing.assert_allclose(found[cell], expected, atol=1e-5)
        assert whole == 0 or bool(within[cell]) or whole < 0.1


@given(st.tuples(axes, axes), st.integers(0, 2**32 - 1))
def test_pixels_between_cells_are_those_of_a_loop(pair: tuple[Axis, Axis], seed: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).normal(size=(2, pair[0].cells, pair[1].cells)))
    positions = []
    for axis in pair:
        centres = [axis.geometry.centre(number) for number in range(axis.cells)]
        places = [(pixel + 0.5) * axis.scaled / axis.pixels - 0.5 for pixel in range(axis.pixels)]
        positions.append((centres, places))
    found, cells = whole(values, pair), nearest_cells(pair)
    assert found.shape == (2, pair[0].pixels, pair[1].pixels)
    (rows, down), (columns, across) = positions
    for channel in range(2):
        lines = np.stack([np.interp(across, columns, values[channel, row]) for row in range(len(rows))])
        expected = np.stack([np.interp(down, rows, line) for line in lines.T]).T
        np.testing.assert_allclose(found[channel], expected, atol=1e-9)
    for row, column in np.ndindex(*cells.shape):
        number = divmod(int(cells[row, column]), len(columns))
        for (centres, places), at, chosen in zip(positions, (row, column), number, strict=True):
            distances = np.abs(np.array(centres) - places[at])
            assert distances[chosen] <= distances.min() + 1e-9


def test_cells_of_a_whole_grid_are_interpolated_as_by_torch() -> None:
    values = torch.randn(3, 4, 5, dtype=torch.float64)
    pair = Axis(Geometry(8, 3.5), 4, 32, 32), Axis(Geometry(8, 3.5), 5, 40, 40)
    expected = interpolate(values[None], size=(32, 40), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(whole(values, pair), expected)


def test_a_cell_of_alexnet_is_brightest_at_the_centre_of_its_receptive_field() -> None:
    place = geometry(make_trunk("alexnet", image_size=224, sobel=True), "conv5")
    lit = torch.zeros(1, 13, 13)
    lit[0, 2, 5] = 1
    image = whole(lit, (Axis(place, 13, 224, 224), Axis(place, 13, 224, 224)))[0]
    assert divmod(int(image.argmax()), 224) == (15 + 16 * 2, 15 + 16 * 5)
    assert float(image.max()) == 1.0 and float(image[15 + 16 * 2 + 8, 15 + 16 * 5]) == 0.5


def test_a_map_that_is_the_image_gives_the_image(drawn: Path, tmp_path: Path) -> None:
    """Cells are pixels, so their classes are the mask, and their values at the pixels are those of the image."""
    model = make_model(tmp_path, trunk=Pixels(), workers=0)
    frozen, test = frozen_maps(model, "image", 48), open_masks(drawn).test
    faults: dict[int, str] = {}
    count = 0
    for images in frozen.images(test, range(len(test)), faults, lambda _: None):
        for image in images:
            pair, map_CHW = image.axes["image"], image.maps["image"]
            assert map_CHW.shape[1:] == image.mask_HW.shape
            assert torch.equal(whole(map_CHW, pair), map_CHW)
            found, mask = shares(image.mask_HW.numpy(), pair, 21), image.mask_HW.flatten().long()
            assert torch.equal(found[mask != 255], one_hot(mask[mask != 255], 21).float())
            assert not found[mask == 255].any()
            scores = one_hot(mask.clamp(max=20), 21).float()
            [classes] = predictions([image], "image", lambda stage, rows, scores=scores: scores)
            assert torch.equal(classes.flatten()[mask != 255], mask[mask != 255])
            count += 1
    assert count == len(test) and not faults


def test_soft_classes_are_fitted_as_by_scikit_learn() -> None:
    """Each cell is there once for each class, weighted by its share."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(120, 4)) * [1, 2, 0.5, 3]
    parts = rng.dirichlet([0.5] * 3, 120).astype(np.float32)
    found = fit_logistic(torch.from_numpy(rows), torch.from_numpy(parts), 3, seed=0, l2=0.05)
    scaled = (rows - rows.mean(0)) / rows.std(0)
    oracle = LogisticRegression(C=1 / (0.05 * 120), tol=1e-8, max_iter=1000)
    oracle.fit(np.repeat(scaled, 3, 0), np.tile(range(3), 120), sample_weight=parts.flatten())
    ours = found.scores(torch.from_numpy(rows)).softmax(1)
    np.testing.assert_allclose(ours, oracle.predict_proba(scaled), atol=2e-3)


def test_votes_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    memory, rows = rng.normal(size=(300, 6)).astype(np.float32), rng.normal(size=(50, 6)).astype(np.float32)
    labels = rng.integers(4, size=300)
    oracle = KNeighborsClassifier(30, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.02))
    oracle.fit(memory.astype(np.float64), labels)
    table = one_hot(torch.from_numpy(labels), 4).float()
    found = vote(torch.from_numpy(rows), torch.from_numpy(memory), table, k=30, temperature=0.02)
    np.testing.assert_allclose(found, oracle.predict_proba(rows.astype(np.float64)), atol=2e-4)


def test_blocks_of_votes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory, rows, table = torch.randn(50, 4), torch.randn(33, 4), torch.rand(50, 3)
    expected = vote(rows, memory, table, k=7, temperature=0.1)
    monkeypatch.setattr(segmentation_knn, "BLOCK_NUMBERS", 50)
    torch.testing.assert_close(vote(rows, memory, table, k=7, temperature=0.1), expected)


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_the_matching_is_the_best_of_all_permutations(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = torch.zeros(k, 7, dtype=torch.int64)
    shown = np.sort(rng.permutation(7)[:k])
    pixels[:, shown] = torch.from_numpy(rng.integers(0, 50, (k, k)) + np.eye(k, dtype=np.int64))
    found = match(pixels)
    assert sorted(found.tolist()) == shown.tolist()
    best = max(sum(int(pixels[row, one]) for row, one in enumerate(order)) for order in permutations(shown.tolist()))
    matrix = merged(pixels, found)
    assert int(matrix.diag().sum()) == best and int(matrix.sum()) == int(pixels.sum())
    for cluster, truth in np.ndindex(k, 7):
        matrix[truth, found[cluster]] -= pixels[cluster, truth]
    assert not matrix.any()


def evaluate(protocol: Any, data: Path, cache: Path, **settings: Any) -> Results:
    found: Results = protocol.evaluate(make_model(cache, workers=0, **settings), data, SMALL[protocol])
    return found


def shuffled_masks(data: Path, to: Path) -> Path:
    """The same images, each with the mask of another."""
    shutil.copytree(data, to)
    for part in ("train", "val"):
        names = (to / f"VOC2012/ImageSets/Segmentation/{part}.txt").read_text().split()
        for parity in (0, 1):  # Images of one shape have masks of that shape.
            files = [to / f"VOC2012/SegmentationClass/{name}.png" for name in names[parity::2]]
            contents = [file.read_bytes() for file in files]
            for file, content in zip(files, contents[1:] + contents[:1], strict=True):
                file.write_bytes(content)
    return to


def test_colours_are_told_apart_without_training(drawn: Path, tmp_path: Path) -> None:
    """By pixels exactly; by the first stages of a random trunk nearly; not where the masks are those of other images."""
    model = make_model(tmp_path, trunk=Pixels(), workers=0)
    before = weights_hash(model.trunk)
    exact = {
        LINEAR: SegmentationLinearOptions(side=48, cells=2_000),
        KNN: SegmentationKnnOptions(side=48, memory=2_000, stages="image", k=5),
        CLUSTERS: SegmentationClustersOptions(side=48, cells=2_000, overclusters=20, runs=2),
    }
    others = shuffled_masks(drawn, tmp_path / "shuffled")
    for protocol, options in exact.items():
        found = protocol.evaluate(model, drawn, options)
        assert found.best() > 0.97, protocol.NAME
        assert protocol is CLUSTERS or protocol.evaluate(model, others, options).best() < 0.6
        assert found.headline == ("mIoU", "image")
        assert set(found.results["IoU"]) == {"background", "aeroplane", "bicycle", "bird"}
        assert len(found.pictures) == 6 and all(one.width > 480 for one in found.pictures.values())
    assert weights_hash(model.trunk) == before
    whitened = SegmentationClustersOptions(side=48, cells=2_000, overclusters=20, runs=1, pca=2)
    assert CLUSTERS.evaluate(model, drawn, whitened).results["overclustering mIoU"]["image"] > 0.6
    for protocol in (LINEAR, KNN):
        assert evaluate(protocol, drawn, tmp_path).best() > 0.85
    assert not [*(tmp_path / "unfinished").iterdir()]


@pytest.mark.parametrize("protocol", SMALL, ids=lambda one: one.NAME)
def test_workers_and_a_stop_change_nothing(protocol: Any, drawn: Path, tmp_path: Path) -> None:
    expected = evaluate(protocol, drawn, tmp_path / "whole")
    stops = 0
    for what, call in (("cells", 1), ("fitting", 3), ("k-means", 2), ("testing", 1), ("counting", 1), ("none", 1)):
        model = make_model(tmp_path / "stopped", workers=2, reporter=At(what, call))
        with model.work.interruption.listening():
            try:
                found = protocol.evaluate(model, drawn, SMALL[protocol])
            except Interrupted:
                stops += 1
    assert stops == {LINEAR: 3, KNN: 2, CLUSTERS: 3}[protocol]
    assert found.as_dict() == expected.as_dict()


def in_a_rank(data: Path, out: Path) -> None:
    with joined() as ranks:
        for protocol, options in SMALL.items():
            made = protocol.prepare(model_with(ranks, out / "cache"), data, options)
            assert made
    (out / f"done-{ranks.rank}").touch()


def model_with(ranks: Ranks, cache: Path) -> Model:
    model = make_model(cache, workers=0)
    object.__setattr__(model, "work", Work(ranks=ranks))
    return model


@pytest.mark.slow
def test_two_ranks_do_what_one_does(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_ranks(2, tmp_path / "store", in_a_rank, drawn, tmp_path)
    assert (tmp_path / "done-0").exists() and (tmp_path / "done-1").exists()
    together = {one: evaluate(one, drawn, tmp_path / "cache").as_dict() for one in SMALL}
    assert together == {one: evaluate(one, drawn, tmp_path / "alone").as_dict() for one in SMALL}
    assert ONE_PROCESS.size == 1


def test_the_sample_is_of_all_images_and_has_its_size(drawn: Path, tmp_path: Path) -> None:
    frozen, train = frozen_maps(make_model(tmp_path, workers=0), "conv1,conv3", 48), open_masks(drawn).train
    sample = sample_cells(frozen, train, 80, seed=3, what="cells")
    for stage in frozen.stages:
        cells = sample.at(stage)
        assert torch.bincount(cells.image_N).tolist() == [10] * 8
        torch.testing.assert_close(cells.shares_NC.sum(1), torch.ones(80))
    other = sample_cells(frozen, train, 80, seed=4, what="cells")
    assert not torch.equal(other.at("conv1").rows_ND, sample.at("conv1").rows_ND)
    masks = [train.read_mask(index) for index in range(len(train))]
    assert sample.pixels_C.tolist() == [sum(int((mask == one).sum()) for mask in masks) for one in range(21)]


@pytest.mark.parametrize(
    ("trunk", "side", "sizes"),
    [
        (Pixels(), 24, {(48, 40): (24, 20), (40, 48): (20, 24), (96, 1): (24, 1)}),
        (Pixels(only=16), None, {(48, 40): (16, 16), (16, 16): (16, 16)}),
        ("timm:vit_tiny_patch16_224,patch_size=8", 40, {(48, 40): (40, 32), (100, 9): (40, 8)}),
    ],
    ids=["any size", "one size", "multiples"],
)
def test_images_are_scaled_to_what_the_trunk_takes(
    trunk: Any, side: int | None, sizes: dict[tuple[int, int], tuple[int, int]], tmp_path: Path
) -> None:
    named = {"arch": trunk} if isinstance(trunk, str) else {"trunk": trunk}
    frozen = frozen_maps(make_model(tmp_path, **named), "all", side)
    assert {size: frozen.scaling.size(*size) for size in sizes} == sizes
    if side is None:
        assert "16 x 16" in frozen.notes[0]
        with pytest.raises(InputError, match="16 px only"):
            frozen_maps(frozen.model, "all", 32)


def test_a_transformer_can_be_evaluated(drawn: Path, tmp_path: Path) -> None:
    options = SegmentationKnnOptions(memory=500, k=3)
    model = make_model(tmp_path, arch="timm:vit_tiny_patch16_224,patch_size=4", workers=0)
    found = segmentation_knn.evaluate(model, drawn, options)
    assert found.settings["stages"] == ["blocks.9", "blocks.10", "blocks.11"]
    assert found.settings["strides"] == dict.fromkeys(found.settings["stages"], 4)
    assert found.settings["side"] == 32


def test_unreadable_images_are_named(tmp_path: Path) -> None:
    data = write_drawn(tmp_path / "data", train=12, val=2)
    (data / "VOC2012/JPEGImages/003.jpg").write_bytes(b"\xff\xd8\xff nothing")
    found = evaluate(KNN, data, tmp_path / "cache")
    assert any("003.jpg" in note for note in found.notes)
    for name in ("000", "001"):
        (data / f"VOC2012/JPEGImages/{name}.jpg").write_bytes(b"")
    with pytest.raises(InputError, match=r"3 of 12 images of VOC2012 train can't be read, such as 000.jpg"):
        evaluate(KNN, data, tmp_path / "cache")


def test_what_can_not_be_done_is_told(drawn: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path, workers=0)
    with pytest.raises(InputError, match=r"features.*conv1"):
        frozen_maps(model, FEATURES, None)
    with pytest.raises(InputError, match="no stage of pixels has a map"):
        frozen_maps(make_model(tmp_path, trunk=Pixels(stages=(FEATURES,))), "all", None)
    with pytest.raises(InputError, match=r"--side 5: .* too small for alexnet-small; use 7"):
        frozen_maps(model, "conv5", 5)
    with pytest.raises(InputError, match=r"k=100 neighbours are more than the 80 cells of conv1; use --k 80"):
        segmentation_knn.prepare(model, drawn, SegmentationKnnOptions(memory=80, k=100, stages="conv1"))
    with pytest.raises(InputError, match=r"4 clusters, one per class, are more than the .* cells of conv5"):
        tiny = write_drawn(tmp_path / "tiny", train=1, val=2, size=(30, 28))
        segmentation_clusters.prepare(model, tiny, SegmentationClustersOptions(side=8, cells=2, stages="conv5"))
    with pytest.raises(InputError, match="no masks"):
        segmentation_linear.prepare(model, tmp_path / "cache", SegmentationLinearOptions())
    shutil.rmtree(tiny / "VOC2012/SegmentationClass")
    with pytest.raises(InputError, match="masks"):
        segmentation_linear.prepare(model, tiny, SegmentationLinearOptions())


def test_images_narrower_than_the_trunk_takes_get_a_margin(tmp_path: Path) -> None:
    """AlexNet needs 31 px; cells whose square lies in the margin are neither learned nor clustered."""
    data = write_drawn(tmp_path / "data", size=(120, 30))
    frozen = frozen_maps(make_model(tmp_path, arch="alexnet", image_size=80, workers=0), "conv2,conv5", 120)
    train = open_masks(data).train
    [[image, *_]] = [*frozen.images(train, [0], {}, lambda _: None)][:1]
    assert image.mask_HW.shape == (120, 30) and image.maps["conv2"].shape[1:] == (14, 3)
    narrow = next(frozen_maps(frozen.model, "conv2,conv5", 40).images(train, [0], {}, lambda _: None))[0]
    assert narrow.axes["conv2"][1].scaled == 10 and narrow.maps["conv2"].shape[1:] == (4, 3)
    assert inside(narrow.axes["conv2"]).view(4, 3).all(0).tolist() == [True, False, False]
    with pytest.raises(InputError, match=r"too small for alexnet; use 31"):
        frozen_maps(frozen.model, "conv5", 30)


@pytest.mark.skipif(not REAL.is_dir(), reason="no shared data")
def test_real_masks(tmp_path: Path) -> None:
    options = SegmentationClustersOptions(side=32, cells=2_000, stages="conv2", overclusters=30, runs=1, lists="test")
    found = segmentation_clusters.evaluate(make_model(tmp_path), REAL, options)
    assert found.settings["clusters"] == 19 and found.data["test_images"] == 49
    assert 0.0 < found.best() < 0.3 and "cow, sheep" in " ".join(found.notes)
    assert segmentation_scores(torch.eye(2, dtype=torch.int64), ("a", "b")).miou == 1.0
