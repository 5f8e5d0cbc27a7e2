"""Fine-tuning for segmentation: whole runs on drawn images, stopped and resumed, on ranks, and on bad input."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_helper import make_model
from PIL import Image
from ranks_helper import At, in_ranks
from torch import Tensor

from deepcluster.core.distributed import joined
from deepcluster.core.errors import InputError, Interrupted
from deepcluster.core.work import Work
from deepcluster.evaluation import protocols
from deepcluster.evaluation.datasets.masks import open_masks
from deepcluster.evaluation.dense.segmentation import voc12 as voc12_segmentation
from deepcluster.evaluation.dense.segmentation.options import VOC12, Voc12SegmentationOptions
from deepcluster.evaluation.dense.segmentation.protocol import train_and_test
from deepcluster.evaluation.dense.segmentation.task import Task, samples_of
from deepcluster.evaluation.dense.segmentation.training import make_network, pixel_loss, schedule_of, train
from deepcluster.evaluation.dense.segmentation.views import Scale, TrainingCrop, WholeImage
from deepcluster.evaluation.dense.segmentation.voc12 import NAME, task_of
from deepcluster.evaluation.measures.confusion import segmentation_scores
from deepcluster.evaluation.results import tables_of
from deepcluster.interop.loading import loaded, new_interruption
from deepcluster.run.model import Model
from deepcluster.run.resumable import weights_hash

COLOURS = {0: (60, 60, 70), 3: (40, 60, 220), 8: (220, 50, 40), 12: (40, 200, 60)}
TINY: dict[str, Any] = {"short_side": 32, "batch_size": 4, "steps": 8, "lr": 0.02}


def write_masks(root: Path, lists: dict[str, int], *, side: int = 40, seed: int = 0) -> Path:
    """A VOC devkit of drawn images: a rectangle of a bird, a cat or a dog each, with a border that does not count."""
    rng, devkit = np.random.default_rng(seed), root / "VOCdevkit" / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (devkit / part).mkdir(parents=True)
    for name, count in lists.items():
        (devkit / "ImageSets" / "Segmentation" / f"{name}.txt").write_text(
            "".join(f"{name}_{number}\n" for number in range(count))
        )
        for number in range(count):
            mask = np.zeros((side - 8 * (number % 2), side), np.uint8)
            top, left = rng.integers(2, 10, 2)
            mask[top : top + 17, left : left + 21] = 255
            mask[top + 1 : top + 16, left + 1 : left + 20] = (3, 8, 12)[number % 3]
            palette = np.zeros((256, 3))
            for one, colour in COLOURS.items():
                palette[one] = colour
            pixels = np.clip(palette[np.where(mask == 255, 0, mask)] + rng.normal(0, 12, (*mask.shape, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(devkit / "JPEGImages" / f"{name}_{number}.jpg", quality=95)
            Image.fromarray(mask).save(devkit / "SegmentationClass" / f"{name}_{number}.png")
    return root


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_masks(tmp_path_factory.mktemp("voc"), {"train": 9, "val": 5})


def test_samples_can_be_sent_to_workers_that_are_not_forked(devkit: Path) -> None:
    samples = samples_of(open_masks(devkit).train, TrainingCrop(Scale(32, 128), 32))
    one, again = samples.sample(2, 5), pickle.loads(pickle.dumps(samples)).sample(2, 5)
    assert torch.equal(one.image_CHW, again.image_CHW)
    assert torch.equal(one.target["mask"], again.target["mask"])


def test_a_whole_run(devkit: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache", workers=0)
    before = weights_hash(model.trunk)
    found = protocols.evaluate(NAME, model, devkit, out=tmp_path / "out", **TINY)
    assert weights_hash(model.trunk) == before, "a copy is trained"
    results = found.results
    assert results.data | {} == {
        "train": "VOC2012 train",
        "test": "VOC2012 val",
        "train_images": 9,
        "test_images": 5,
        "classes": 21,
    }
    assert (results.settings["recipe"], results.settings["crop"], results.settings["schedule"]) == ("fcn-d8", 32, "poly")
    ious: Any = results.results["IoU"]
    assert results.best() == pytest.approx(sum(ious.values()) / len(ious))
    assert {"background", "bird", "cat", "dog"} <= ious.keys()
    assert 0 < results.results["pixel accuracy"] <= 1  # type: ignore[operator]
    assert any(note.startswith("no image to test on shows aeroplane, bicycle, boat") for note in results.notes)
    written = json.loads((tmp_path / "out" / f"{NAME}.json").read_text())
    assert written["results"]["mIoU"] == results.best()
    assert "mIoU" in tables_of(results.results)[0].render()
    assert not [*(tmp_path / "cache" / "unfinished").glob("*")], "what was kept is deleted"
    pictures = sorted((tmp_path / "out" / NAME).glob("*.png"))
    assert len(pictures) == 4
    assert all(Image.open(path).width > 40 for path in pictures)


def test_stops_and_resumes_change_nothing(devkit: Path, tmp_path: Path) -> None:
    options = Voc12SegmentationOptions(**TINY)
    whole = voc12_segmentation.prepare(make_model(tmp_path / "whole", workers=0), devkit, options)
    for moment in (("training", 5), ("testing", 2)):
        interruption = new_interruption()
        stopped = make_model(tmp_path / "cache", workers=0, reporter=At(*moment), interruption=interruption)
        with interruption.listening(), pytest.raises(Interrupted):
            voc12_segmentation.prepare(stopped, devkit, options)
    again = voc12_segmentation.prepare(make_model(tmp_path / "cache", workers=1), devkit, options)
    assert weights_hash(again.training.network) == weights_hash(whole.training.network)
    assert torch.equal(again.counts_CC, whole.counts_CC)


# Two images to a step, one of which can't be read in some steps: one process then has none.
PAIRS = Voc12SegmentationOptions(**{**TINY, "batch_size": 2, "steps": 12})


def in_one_of_two(devkit: Path, folder: Path) -> None:
    with joined() as ranks:
        model = loaded("untrained:alexnet-small", device="cpu", workers=0, work=Work(ranks=ranks))
        made = voc12_segmentation.prepare(model, devkit, PAIRS)
        torch.save((made.training.network.state_dict(), made.counts_CC), folder / f"{ranks.rank}.pt")


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    devkit = write_masks(tmp_path / "data", {"train": 12, "val": 2})
    (devkit / "VOCdevkit" / "VOC2012" / "JPEGImages" / "train_3.jpg").write_bytes(b"nothing")
    in_ranks(2, tmp_path / "store", in_one_of_two, devkit, tmp_path)
    (one, counts), (other, other_counts) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(counts, other_counts)
    # The first process goes on alone, and finds everything done.
    model = loaded("untrained:alexnet-small", device="cpu", workers=0)
    kept = voc12_segmentation.prepare(model, devkit, PAIRS)
    assert all(torch.equal(one[name], value) for name, value in kept.training.network.state_dict().items())


def as_if_trained(model: Model) -> None:
    """The statistics of its BatchNorm layers become those of a model that has seen images."""
    for name, value in model.trunk.state_dict().items():
        if name.endswith("num_batches_tracked"):
            value.fill_(7)


@pytest.mark.parametrize("arch", ["alexnet-small", "alexnet"])
def test_frozen_convolutions_keep_weights_and_statistics(devkit: Path, tmp_path: Path, arch: str) -> None:
    model = make_model(tmp_path, workers=0, arch=arch, image_size=64)
    as_if_trained(model)
    options = Voc12SegmentationOptions(finetune="fc6-8", batchnorm="train", **{**TINY, "steps": 2})
    network = train(model, task_of(model, devkit, options))[0].network
    state, before = network.state_dict(), model.trunk.state_dict()
    convolutions = {id(value) for value in model.trunk.convolutions().state_dict(keep_vars=True).values()}
    names = [name for name, value in model.trunk.state_dict(keep_vars=True).items() if id(value) in convolutions]
    assert len(names) > 20
    assert all(torch.equal(state[f"trunk.{name}"], before[name]) for name in names)
    new = make_network(model, task_of(model, devkit, options)).state_dict()
    assert any(not torch.equal(state[name], value) for name, value in new.items()), "something is trained"


def test_frozen_statistics(devkit: Path, tmp_path: Path) -> None:
    """Those of a trained model stay; an untrained one gets those of training images, which do not change with training."""

    def variances(model: Model, steps: int) -> list[Tensor]:
        options = Voc12SegmentationOptions(**{**TINY, "steps": steps, "batchnorm": "frozen"})
        state = train(model, task_of(model, devkit, options))[0].network.state_dict()
        return [value for name, value in state.items() if name.startswith("trunk.") and name.endswith("running_var")]

    untrained, trained = (make_model(tmp_path / name, workers=0) for name in ("one", "other"))
    one, two = variances(untrained, 1), variances(untrained, 3)
    assert all(map(torch.equal, one, two))
    assert all((value != 1).all() for value in one)
    as_if_trained(trained)
    assert all((value == 1).all() for value in variances(trained, 3)), "they are the model's own"


def test_the_loss_is_the_mean_over_the_pixels_with_a_class() -> None:
    generator = torch.Generator().manual_seed(0)
    scores_BCHW = torch.randn(2, 4, 5, 6, generator=generator)
    truth_BHW = torch.randint(0, 4, (2, 5, 6), generator=generator)
    truth_BHW[0, :3] = 255
    naive = [
        -torch.log_softmax(scores_BCHW[b, :, i, j].double(), dim=0)[truth_BHW[b, i, j]]
        for b in range(2)
        for i in range(5)
        for j in range(6)
        if truth_BHW[b, i, j] != 255
    ]
    assert float(pixel_loss(scores_BCHW, truth_BHW)) == pytest.approx(float(torch.stack(naive).mean()), abs=1e-6)
    assert float(pixel_loss(scores_BCHW, torch.full_like(truth_BHW, 255))) == 0


def test_schedules() -> None:
    def factors(recipe: str, **options: Any) -> list[float]:
        schedule = schedule_of(Voc12SegmentationOptions(**options).completed(VOC12[recipe]))
        return [schedule.factor(step) for step in (0, schedule.steps // 3, schedule.steps - 1)]

    assert factors("fcn32") == [1, 1, 1]
    assert factors("fcn32", schedule="thirds") == pytest.approx([1, 0.1, 0.01])
    assert Voc12SegmentationOptions(schedule="thirds").completed(VOC12["fcn32"]).steps == 150_000
    start, third, end = factors("fcn-d8")
    assert (start, third) == (1, pytest.approx(0.99 * (1 - 6666 / 20_000) ** 0.9 + 0.01))
    assert 0.01 < end < 0.011


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"recipe": "fcn32", "crop": 64}, "--crop 64: fcn32 trains on whole images"),
        ({"recipe": "fcn32", "batchnorm": "sync"}, "--batchnorm sync: fcn32 sees one image at a time"),
        ({"recipe": "fcn-d8", "short_side": 0}, "--short-side 0: fcn-d8 trains on crops of resized images"),
        ({"lists": "seg11valid"}, r"seg11valid\.txt does not exist; .* has train\.txt, val\.txt"),
        ({"recipe": "fcn"}, "unknown recipe 'fcn'"),
        ({"steps": 0}, "steps=0 is too small"),
    ],
)
def test_options_that_do_not_go(devkit: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        protocols.evaluate(NAME, make_model(tmp_path, workers=0), devkit, **options)


def test_data_that_can_not_be_used(devkit: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "cache", workers=1)
    boxes = tmp_path / "boxes" / "VOC2012"
    (boxes / "Annotations").mkdir(parents=True)
    with pytest.raises(InputError, match=r"has no masks: .* is a devkit with boxes .* without SegmentationClass"):
        protocols.evaluate(NAME, model, tmp_path / "boxes", **TINY)
    wrong = write_masks(tmp_path / "wrong", {"train": 4, "val": 2})
    Image.new("L", (7, 5)).save(wrong / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "train_2.png")
    with pytest.raises(InputError, match=r"train_2\.png is 7 x 5 pixels") as fault:
        protocols.evaluate(NAME, model, wrong, **TINY)
    assert "Traceback" not in str(fault.value), "it comes from a process that reads images"


def test_crops_that_are_too_small(devkit: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path, workers=0, arch="alexnet", image_size=64)
    with pytest.raises(InputError, match="--crop 8: too small for alexnet; use larger crops"):
        protocols.evaluate(NAME, model, devkit, **{**TINY, "recipe": "fcn-d8", "crop": 8})


FROM_COCO = Path(__file__).parents[2] / "shared" / "data" / "voc-from-coco"


def most_foreground(root: Path, out: Path, *, count: int, side: int) -> Path:
    """A devkit of the images of another one with the largest share of foreground in its list val, the next in train."""
    devkit, made = next(root.rglob("SegmentationClass")).parent, out / "VOC2012"
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (made / part).mkdir(parents=True)
    masks = {
        name: Image.open(devkit / "SegmentationClass" / f"{name}.png").resize((side, side), Image.Resampling.NEAREST)
        for name in (devkit / "ImageSets" / "Segmentation" / "trainval.txt").read_text().split()
    }
    ordered = sorted(masks, key=lambda name: np.isin(np.asarray(masks[name]), (0, 255)).mean())
    for part, names in (("val", ordered[:count]), ("train", ordered[count : 2 * count])):
        (made / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(names))
        for name in names:
            photo = Image.open(devkit / "JPEGImages" / f"{name}.jpg").resize((side, side))
            photo.save(made / "JPEGImages" / f"{name}.jpg", quality=95)
            masks[name].save(made / "SegmentationClass" / f"{name}.png")
    return out


class ByHeart(Task):
    """Trains on the images that it is tested on, as they are."""

    def training_view(self) -> WholeImage:
        return WholeImage(self.scale, mask_too=True)


@pytest.mark.slow
def test_four_images_can_be_learned_by_heart(tmp_path: Path) -> None:
    if FROM_COCO.is_dir():
        data = most_foreground(FROM_COCO, tmp_path / "data", count=4, side=96)
    else:
        data = write_masks(tmp_path / "data", {"train": 4, "val": 4}, side=96)
    model = make_model(tmp_path / "cache", workers=0, arch="resnet18", image_size=96)
    task = task_of(model, data, Voc12SegmentationOptions(short_side=96, steps=150, lr=0.05, batch_size=4))
    parts = replace(task.parts, train=task.parts.test)
    made = train_and_test(model, ByHeart(**{**vars(task), "parts": parts}))
    scores = segmentation_scores(made.counts_CC, task.parts.test.class_names)
    assert scores.miou >= 0.85, scores


def test_a_wrong_mask_of_the_test_is_found_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_masks(tmp_path, {"train": 4, "val": 80})
    wrong = data / "VOCdevkit" / "VOC2012" / "SegmentationClass" / "val_37.png"
    Image.new("L", (12, 10)).save(wrong)
    model = make_model(tmp_path / "cache", workers=0)
    said: list[str] = []
    monkeypatch.setattr(model.work.reporter, "say", said.append)
    with pytest.raises(InputError, match=r"val_37.png is 12 x 10 pixels, its image .*: a mask must have the size"):
        protocols.evaluate(NAME, model, data, **TINY)
    assert said == []
