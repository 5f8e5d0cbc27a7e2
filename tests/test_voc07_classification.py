"""Which weights train, which stay; losses and scores against naive loops; whole runs on a devkit written here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models_helper import make_model
from PIL import Image
from torch import Tensor, nn

from deepcluster.core.errors import InputError, Interrupted, TrainingError
from deepcluster.core.work import Interruption
from deepcluster.data.views import TenCrops, TrainingView, draws
from deepcluster.evaluation.classifier import Classifier, logits_of
from deepcluster.evaluation.datasets.voc import CLASSES, open_voc
from deepcluster.evaluation.options import VocClassificationOptions
from deepcluster.evaluation.voc07_classification import (
    NAME,
    TEST_EPOCH,
    crop_size,
    evaluate,
    fine_tune,
    fully_connected,
    loss_of,
    make_classifier,
    rate,
    reduced,
    score,
)
from deepcluster.models.archs import make_trunk
from deepcluster.run.model import Model
from deepcluster.run.resumable import weights_hash

FROM_COCO = Path(__file__).parents[2] / "shared" / "data" / "voc-from-coco"
COLOURS = {"bird": (200, 40, 40), "cat": (40, 200, 40), "train": (40, 40, 200)}


def write_image(devkit: Path, name: str, objects: dict[str, bool], rng: np.random.Generator, side: int = 48) -> None:
    """A photo in the colour of its first class, and the annotation of its objects (class: difficult or not)."""
    colour = np.array(COLOURS[next(iter(objects))])
    pixels = np.clip(colour + rng.normal(0, 25, (side, side + 8, 3)), 0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(devkit / "JPEGImages" / f"{name}.jpg", quality=92)
    described = "".join(
        f"<object><name>{one}</name><difficult>{int(difficult)}</difficult></object>" for one, difficult in objects.items()
    )
    (devkit / "Annotations" / f"{name}.xml").write_text(f"<annotation>{described}</annotation>")


def write_devkit(folder: Path, *, a_class: int = 6, lists: tuple[str, str] = ("trainval", "test")) -> Path:
    """A devkit of three classes that differ in colour, with some difficult objects; `a_class` images in each list."""
    devkit, rng = folder / "VOCdevkit" / "VOC2007", np.random.default_rng(8)
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (devkit / part).mkdir(parents=True)
    for first, split in enumerate(lists):
        names = []
        for number in range(3 * a_class):
            name = f"{first * 500 + number:06}"
            objects = {list(COLOURS)[number % 3]: False} | ({"person": True} if number % 5 == 0 else {})
            write_image(devkit, name, objects, rng)
            names.append(name)
        (devkit / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


def quick(**changes: Any) -> VocClassificationOptions:
    return VocClassificationOptions(**{"iterations": 4, "batch_size": 4, "lr": 0.05, **changes})


def trained(model: Model, data: Path, options: VocClassificationOptions) -> tuple[dict[str, Tensor], Classifier]:
    """The weights before the training, and the classifier after it."""
    classifier = make_classifier(model.copy_of_trunk(), options)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    fine_tune(model, classifier, open_voc(data).split("trainval"), model.image_size, options)
    return before, classifier


def changed(before: dict[str, Tensor], classifier: nn.Module) -> set[str]:
    return {name for name, value in classifier.state_dict().items() if not torch.equal(value, before[name])}


@pytest.fixture(scope="module")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_devkit(tmp_path_factory.mktemp("voc"))


@pytest.mark.parametrize(
    ("iteration", "expected"), [(0, 0.003), (4_999, 0.003), (5_000, 0.0015), (12_345, 0.00075), (79_999, 0.003 / 2**15)]
)
def test_the_published_rate(iteration: int, expected: float) -> None:
    assert rate(VocClassificationOptions(), iteration) == pytest.approx(expected, rel=1e-12)


def test_the_rate_reaches_the_optimizer(tmp_path: Path, devkit: Path) -> None:
    model, options = make_model(tmp_path), quick(iterations=5, halve_every=2, lr=0.04)
    classifier = make_classifier(model.copy_of_trunk(), options)
    training, _ = fine_tune(model, classifier, open_voc(devkit).split("trainval"), 16, options)
    assert [group["lr"] for group in training.optimizer.param_groups] == [0.01]
    assert training.optimizer.defaults["momentum"] == 0.9
    assert training.optimizer.defaults["weight_decay"] == 1e-6


def test_the_published_settings_are_the_defaults() -> None:
    options = VocClassificationOptions()
    assert (options.iterations, options.halve_every, options.batch_size) == (80_000, 5_000, 16)
    assert (options.lr, options.momentum, options.weight_decay) == (0.003, 0.9, 1e-6)


def test_the_loss_equals_a_naive_loop_and_skips_difficult_ones() -> None:
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(0, 3, (5, 4)), rng.integers(-1, 2, (5, 4))
    assert set(labels.ravel()) == {-1, 0, 1}
    total = 0.0
    for logit, label in zip(logits.ravel(), labels.ravel(), strict=True):
        if label:
            total -= np.log(1 / (1 + np.exp(-logit * label)))
    logits_BC = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    labels_BC = torch.tensor(labels, dtype=torch.int8)
    loss = loss_of(logits_BC, labels_BC)
    assert loss.item() == pytest.approx(total / 5, rel=1e-5)
    loss.backward()
    assert logits_BC.grad is not None
    assert torch.equal(logits_BC.grad == 0, labels_BC == 0)


@pytest.mark.parametrize("finetune", ["all", "fc6-8"])
def test_all_linear_layers_are_made_anew_and_no_convolution(tmp_path: Path, finetune: str) -> None:
    """As the release's script: in both modes; deviation 0.01, biases 0.1; a function of the seed."""
    model = make_model(tmp_path, arch="alexnet", image_size=64)
    classifier, again = (make_classifier(model.copy_of_trunk(), quick(finetune=finetune)) for _ in range(2))
    assert all(torch.equal(one, same) for one, same in zip(classifier.parameters(), again.parameters(), strict=True))
    old = model.trunk.state_dict()
    linear = {name: module for name, module in classifier.named_modules() if isinstance(module, nn.Linear)}
    assert set(linear) == {"trunk.classifier.1", "trunk.classifier.4", "head.linear"}
    for name, module in linear.items():
        assert float(module.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
        assert (module.bias == 0.1).all()
        assert module.weight.requires_grad and module.bias.requires_grad
        assert name == "head.linear" or not torch.equal(module.weight, old[name.removeprefix("trunk.") + ".weight"])
    assert classifier.head.linear.out_features == 20
    for name, value in classifier.trunk.state_dict().items():
        assert name.startswith("classifier.") or torch.equal(value, old[name])


def test_fully_connected_layers_by_architecture() -> None:
    widths = [layer.out_features for layer in fully_connected(make_trunk("alexnet", image_size=64))]
    assert widths == [4096, 4096]
    assert fully_connected(make_trunk("alexnet-small", image_size=16)) == []
    assert fully_connected(make_trunk("resnet18-small", image_size=16)) == []


def test_the_size_of_crops(tmp_path: Path) -> None:
    """Trunks without fully connected layers take any size; AlexNet those whose last map is as wide."""
    model = make_model(tmp_path)
    assert [crop_size(model, asked) for asked in (None, 16, 40)] == [16, 16, 40]
    with pytest.raises(InputError, match="image_size=2 does not fit this alexnet-small, which takes images of 16 px"):
        crop_size(make_model(tmp_path, arch="alexnet-small"), 2)
    model = make_model(tmp_path, arch="alexnet", image_size=64)
    assert crop_size(model, 66) == 66
    with pytest.raises(InputError, match=r"image_size=128 .* alexnet, which takes images of 64 px \(its fully connected"):
        crop_size(model, 128)


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"finetune": "all"}, {"conv", "norm", "linear"}),
        ({"finetune": "fc6-8"}, {"linear"}),
        ({"finetune": "fc6-8", "train_batchnorm": True}, {"norm", "linear"}),
    ],
)
def test_every_tensor_trains_or_stays_as_the_option_says(
    tmp_path: Path, devkit: Path, options: dict[str, Any], kinds: set[str]
) -> None:
    """AlexNet with the Sobel layer: statistics of BatchNorm and the Sobel filters stay in all cases."""

    trunk = make_trunk("alexnet", image_size=64, sobel=True, seed=3).eval()
    model = make_model(tmp_path, arch="alexnet", image_size=64, trunk=trunk)
    before, classifier = trained(model, devkit, quick(iterations=2, **options))
    kind_of = {nn.Conv2d: "conv", nn.BatchNorm2d: "norm", nn.Linear: "linear"}
    expected = {
        f"{name}.{parameter}"
        for name, module in classifier.named_modules()
        if kind_of.get(type(module)) in kinds and ".sobel" not in name
        for parameter, _ in module.named_parameters(recurse=False)
    }
    assert changed(before, classifier) == expected
    assert any("running_mean" in name for name in before)


