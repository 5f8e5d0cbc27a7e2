"""Frozen features: one pass for many stages, kept by content, whole or not at all."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models_helper import make_model, write_classes
from PIL import Image

from deepcluster.core.device import Machine
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.data.sources import open_source
from deepcluster.data.views import ClusterView
from deepcluster.models.trunk import Trunk, normalise
from deepcluster.run.cache_report import clear, kept
from deepcluster.run.features import Pooled, pool
from deepcluster.run.kept_features import kept_rows, readable
from deepcluster.run.model import Model, data_key

ALL = [Pooled(stage, kind) for stage in ("conv1", "conv4", "features") for kind in ("average", "pooled")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_classes(tmp_path / "images", 6)


class Counted:
    """How many images go through a trunk."""

    def __init__(self, model: Model) -> None:
        self.images = 0
        model.trunk.register_forward_pre_hook(self._count)
        self._walk = model.trunk.walk
        model.trunk.walk = self._counting  # type: ignore[method-assign, assignment]

    def _count(self, module: Trunk, inputs: object) -> None:
        raise AssertionError("stages are taken from `maps`")

    def _counting(self, x_BCHW: torch.Tensor):  # type: ignore[no-untyped-def]
        self.images += len(x_BCHW)
        return self._walk(x_BCHW)


def naive_rows(model: Model, folder: Path, one: Pooled) -> torch.Tensor:
    rows = []
    source = open_source(folder)
    for index in range(len(source)):
        with Image.open(folder / source.name(index)) as image:
            view = ClusterView(model.image_size)([torch.from_numpy(np.array(image.convert("RGB")))])
        with torch.no_grad():
            map_BCHW = model.trunk.stage(normalise(view), one.stage)
        rows.append(pool(map_BCHW) if one.kind == "pooled" else map_BCHW.mean(dim=(2, 3)))
    return torch.cat(rows)


def test_rows_are_those_of_the_trunk_image_by_image(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache")
    made = kept_rows(model, open_source(folder), ALL)
    assert list(made) == ALL
    for one, rows_ND in made.items():
        torch.testing.assert_close(rows_ND, naive_rows(model, folder, one), rtol=1e-4, atol=1e-5)


def test_all_stages_come_from_one_pass_and_the_second_time_from_the_disk(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache")
    counted, source = Counted(model), open_source(folder)
    first = kept_rows(model, source, ALL[:4])
    assert counted.images == len(source) + 1, "and one blank image for the widths"
    again = kept_rows(model, source, ALL[:4])
    assert counted.images == len(source) + 1
    for one in ALL[:4]:
        assert torch.equal(first[one], again[one])
    kept_rows(model, source, ALL)
    assert counted.images == 2 * (len(source) + 1), "what is new is made in one more pass"


def test_what_two_calls_need_at_once_is_extracted_once(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache", workers=0)
    counted, source = Counted(model), open_source(folder)
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda _: kept_rows(model, source, ALL[:2]), range(2))
    assert counted.images - len(source) in (1, 2), "and blank images for the widths"
    assert all(torch.equal(one[name], other[name]) for name in ALL[:2])


def changed_weight(model: Model) -> Model:
    trunk = model.copy_of_trunk()
    with torch.no_grad():
        next(trunk.parameters()).flatten()[0] += 1e-3
    return replace(model, trunk=trunk)


@pytest.mark.parametrize(
    "change",
    [
        changed_weight,
        lambda model: replace(model, settings=replace(model.settings, image_size=24)),
        lambda model: replace(model, settings=replace(model.settings, reduce_to=18)),
        lambda model: replace(model, machine=Machine(torch.device("cpu"), "bf16")),
    ],
    ids=["weight", "image_size", "reduce_to", "precision"],
)
def test_another_model_or_view_is_made_anew(folder: Path, tmp_path: Path, change) -> None:  # type: ignore[no-untyped-def]
    model, source = make_model(tmp_path / "cache"), open_source(folder)
    kept_rows(model, source, ALL[:1])
    other = change(model)
    counted = Counted(other)
    kept_rows(other, source, ALL[:1])
    assert counted.images == len(source) + 1


def test_another_content_under_the_same_name_is_made_anew(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache")
    before = kept_rows(model, open_source(folder), ALL[:1])[ALL[0]].clone()
    Image.new("RGB", (21, 22), "white").save(folder / "class0" / "000.png")
    after = kept_rows(model, open_source(folder), ALL[:1])[ALL[0]]
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1:], after[1:])


def test_names_and_order_are_part_of_the_key(folder: Path) -> None:
    names = [f"{path.parent.name}/{path.name}" for path in sorted(folder.rglob("*.png"))]
    keys = set()
    for number, order in enumerate((names, names[::-1], names[:-1])):
        (folder / f"{number}.txt").write_text("\n".join(order))
        keys.add(data_key(open_source(folder / f"{number}.txt")))
    assert len(keys) == 3


def test_images_that_cannot_be_read_have_no_row(folder: Path, tmp_path: Path) -> None:
    (folder / "class1" / "002.png").write_bytes(b"\x89PNG and no more")
    rows_ND = kept_rows(make_model(tmp_path / "cache"), open_source(folder), ALL[:1])[ALL[0]]
    assert (~readable(rows_ND)).nonzero().flatten().tolist() == [8]
    assert torch.isfinite(rows_ND[readable(rows_ND)]).all()


@pytest.mark.parametrize("images", [{}, {"one.png": b"no image"}], ids=["one", "one unreadable"])
def test_a_single_image_has_features_too(images: dict[str, bytes], tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "images", 1, classes=1)
    if images:
        (folder / "class0" / "000.png").write_bytes(images["one.png"])
    rows_ND = kept_rows(make_model(tmp_path / "cache"), open_source(folder), ALL[:1])[ALL[0]]
    assert readable(rows_ND).tolist() == [not images]


def test_a_stop_keeps_only_finished_parts(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache")
    model.work.interruption.requested = "SIGINT"
    with pytest.raises(Interrupted, match="the same command continues"):
        kept_rows(model, open_source(folder), ALL)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_features_of_any_size_are_kept(scale: float, folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache", machine=Machine(torch.device("cpu"), "bf16"))
    rows = []
    for factor in (1.0, scale):
        with torch.no_grad():
            model.trunk.features[1].weight *= factor  # type: ignore[index, operator, union-attr]
            model.trunk.features[1].bias *= factor  # type: ignore[index, operator, union-attr]
        scaled = make_model(tmp_path / f"{factor}", trunk=model.trunk, machine=model.machine)
        rows.append(kept_rows(scaled, open_source(folder), ALL[:1])[ALL[0]])
    assert rows[1].dtype == torch.bfloat16
    torch.testing.assert_close(rows[1].double() / scale, rows[0].double(), rtol=2**-6, atol=0)


def test_cache_info_and_clear_know_them(folder: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache")
    kept_rows(model, open_source(folder), ALL[:2])
    model.work.interruption.requested = "SIGINT"
    with pytest.raises(Interrupted):
        model.resumable("linear", 1).check(lambda: {"epoch": 3})
    assert {thing.kind: thing.files for thing in kept(tmp_path / "cache")} == {"features": 2, "unfinished": 1}
    assert clear(tmp_path / "cache") > 0
    assert kept(tmp_path / "cache") == []


def test_stages_by_name(tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache")
    assert model.stages("all") == model.trunk.stages
    assert model.stages(" conv1,features") == ("conv1", "features")
    assert model.stages(None, usual="conv2") == ("conv2",)
    with pytest.raises(InputError, match=r"no stage 'conv9' \(did you mean conv.\?\); it has conv1, "):
        model.stages("conv1,conv9")
    with pytest.raises(InputError, match="no stage is named"):
        model.stages(",")


def test_an_unfinished_evaluation_goes_on(tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache")
    unfinished = model.resumable("linear", {"lr": 0.1})
    assert unfinished.load() is None
    unfinished.check(lambda: {"never": 0})
    assert not unfinished.path.exists(), "nothing is due yet"
    model.work.interruption.requested = "SIGTERM"
    with pytest.raises(Interrupted, match="SIGTERM"):
        unfinished.check(lambda: {"epoch": 2, "weights": torch.arange(3.0)})
    state = model.resumable("linear", {"lr": 0.1}).load()
    assert state is not None
    assert (state["epoch"], state["weights"].tolist()) == (2, [0.0, 1.0, 2.0])
    assert model.resumable("linear", {"lr": 0.2}).load() is None, "other settings are another evaluation"
    assert changed_weight(model).resumable("linear", {"lr": 0.1}).load() is None, "and so are other weights"
    unfinished.path.write_bytes(unfinished.path.read_bytes()[:100])
    assert unfinished.load() is None, "damaged: begun anew"
    unfinished.done()
    unfinished.done()
    assert not unfinished.path.exists()
