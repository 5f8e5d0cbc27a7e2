"""The detection protocols on VOC: small runs from end to end on drawn images; what is trained; stop, workers and ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drawn_objects import write_devkit
from models_helper import make_model
from PIL import Image
from ranks_helper import At, in_ranks
from torch import nn

from deepcluster.core.distributed import joined
from deepcluster.core.errors import InputError, Interrupted, TrainingError
from deepcluster.core.work import Work
from deepcluster.evaluation.dense.detection import training as voc_detection
from deepcluster.evaluation.dense.detection import voc07 as voc07_detection
from deepcluster.evaluation.dense.detection import voc0712 as voc0712_detection
from deepcluster.evaluation.dense.detection.voc_options import (
    QUICK,
    QUICK_0712,
    Voc07DetectionOptions,
    Voc0712DetectionOptions,
)
from deepcluster.evaluation.protocols import evaluate
from deepcluster.interop.loading import new_interruption

STEPS = 6
SMALL: dict[str, Any] = {
    **{"steps": STEPS, "batch_size": 2, "lr": 0.01, "warmup": 2, "clip": 10.0, "regions": 8, "test_regions": 50},
    **{"short_sides": (48, 64), "long_side": 96, "test_short_side": 64, "test_long_side": 96},
}
VOC07, VOC0712 = Voc07DetectionOptions(**SMALL), Voc0712DetectionOptions(**SMALL)
DATA = Path(__file__).parents[2] / "shared" / "data" / "voc2012-mini" / "VOCdevkit" / "VOC2012"


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images to train on, of which one has no object, and six to test on."""
    return write_devkit(tmp_path_factory.mktemp("voc") / "VOC2007", {"train": 5, "val": 6}, empty=1)


def everything(tested: voc_detection.Tested) -> list[Any]:
    return [[one.boxes_D4.tolist(), one.scores_D.tolist(), one.labels_D.tolist()] for one in tested.detections]


def test_both_protocols_from_end_to_end(kit: Path, tmp_path: Path) -> None:
    for protocol, measure in (("voc07-detection", "mAP"), ("voc0712-detection", "AP")):
        model = make_model(tmp_path / "cache", workers=0, sobel=True)
        done = evaluate(protocol, model, kit, out=tmp_path / "out", quick=True, **{**SMALL, "steps": 2})
        results = done.results
        assert results.headline == (measure,) and 0 <= results.best() <= 1
        assert (results.data["train_images"], results.data["test_images"], results.data["classes"]) == (5, 6, 3)
        assert results.settings["steps"] == 2 and results.settings["box_head"] == "two new layers"
        assert any("aeroplane" in note for note in results.notes)
        written = json.loads((tmp_path / "out" / f"{protocol}.json").read_text())
        assert written["results"] == results.as_dict()["results"]
        assert len(results.pictures) == 6
        for name in results.pictures:
            with Image.open(tmp_path / "out" / protocol / f"{name}.png") as picture:
                assert picture.width > 480
        assert not [*(tmp_path / "cache" / "unfinished").iterdir()], "nothing is left of the work"


def test_the_settings_are_the_published_ones() -> None:
    paper, moco = Voc07DetectionOptions(), Voc0712DetectionOptions()
    assert (paper.steps, paper.batch_size, paper.lr, paper.weight_decay, paper.regions) == (150_000, 2, 0.001, 5e-4, 128)
    assert paper.drops == (50_000, 100_000) and paper.short_sides == (480, 576, 688, 864, 1200)
    assert (moco.steps, moco.batch_size, moco.lr, moco.weight_decay, moco.regions) == (24_000, 16, 0.02, 1e-4, 512)
    assert (paper.test_regions, moco.test_regions) == (300, 1_000)
    assert moco.drops == (18_000, 22_000) and moco.short_sides == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    assert Voc0712DetectionOptions(steps=1200).drops == (900, 1100)
    assert replace(paper, lr_drops=(7,)).drops == (7,)
    Voc07DetectionOptions(**QUICK), Voc0712DetectionOptions(**QUICK_0712)
    with pytest.raises(InputError, match="long_side=500 must be at least the shorter side, 1200"):
        Voc07DetectionOptions(long_side=500)