@pytest.mark.parametrize(("finetune", "trains"), [("all", True), ("fc6-8", False)])
def test_a_network_without_fully_connected_layers(tmp_path: Path, devkit: Path, finetune: str, trains: bool) -> None:
    model = make_model(tmp_path, arch="resnet18-small")
    options = quick(iterations=2, finetune=finetune)
    before, classifier = trained(model, devkit, options)
    new = changed(before, classifier)
    assert {"head.linear.weight", "head.linear.bias"} <= new
    assert ("trunk.backbone.conv1.weight" in new) == trains
    assert trains or new == {"head.linear.weight", "head.linear.bias"}
    assert not any("running" in name or "num_batches" in name for name in new)
    notes = " ".join(evaluate(model, devkit, options).notes)
    assert ("resnet18-small has no fully connected layers: only the linear classifier is trained" in notes) != trains


def test_a_step_is_clipped_at_norm_ten(tmp_path: Path, devkit: Path) -> None:
    """One step of plain SGD at rate 1 can't go further than 10, however steep the loss is."""
    model = make_model(tmp_path)
    with torch.no_grad():
        for weight in model.trunk.parameters():
            weight.mul_(4)
    options = quick(iterations=1, lr=1.0, momentum=0.0, weight_decay=0.0)
    before, classifier = trained(model, devkit, options)
    squares = [(value.detach() - before[name]).double().square().sum() for name, value in classifier.named_parameters()]
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(10, rel=1e-3)


