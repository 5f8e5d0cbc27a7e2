"""`auto` fits what does not fit, says why, and never touches what the person set."""

from typing import Any

import pytest

from deepcluster.core.distributed import ONE_PROCESS
from deepcluster.core.errors import InputError
from deepcluster.data.survey import Survey
from deepcluster.models.archs import ARCHITECTURES, make_trunk
from deepcluster.models.trunk import has_batch_norm
from deepcluster.run.auto import (
    GPU_BATCH,
    GPU_LR,
    V2_LEAST_STEPS,
    choose_settings,
    fit_to_trunk,
    hints,
    settings_before_data,
)
from deepcluster.run.recipes import RECIPES, Change, by_reason
from deepcluster.run.settings import METHODS, Settings
from deepcluster.training.batches import even_batches

IMAGENET = Survey(n_images=1_281_167, shorter_side=375, grey_share=0.02)
PHOTOS = Survey(n_images=4_500, shorter_side=224, grey_share=0.02)
CIFAR = Survey(n_images=20_000, shorter_side=32, grey_share=0.0)
TINY_IMAGENET = Survey(n_images=100_000, shorter_side=64, grey_share=0.02)
DIGITS = Survey(n_images=1_797, shorter_side=8, grey_share=1.0)


def test_auto_leaves_the_papers_settings_alone_on_imagenet_but_for_the_size_at_which_photos_are_kept() -> None:
    settings, changes = choose_settings({}, IMAGENET)
    assert [change.option for change in changes] == ["reduce_to"]
    assert settings == Settings(reduce_to=256)
    assert choose_settings({"recipe": "paper-alexnet"}, IMAGENET)[0].reduce_to == 0
    assert choose_settings({"image_size": 320}, IMAGENET)[0].reduce_to == 366


@pytest.mark.parametrize("seen", [PHOTOS, CIFAR, DIGITS])
def test_auto_reports_exactly_what_it_changed(seen: Survey) -> None:
    settings, changes = choose_settings({}, seen)
    differing = {name for name, value in settings.as_dict().items() if value != Settings().as_dict()[name]}
    assert differing <= {change.option for change in changes}
    for change in changes:
        assert getattr(settings, change.option) == change.value
        assert change.reason


@pytest.mark.parametrize("seen", [PHOTOS, CIFAR, DIGITS])
def test_auto_never_changes_what_the_person_set(seen: Survey) -> None:
    _, changes = choose_settings({}, seen)
    paper = Settings()
    for change in changes:
        value = getattr(paper, change.option) if change.option != "clusters" else 17
        settings, others = choose_settings({change.option: value}, seen)
        assert getattr(settings, change.option) == value
        assert change.option not in {other.option for other in others}


@pytest.mark.parametrize("recipe", ["auto", "small-images", "small-set"])
@pytest.mark.parametrize("seen", [PHOTOS, CIFAR, DIGITS, Survey(n_images=800, shorter_side=224, grey_share=0.0)])
@pytest.mark.parametrize("arch", [None, *ARCHITECTURES, "torchvision:resnet18", "timm:resnet18"])
def test_the_head_of_a_small_set_suits_any_network(seen: Survey, recipe: str, arch: str | None) -> None:
    """Without its BatchNorm, the rate that is best for alexnet-small made resnet18 collapse: its features are longer."""
    options: dict[str, Any] = {"recipe": recipe, "clusters": 50} | ({"arch": arch} if arch else {})
    settings, _ = choose_settings(options, seen)
    assert (settings.head_norm, settings.head_lr, settings.head_momentum, settings.lr) == (True, 4.0, 0.9, 0.03)
    settings, _ = choose_settings({**options, "head_norm": False, "head_lr": 0.2, "head_momentum": 0.5}, seen)
    assert (settings.head_norm, settings.head_lr, settings.head_momentum) == (False, 0.2, 0.5)