def test_biases_or_norms_are_treated_apart() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    network[0].weight.requires_grad_(False)
    options = Voc07DetectionOptions(lr=0.5)
    usual, special = voc_detection.weight_groups(network, options.lr, free_biases=True)
    assert [one.shape for one in special["params"]] == [(4,), (4,), (2,)]  # type: ignore[attr-defined]
    assert (special["lr"], special["weight_decay"], usual["lr"]) == (1.0, 0.0, 0.5)
    usual, special = voc_detection.weight_groups(network, options.lr, free_biases=False)
    assert {id(one) for one in special["params"]} == {id(one) for one in network[1].parameters()}  # type: ignore[attr-defined]
    assert (special["lr"], special["weight_decay"]) == (0.5, 0.0) and len(usual["params"]) == 3  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arch", "options", "frozen"),
    [
        ("alexnet", VOC07, ("features.0.", "features.1.")),
        ("alexnet", replace(VOC07, finetune="fc6-8"), ("features.",)),
        ("resnet18", replace(VOC0712, freeze="body"), ("backbone.",)),
        ("resnet18", VOC0712, ()),
    ],
)
def test_what_is_frozen_stays_as_it_is(
    arch: str, options: Any, frozen: tuple[str, ...], kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    original = voc_detection.make_detector

    def keep(*args: Any, **words: Any) -> Any:
        made.append(original(*args, **words))
        return made[-1]

    monkeypatch.setattr(voc_detection, "make_detector", keep)
    model = make_model(tmp_path, arch=arch, image_size=64, workers=0)
    before = {name: value.clone() for name, value in model.trunk.state_dict().items()}
    module = voc07_detection if isinstance(options, Voc07DetectionOptions) else voc0712_detection
    module.prepare(model, kit, replace(options, steps=2, warmup=0)).done()
    after = made[0].backbone.trunk.state_dict()
    assert after, "the layers of the head have moved"
    for name, value in after.items():
        same = torch.equal(value, before[name])
        statistics = name.split(".")[-1] in ("running_mean", "running_var", "num_batches_tracked")
        is_frozen = name.startswith(frozen) if frozen else False
        if is_frozen or (isinstance(options, Voc07DetectionOptions) and statistics):
            assert same, f"{name} changed"
        elif statistics or (name.endswith("weight") and value.dim() == 4):
            assert not same, f"{name} did not change"
    # The model itself is as it was, and the head was trained.
    assert all(torch.equal(value, before[name]) for name, value in model.trunk.state_dict().items())
    head = made[0].roi_heads.box_head.state_dict()
    prefix = {"alexnet": "classifier.1.weight", "resnet18": "backbone.layer4.0.conv1.weight"}[arch]
    inner = {"alexnet": "layers.0.weight", "resnet18": "layer.0.conv1.weight"}[arch]
    assert not torch.equal(head[inner], before[prefix])


def test_a_stop_and_workers_change_nothing(kit: Path, tmp_path: Path) -> None:
    whole = voc0712_detection.prepare(make_model(tmp_path / "a", workers=0), kit, VOC0712)
    wanted = everything(whole)
    assert sum(len(scores) for _, scores, _ in wanted)
    workers = voc0712_detection.prepare(make_model(tmp_path / "b", workers=2), kit, VOC0712)
    assert everything(workers) == wanted
    again = make_model(tmp_path / "c", workers=0)
    for moment in (("training", 3), ("detecting", 2)):
        interruption = new_interruption()
        stopped = replace(again, work=Work(At(*moment), interruption))
        with interruption.listening(), pytest.raises(Interrupted):
            voc0712_detection.prepare(stopped, kit, VOC0712)
    lines: list[str] = []

    class Listening(At):
        def say(self, line: str) -> None:
            lines.append(line)

    resumed = voc0712_detection.prepare(replace(again, work=Work(Listening("never", 1))), kit, VOC0712)
    assert everything(resumed) == wanted
    assert not any(line.startswith("step ") for line in lines), "the training is over"


def in_two(folder: Path, kit: Path) -> None:
    with joined() as ranks:
        model = replace(make_model(folder / "cache", workers=0), work=Work(ranks=ranks))
        tested = voc0712_detection.prepare(model, kit, VOC0712)
        (folder / f"{ranks.rank}.json").write_text(json.dumps(everything(tested)))


def test_two_ranks_train_together(kit: Path, tmp_path: Path) -> None:
    in_ranks(2, tmp_path / "ranks", in_two, tmp_path, kit)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other and len(one) == 6
    model = make_model(tmp_path / "cache", workers=0)
    results = voc0712_detection.evaluate(model, kit, VOC0712)
    assert results.settings["batchnorm"] == "sync" and 0 <= results.best() <= 1


def test_frozen_statistics_at_a_high_rate_say_what_helps(kit: Path, tmp_path: Path) -> None:
    options = replace(VOC0712, batchnorm="frozen", lr=1e12, clip=0.0, warmup=0)
    with pytest.raises(TrainingError, match=r"became (nan|inf).*BatchNorm are frozen.*--lr 1e\+11, or --batchnorm train"):
        voc0712_detection.prepare(make_model(tmp_path, workers=0), kit, options)


def test_wrong_input_says_what_works(kit: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path, workers=0)
    with pytest.raises(InputError, match=r"no test.txt.*use --split train|use --split train"):
        voc07_detection.prepare(model, kit, replace(VOC07, split="trainval"))
    with pytest.raises(InputError, match="is no VOC devkit: looked for folders"):
        voc0712_detection.prepare(model, tmp_path, VOC0712)
    fixed = make_model(tmp_path, arch="torchvision:vit_b_32", image_size=64, workers=0)
    for module, options in ((voc07_detection, VOC07), (voc0712_detection, VOC0712)):
        with pytest.raises(InputError, match=r"takes images of 64 px only.*resnet18"):
            module.prepare(fixed, kit, options)


def test_regions_of_a_file_are_used_instead_of_a_network(kit: Path, tmp_path: Path) -> None:
    rows = ["image,left,top,right,bottom"]
    for image in sorted((kit / "JPEGImages").iterdir()):
        rows += [
            f"{image.stem},{left},{top},{left + side},{top + side}"
            for left in (0, 25)
            for top in (5, 30)
            for side in (25, 40)
        ]
    file = tmp_path / "regions.csv"
    file.write_text("\n".join(rows))
    model = make_model(tmp_path / "cache", workers=0)
    tested = voc07_detection.prepare(model, kit, replace(VOC07, proposals=str(file)))
    assert sum(len(one.scores_D) for one in tested.detections)
    notes = voc07_detection.evaluate(model, kit, replace(VOC07, proposals=str(file))).notes
    assert not any("selective search" in note for note in notes)
    file.write_text("\n".join(rows[:9]))
    with pytest.raises(InputError, match="has no boxes of 4 of the 5 images of VOC2007 train"):
        voc07_detection.prepare(model, kit, replace(VOC07, proposals=str(file)))


def test_two_devkits_are_joined(tmp_path: Path) -> None:
    for number, name in enumerate(("VOC2007", "VOC2012")):
        lists = {"trainval": 3, "test": 2} if number == 0 else {"trainval": 2}
        write_devkit(tmp_path / "VOCdevkit" / name, lists, seed=number)
    results = voc0712_detection.evaluate(make_model(tmp_path / "cache", workers=0), tmp_path, replace(VOC0712, steps=1))
    assert results.data["train_images"] == 5 and results.data["test_images"] == 2
    assert "trained on VOC2007 trainval + VOC2012 trainval, tested on VOC2007 test" in results.notes


def few_real_images(folder: Path) -> Path:
    """A devkit to train and to test on the same eight images of voc2012-mini; drawn ones where it is absent."""
    names_of = DATA / "ImageSets" / "Main" / "train.txt"
    if not names_of.is_file():
        kit = write_devkit(folder, {"train": 8})
        names = (kit / "ImageSets" / "Main" / "train.txt").read_text()
    else:
        kit = folder
        (kit / "ImageSets" / "Main").mkdir(parents=True)
        for part in ("Annotations", "JPEGImages"):
            (kit / part).symlink_to(DATA / part)
        names = "\n".join(names_of.read_text().split()[:8])
    for name in ("train", "val"):
        (kit / "ImageSets" / "Main" / f"{name}.txt").write_text(names)
    return kit


@pytest.mark.slow
def test_a_detector_learns_eight_images_by_heart(tmp_path: Path) -> None:
    kit = few_real_images(tmp_path / "VOC2012")
    model = make_model(tmp_path / "cache", image_size=64, workers=0)
    options = Voc0712DetectionOptions(
        **{"steps": 500, "batch_size": 2, "lr": 0.02, "lr_drops": (375,), "warmup": 50, "clip": 10.0, "regions": 64},
        **{"short_sides": (128,), "long_side": 256, "test_short_side": 128, "test_long_side": 256},
    )
    results = voc0712_detection.evaluate(model, kit, options)
    assert results.results["AP50"] >= 0.95


def test_a_set_without_objects_and_a_schedule_that_is_too_short(kit: Path, tmp_path: Path) -> None:
    empty = write_devkit(tmp_path / "VOC2007", {"train": 2, "val": 2}, empty=2)
    model, said = make_model(tmp_path, workers=0), list[str]()
    model.work.reporter.say = model.work.reporter.warn = said.append  # type: ignore[method-assign]
    with pytest.raises(
        InputError, match=r"none of 2 images .* has an object of a known class that counts \(VOC2007 train\)"
    ):
        voc07_detection.prepare(model, empty, VOC07)
    assert said == [], "before the training"
    voc07_detection.prepare(model, kit, replace(VOC07, steps=1, warmup=2, lr_drops=(1,)))
    assert "--warmup 2 and --lr-drops 1 reach beyond --steps 1: set them too" in said