@pytest.mark.parametrize("test_crops", ["random", "fixed"])
def test_scores_equal_a_naive_loop_over_crops(tmp_path: Path, devkit: Path, test_crops: str) -> None:
    """The mean of the logits, not of probabilities, of ten crops."""
    model = make_model(tmp_path)
    classifier = make_classifier(model.copy_of_trunk(), quick())
    source = open_voc(devkit).split("test").source
    scores_NC, unreadable = score(model, classifier, source, 16, quick(test_crops=test_crops, seed=5))
    assert not unreadable
    with model.loader(source, reduce_to=reduced(16, quick())) as loader:
        for index in range(len(source)):
            image_HWC = loader.images.get(index)
            if test_crops == "fixed":
                crops_VCHW = TenCrops(16)([image_HWC], np.empty((1, 0)))[0]
            else:
                view = TrainingView(16, (0.1, 0.5), (1.0, 1.0))
                rows = [draws(5, TEST_EPOCH, index * 10 + crop, 1) for crop in range(10)]
                crops_VCHW = torch.cat([view([image_HWC], row) for row in rows])
            assert crops_VCHW.shape == (10, 3, 16, 16)
            logits_VC = torch.cat([logits_of(classifier, crop[None], model.machine) for crop in crops_VCHW])
            assert torch.allclose(scores_NC[index], logits_VC.double().mean(0), atol=1e-6)