def test_the_better_method_is_named_where_it_was_measured_and_the_user_did_not_choose() -> None:
    for seen, words in ((PHOTOS, "4,500 photos"), (CIFAR, "32 px"), (DIGITS, None), (IMAGENET, None)):
        said = hints({}, choose_settings({}, seen)[0], seen)
        assert len(said) == (words is not None)
        assert words is None or (words in said[0] and "--method deepcluster-v2" in said[0])
        for chosen in ({"method": METHODS[0]}, {"method": METHODS[1]}, {"recipe": "small-set"}):
            assert hints(chosen, choose_settings(chosen, seen)[0], seen) == []
    tiny = {"image_size": 16, "method": METHODS[0]}
    assert "--image-size 16: little is left of photos" in hints(tiny, choose_settings(tiny, PHOTOS)[0], PHOTOS)[0]
    assert hints(tiny, choose_settings(tiny, CIFAR)[0], CIFAR) == []


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seen", [IMAGENET, PHOTOS, CIFAR, DIGITS])
def test_sobel_filters_are_only_where_the_paper_has_them(seen: Survey, method: str) -> None:
    for arch in (*ARCHITECTURES, "torchvision:resnet18", "timm:vit_tiny_patch16_224"):
        settings, _ = choose_settings({"arch": arch, "method": method}, seen)
        assert settings.sobel == (arch in ("alexnet", "vgg16", "vgg16-deepercluster") and method == "deepcluster")
        assert choose_settings({"arch": arch, "method": method, "sobel": True}, seen)[0].sobel


def test_networks_of_other_sizes_get_images_that_they_can_take_quickly() -> None:
    for arch, sizes in {"resnet18": (96, 64, 64), "resnet-patches": (48, 32, 32), "alexnet": (224, 224, 224)}.items():
        chosen = (choose_settings({"arch": arch}, seen)[0].image_size for seen in (PHOTOS, CIFAR, DIGITS))
        assert tuple(chosen) == sizes
    assert choose_settings({"arch": "resnet50"}, IMAGENET)[0].image_size == 224


@pytest.mark.parametrize("seen", [PHOTOS, CIFAR, DIGITS, IMAGENET])
@pytest.mark.parametrize("method", METHODS)
def test_changes_with_the_same_reason_share_a_line(seen: Survey, method: str) -> None:
    _, changes = choose_settings({"method": method}, seen)
    lines = by_reason(changes)
    reasons = [line.split(": ", 1)[1] for line in lines]
    assert len(set(reasons)) == len(lines)
    options = " ".join(line.split(": ", 1)[0] for line in lines).split(" --")
    assert len(options) == len(changes)
    assert not any("as in recipe" in reason or reason == "the same" for reason in reasons)


@pytest.mark.parametrize(("seen", "side", "crop"), [(PHOTOS, 48, 36), (CIFAR, 32, 24)])
def test_crops_are_smaller_than_the_images_where_the_trunk_bears_it(seen: Survey, side: int, crop: int) -> None:
    def chosen(**options: Any) -> Settings:
        return choose_settings({"method": "deepcluster-v2", **options}, seen, device="cpu")[0]

    assert (chosen().image_size, chosen().crop_groups) == (side, ((2, crop),))
    assert chosen(image_size=64).crop_groups == ((2, 48),)
    assert chosen(arch="timm:vit_tiny_patch16_224", image_size=64).crop_groups == ((2, 64),)
    assert chosen(image_size=8).crop_groups == ((2, 8),)


def test_minutes_and_epochs_exclude_each_other() -> None:
    with pytest.raises(InputError, match="minutes=3 chooses the number of epochs"):
        choose_settings({"minutes": 3.0, "epochs": 3}, CIFAR)