def test_crops_of_the_test_differ_from_each_other_and_by_seed(tmp_path: Path, devkit: Path) -> None:
    model = make_model(tmp_path)
    classifier = make_classifier(model.copy_of_trunk(), quick())
    source = open_voc(devkit).split("test").source
    one, again, other = (score(model, classifier, source, 16, quick(seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_photos_are_kept_as_large_as_the_smallest_crop_needs() -> None:
    """A tenth of the area of a square of 709 px is a square of 224 px: photos of VOC, 500 px long, stay as they are."""
    assert reduced(224, VocClassificationOptions()) == 709
    assert reduced(224, VocClassificationOptions()) * 0.1**0.5 >= 224


@pytest.mark.parametrize("test_crops", ["random", "fixed"])
def test_learns_classes_of_a_colour(tmp_path: Path, devkit: Path, test_crops: str) -> None:
    model = make_model(tmp_path)
    weights = weights_hash(model.trunk)
    results = evaluate(model, devkit, quick(iterations=30, batch_size=9, lr=0.02, test_crops=test_crops))
    assert results.protocol == NAME
    assert results.best() > 0.97
    of_11_points = results.results["mAP 11 points"]
    assert isinstance(of_11_points, float) and of_11_points > 0.97
    by_class = results.results["AP"]
    assert isinstance(by_class, dict) and set(by_class) == set(COLOURS)
    assert results.best() == pytest.approx(np.mean(list(by_class.values())))
    assert results.data["train_images"] == results.data["test_images"] == 18
    assert results.settings["image_size"] == 16
    assert results.settings["finetune"] == "all"
    json.dumps([dict(results.results), dict(results.settings), dict(results.data)])
    assert weights_hash(model.trunk) == weights and not model.trunk.training


def test_train_set_adds_map_on_the_images_trained_on_and_changes_nothing_else(tmp_path: Path, devkit: Path) -> None:
    plain = evaluate(make_model(tmp_path / "a"), devkit, quick(iterations=30, batch_size=9, lr=0.02))
    both = evaluate(make_model(tmp_path / "b"), devkit, quick(iterations=30, batch_size=9, lr=0.02, train_set=True))
    again, by_class = both.results["train mAP"], both.results["train AP"]
    assert isinstance(again, float) and again > 0.97 and isinstance(by_class, dict) and set(by_class) == set(COLOURS)
    assert {name: value for name, value in both.results.items() if not name.startswith("train")} == plain.results


def test_the_share_of_the_image_that_a_crop_shows(tmp_path: Path, devkit: Path) -> None:
    """Crops of the whole image differ by their flip only: the mean over ten of them lies between two scores."""
    model = make_model(tmp_path)
    source, whole = open_voc(devkit).split("test").source, quick(crop_scale=(1.0, 1.0))
    assert reduced(16, whole) == 16
    classifier = make_classifier(model.copy_of_trunk(), whole).eval()
    scores_NC, _ = score(model, classifier, source, 16, whole)
    view = TrainingView(16, (1.0, 1.0), (1.0, 1.0), flip=False)
    with model.loader(source, reduce_to=16) as loader:
        upright = next(loader.training_views(view, torch.arange(1), 1, seed=0, epoch=0)).images_BCHW
    two = torch.stack([logits_of(classifier, one, model.machine)[0].double() for one in (upright, upright.flip(3))])
    low, high = two.amin(0) - 1e-5, two.amax(0) + 1e-5
    assert ((scores_NC[0] >= low) & (scores_NC[0] <= high)).all()


@pytest.mark.parametrize("scale", [(0.5, 0.1), (0.0, 0.5), (0.5, 1.5)])
def test_shares_that_no_crop_can_have(scale: tuple[float, float]) -> None:
    with pytest.raises(InputError, match=r"crop_scale=.* must be two shares"):
        quick(crop_scale=scale)


def test_difficult_objects_count_nowhere(tmp_path: Path, devkit: Path) -> None:
    """Where all images show difficult persons alone, the row of the head for persons never moves, and is not tested."""
    data = write_devkit(tmp_path / "data", a_class=2)
    difficult = "<object><name>person</name><difficult>1</difficult></object></annotation>"
    for file in (data / "VOCdevkit" / "VOC2007" / "Annotations").iterdir():
        file.write_text(file.read_text().replace("</annotation>", difficult))
    person, options = CLASSES.index("person"), quick(weight_decay=0.0)
    before, classifier = trained(make_model(tmp_path / "a"), data, options)
    head = classifier.head.linear
    moved_C = (head.weight != before["head.linear.weight"]).any(dim=1) | (head.bias != before["head.linear.bias"])
    assert [not moves for moves in moved_C.tolist()] == [number == person for number in range(20)]
    results = evaluate(make_model(tmp_path / "b"), data, options)
    assert any("person" in note and "left out of the mean" in note for note in results.notes)
    _, classifier = trained(make_model(tmp_path / "c"), devkit, options)
    assert (classifier.head.linear.weight != before["head.linear.weight"])[person].any()


def test_the_same_whatever_the_number_of_workers(tmp_path: Path, devkit: Path) -> None:
    (_, one), (_, same) = (trained(make_model(tmp_path / str(n), workers=n), devkit, quick()) for n in (0, 3))
    assert not changed(one.state_dict(), same)
    # Of the same new head, the order, the crops and the dropout are others.
    other_bench, options = make_model(tmp_path / "seed"), quick(seed=32)
    _, other = trained(other_bench, devkit, options)
    assert len(changed(one.state_dict(), other)) > 10


class StopAt(Interruption):
    """A stop that is asked for before a given question."""

    def __init__(self, question: int) -> None:
        super().__init__(advice="the same command goes on")
        self.left = question

    def check(self, save: Callable[[], None] | None = None) -> None:
        self.left -= 1
        if self.left == 0:
            self.requested = "SIGTERM"
        super().check(save)


@pytest.mark.parametrize(("arch", "finetune", "stops"), [("alexnet-small", "all", (1, 3, 4, 5)), ("alexnet", "fc6-8", (2,))])
def test_a_stop_at_any_iteration_changes_no_weight(
    tmp_path: Path, devkit: Path, arch: str, finetune: str, stops: tuple[int, ...]
) -> None:
    """18 images in batches of 7: stops within an epoch, at its end, in the second, and at the last step; with dropout."""
    side, steps = (16, 5) if arch == "alexnet-small" else (64, 3)
    options = quick(iterations=steps, batch_size=7, halve_every=2, finetune=finetune)
    _, whole = trained(make_model(tmp_path / "whole", arch=arch, image_size=side), devkit, options)
    for stop in stops:
        cache = tmp_path / f"stop{stop}"
        with pytest.raises(Interrupted, match="the same command goes on"):
            trained(make_model(cache, arch=arch, image_size=side, interruption=StopAt(stop)), devkit, options)
        (kept,) = (cache / "unfinished").iterdir()
        assert torch.load(kept, weights_only=True)["step"] == stop
        _, gone_on = trained(make_model(cache, arch=arch, image_size=side), devkit, options)
        assert not changed(whole.state_dict(), gone_on)


@pytest.mark.parametrize("stop", [3, 5, 6])
def test_a_stop_changes_no_result(tmp_path: Path, devkit: Path, stop: int) -> None:
    """Stopped in the training of 4 steps, and in the test, which is done again; the state is gone in the end."""
    whole = evaluate(make_model(tmp_path / "whole"), devkit, quick(image_size=8))
    with pytest.raises(Interrupted):
        evaluate(make_model(tmp_path, interruption=StopAt(stop)), devkit, quick(image_size=8))
    (kept,) = (tmp_path / "unfinished").iterdir()
    assert torch.load(kept, weights_only=True)["step"] == min(stop, 4)
    assert evaluate(make_model(tmp_path), devkit, quick(image_size=8)) == whole
    assert not list((tmp_path / "unfinished").iterdir())


def test_another_setting_does_not_go_on_with_a_state(tmp_path: Path, devkit: Path) -> None:
    with pytest.raises(Interrupted):
        trained(make_model(tmp_path, interruption=StopAt(2)), devkit, quick())
    _, expected = trained(make_model(tmp_path / "new"), devkit, quick(lr=0.01))
    _, found = trained(make_model(tmp_path), devkit, quick(lr=0.01))
    assert not changed(expected.state_dict(), found)


def test_unreadable_images_are_left_out_and_named(tmp_path: Path) -> None:
    data = write_devkit(tmp_path / "data")
    photos = data / "VOCdevkit" / "VOC2007" / "JPEGImages"
    for name in ("000004", "000502"):
        (photos / f"{name}.jpg").write_bytes(b"no photo")
    results = evaluate(make_model(tmp_path / "cache"), data, quick(iterations=10))
    assert results.data["test_images"] == 17
    assert any("18 images of VOC2007 trainval: 1 image can't be read" in note and "000004" in note for note in results.notes)
    assert any("18 images of VOC2007 test: 1 image can't be read" in note and "000502" in note for note in results.notes)


def test_images_that_can_all_not_be_read_are_an_error(tmp_path: Path) -> None:
    data = write_devkit(tmp_path / "data", a_class=2)
    for photo in (data / "VOCdevkit" / "VOC2007" / "JPEGImages").glob("0000*.jpg"):
        photo.write_bytes(b"no photo")
    with pytest.raises(InputError, match="read"):
        evaluate(make_model(tmp_path / "cache"), data, quick(iterations=10))


def test_classes_that_no_image_to_train_on_shows_are_named(tmp_path: Path) -> None:
    data = write_devkit(tmp_path / "data")
    write_image(data / "VOCdevkit" / "VOC2007", "000500", {"cat": False, "horse": False}, np.random.default_rng(0))
    results = evaluate(make_model(tmp_path / "cache"), data, quick())
    by_class = results.results["AP"]
    assert isinstance(by_class, dict) and "horse" in by_class
    assert any("horse" in note and note.endswith("no image to train on shows them") for note in results.notes)


def test_the_other_split(tmp_path: Path) -> None:
    data = write_devkit(tmp_path / "data", lists=("train", "val"))
    results = evaluate(make_model(tmp_path / "cache"), data, quick(split="train"))
    assert (results.data["train"], results.data["test"]) == ("18 images of VOC2007 train", "18 images of VOC2007 val")
    with pytest.raises(InputError, match="--split train"):
        evaluate(make_model(tmp_path / "cache"), data, quick())


def test_wrong_input(tmp_path: Path, devkit: Path) -> None:
    model = make_model(tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is no VOC devkit"):
        evaluate(model, tmp_path / "empty", quick())
    with pytest.raises(InputError, match="image_size=128 does not fit this alexnet,"):
        evaluate(make_model(tmp_path / "a", arch="alexnet", image_size=64), devkit, quick(image_size=128))
    data = write_devkit(tmp_path / "data", a_class=1)
    for annotation in (data / "VOCdevkit" / "VOC2007" / "Annotations").glob("0005*.xml"):
        annotation.write_text(annotation.read_text().replace("<difficult>0", "<difficult>1"))
    with pytest.raises(InputError, match="none of 3 images of VOC2007 test has an object"):
        evaluate(model, data, quick())
    assert not (tmp_path / "cache" / "unfinished").exists()


def test_a_rate_that_is_too_high_is_told(tmp_path: Path, devkit: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss became (nan|inf) at step \d+/30; try a lower learning rate"):
        evaluate(make_model(tmp_path), devkit, quick(iterations=30, lr=1e20))


@pytest.mark.skipif(not FROM_COCO.is_dir(), reason="the shared data are not here")
def test_photos(tmp_path: Path) -> None:
    """Real annotations: cow and sheep are nowhere, horse in the test alone."""
    options = quick(iterations=6, batch_size=16, lr=0.01, image_size=16, test_crops="fixed")
    results = evaluate(make_model(tmp_path), FROM_COCO, options)
    assert 0 < results.best() < 1
    assert (results.data["train_images"], results.data["test_images"]) == (74, 49)
    by_class = results.results["AP"]
    assert isinstance(by_class, dict)
    assert {"cow", "sheep"}.isdisjoint(by_class) and {"horse", "person"} <= set(by_class)