@pytest.mark.parametrize("options", [{"method": "deepcluster-v2"}, {"recipe": "v2-small-images"}])
@pytest.mark.parametrize("seen", [CIFAR, DIGITS, Survey(n_images=50_000, shorter_side=32, grey_share=0.0)])
def test_a_gpu_trains_a_larger_trunk_on_small_images(options: dict[str, Any], seen: Survey) -> None:
    cpu, _ = choose_settings(options, seen, device="cpu")
    gpu, changes = choose_settings(options, seen, device="cuda")
    assert (cpu.arch, gpu.arch) == ("resnet-patches", "resnet18-small")
    assert gpu.epochs > cpu.epochs
    assert gpu.lr / gpu.batch_size == pytest.approx(GPU_LR / GPU_BATCH)
    assert 64 <= gpu.batch_size <= GPU_BATCH
    assert gpu.batch_size == 64 or seen.n_images / gpu.batch_size >= V2_LEAST_STEPS
    before, after = cpu.as_dict(), gpu.as_dict()
    assert {name for name in after if before[name] != after[name]} <= {change.option for change in changes}
    for change in changes:
        assert getattr(gpu, change.option) == change.value
    shown = {change.option: change.reason for change in changes}
    assert shown["epochs"].startswith(f"{gpu.epochs * seen.n_images:,} ")
    n_steps = len(even_batches(seen.n_images, gpu.batch_size, ONE_PROCESS))
    assert shown["batch_size"].startswith(f"{n_steps:,} steps per epoch")


def test_on_a_gpu_the_choices_of_the_user_win_and_the_others_follow_them() -> None:
    def chosen(seen: Survey = CIFAR, **options: Any) -> Settings:
        settings, changes = choose_settings({"method": "deepcluster-v2", **options}, seen, device="cuda")
        assert not set(options) & {change.option for change in changes}
        assert all(getattr(settings, name) == value for name, value in options.items())
        return settings

    assert chosen(arch="resnet-patches") == choose_settings({"method": "deepcluster-v2"}, CIFAR, device="cpu")[0]
    assert chosen(batch_size=128).lr == pytest.approx(GPU_LR / 2)
    assert chosen(lr=0.7).batch_size == GPU_BATCH
    assert chosen(crops="2x32,4x16", epochs=3).arch == "resnet18-small"
    assert chosen(image_size=48).crop_groups == ((2, 48),)
    named, changes = choose_settings({"recipe": "v2-small-images", "image_size": 40, "lr": 0.01}, CIFAR, device="cuda")
    assert (named.image_size, named.lr, named.arch) == (40, 0.01, "resnet18-small")
    assert "lr" not in {change.option for change in changes}


@pytest.mark.parametrize("recipe", ["auto", *(name for name in RECIPES if name != "v2-small-images")])
@pytest.mark.parametrize("seen", [IMAGENET, CIFAR])
def test_other_recipes_are_the_same_on_any_device(recipe: str, seen: Survey) -> None:
    assert choose_settings({"recipe": recipe}, seen, device="cuda") == choose_settings(
        {"recipe": recipe}, seen, device="cpu"
    )


def test_auto_is_near_the_recipe_of_tiny_imagenet() -> None:
    """It differs in the number of clusters only: the paper's images per cluster."""
    auto, recipe = (choose_settings({"recipe": name}, TINY_IMAGENET)[0] for name in ("auto", "tiny-imagenet"))
    assert (recipe.image_size, recipe.arch, recipe.clusters, auto.clusters) == (64, "resnet-patches", 1000, 781)
    ours, others = auto.as_dict(), recipe.as_dict()
    assert {name for name in ours if ours[name] != others[name]} == {"recipe", "clusters"}


def test_photos_are_learned_in_the_same_way_on_any_device() -> None:
    options = {"method": "deepcluster-v2"}
    for seen in (IMAGENET, PHOTOS):
        assert choose_settings(options, seen, device="cuda") == choose_settings(options, seen, device="cpu")


def test_auto_keeps_digits_from_being_mirrored_and_photos_not() -> None:
    assert choose_settings({}, DIGITS)[0].flip is False
    assert choose_settings({}, CIFAR)[0].flip is True


def test_auto_leaves_no_more_steps_undone_than_a_small_set_can_bear() -> None:
    for seen in (PHOTOS, CIFAR, DIGITS):
        settings, _ = choose_settings({}, seen)
        assert seen.n_images / settings.batch_size > 50
        assert 10 <= seen.n_images / settings.clusters <= 256


@pytest.mark.parametrize("n_images", [2, 5, 30, 100, 499, 500, 6_000, 49_999, 10**8])
def test_clusters_fit_any_number_of_images(n_images: int) -> None:
    settings, _ = choose_settings({}, Survey(n_images, 100, 0.0))
    assert 2 <= settings.clusters <= n_images


def test_more_clusters_than_images_are_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"clusters=10000 is more than the 4,500 images; use --clusters 4500 or fewer"):
        choose_settings({"clusters": 10_000}, PHOTOS)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_named_recipe_is_valid_and_changes_nothing_else(name: str) -> None:
    settings, changes = choose_settings({"recipe": name}, IMAGENET, device="cpu")
    assert changes == []
    expected = {**Settings().as_dict(), "recipe": name, **RECIPES[name].settings}
    assert settings.as_dict() == {key: list(value) if isinstance(value, tuple) else value for key, value in expected.items()}
    assert RECIPES[name].about


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_goes_with_its_own_method_alone(name: str) -> None:
    own = "deepcluster-v2" if name.startswith("v2-") else "deepcluster"
    for method in METHODS:
        explicit = {"recipe": name, "method": method}
        if method == own:
            assert settings_before_data(explicit) == choose_settings(explicit, IMAGENET, device="cpu")[0]
            continue
        for choose in (settings_before_data, lambda values: choose_settings(values, PHOTOS)):
            with pytest.raises(InputError) as told:
                choose(explicit)
            assert (
                str(told.value)
                == f"recipe={name} does not go with method={method}; use --recipe auto, or leave out --method"
            )
    assert settings_before_data({"recipe": name}).method == own


@pytest.mark.parametrize("seen", [IMAGENET, PHOTOS, CIFAR, DIGITS])
@pytest.mark.parametrize("method", METHODS)
def test_auto_chooses_nothing_that_the_method_has_no_use_for(method: str, seen: Survey) -> None:
    settings, _ = choose_settings({"method": method}, seen)
    assert settings.method == method and settings_before_data({"method": method}) == Settings(method=method)


def test_pca_follows_the_trunk_unless_it_was_set() -> None:
    settings, changes = fit_to_trunk(Settings(pca=256), {}, width=64, n_images=1000)
    assert settings.pca == 64
    assert [change.option for change in changes] == ["pca"]
    assert fit_to_trunk(Settings(pca=256), {}, width=512, n_images=1000) == (Settings(pca=256), [])
    assert fit_to_trunk(Settings(pca=256), {}, width=512, n_images=100)[0].pca == 99
    with pytest.raises(InputError, match="pca=256 is too wide"):
        fit_to_trunk(Settings(pca=256), {"pca": 256}, width=64, n_images=1000)


def test_a_network_without_batch_norm_gets_a_third_of_the_rate_unless_it_was_set() -> None:
    settings, changes = fit_to_trunk(Settings(lr=0.03), {}, width=512, n_images=1000, batch_norm=False)
    assert (settings.lr, [change.option for change in changes]) == (pytest.approx(0.01), ["lr"])
    for options, recipe in (({"lr": 0.03}, "auto"), ({}, "small-set")):
        fixed = Settings(lr=0.03, recipe=recipe)
        assert fit_to_trunk(fixed, options, width=512, n_images=1000, batch_norm=False) == (fixed, [])
    for arch, expected in (("resnet18", True), ("alexnet-small", True), ("torchvision:vit_b_32", False)):
        assert has_batch_norm(make_trunk(arch, image_size=32, sobel=False)) == expected


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Change("sobel", False, "why"), "--no-sobel"),
        (Change("flip", True, "why"), "--flip"),
        (Change("crop_scale", (0.2, 1.0), "why"), "--crop-scale 0.2,1"),
        (Change("batch_size", 64, "why"), "--batch-size 64"),
    ],
)
def test_a_change_is_printed_as_the_option_that_makes_it(change: Change, text: str) -> None:
    assert str(change) == text
