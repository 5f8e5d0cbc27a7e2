"""Foundations of the dense protocols: samples, fine-tuning that resumes and is shared by ranks, results in spans."""

import multiprocessing
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from ranks_helper import At, in_ranks
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

from deepcluster.core.distributed import joined
from deepcluster.core.errors import InputError, Interrupted, WorkerLost
from deepcluster.core.work import Work
from deepcluster.data.sources import open_source
from deepcluster.evaluation.datasets.dense import MaskSet
from deepcluster.evaluation.dense.fine_tuning import Schedule, average_gradients, fine_tune, set_batch_norms
from deepcluster.evaluation.dense.samples import SampleBatch, Samples
from deepcluster.evaluation.dense.spans import SPAN, Spans
from deepcluster.evaluation.options import KnnOptions
from deepcluster.interop.loading import loaded, new_interruption
from deepcluster.models.trunk import normalise
from deepcluster.run.model import Model
from deepcluster.run.resumable import weights_hash

STEPS = 7


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten photos of a square, each 40 x 30 pixels, and masks whose class 1 is the square."""
    folder = tmp_path_factory.mktemp("dense")
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for number in range(10):
        left, top = (int(one) for one in rng.integers(0, 20, 2))
        image, mask = Image.new("RGB", (40, 30), (40, 60, 200)), Image.new("L", (40, 30))
        ImageDraw.Draw(image).rectangle((left, top, left + 9, top + 9), fill=(230, 40 + 5 * number, 30))
        ImageDraw.Draw(mask).rectangle((left, top, left + 9, top + 9), fill=1)
        noisy = np.array(image) + rng.integers(0, 25, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(noisy).save(folder / "images" / f"{number}.png")
        mask.save(folder / "masks" / f"{number}.png")
    return folder


def samples_of(folder: Path) -> Samples:
    source = open_source(folder / "images")

    def read(index: int) -> Any:
        return np.array(Image.open(folder / "masks" / source.name(index)))

    def target(index: int, height: int, width: int) -> dict[str, Tensor]:
        return {"mask": tv_tensors.Mask(torch.from_numpy(read(index)))}

    augment = v2.Compose([v2.RandomResizedCrop(24, antialias=True), v2.RandomHorizontalFlip()])
    return Samples(MaskSet("squares", source, ("background", "square"), read), target, augment)


def everything(batches: Any) -> list[tuple[int, bytes, bytes]]:
    return [
        (one.index, one.image_CHW.numpy().tobytes(), one.target["mask"].numpy().tobytes())
        for batch in batches
        for one in batch.samples
    ]


def model_of(work: Work | None = None, workers: int = 0) -> Model:
    """In fp32: where a processor is fast at bf16, sums in another order differ by more than the tests allow."""
    work = work or Work(interruption=new_interruption())
    model = loaded("untrained:alexnet-small", device="cpu", workers=workers, work=work)
    return model.on("cpu", precision="fp32", workers=workers, work=work)


class Segmenter(nn.Module):
    def __init__(self, model: Model, batchnorm: str = "auto") -> None:
        super().__init__()
        self.trunk = set_batch_norms(model.copy_of_trunk(), batchnorm, model.work.ranks)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.score = nn.Conv2d(256, 2, 1)


def train(
    model: Model,
    folder: Path,
    steps: int = STEPS,
    batchnorm: str = "auto",
    batch_size: int = 4,
    samples: Samples | None = None,
) -> tuple[nn.Module, Any]:
    network = Segmenter(model, batchnorm)

    def losses(batch: SampleBatch) -> dict[str, Tensor]:
        images_BCHW = torch.stack([one.image_CHW for one in batch.samples])
        truth_BHW = torch.stack([one.target["mask"] for one in batch.samples]).long()
        scores = network.score(network.trunk.stage(normalise(images_BCHW), "conv5"))
        scores = nn.functional.interpolate(scores.float(), size=truth_BHW.shape[1:], mode="bilinear")
        return {"pixels": nn.functional.cross_entropy(scores, truth_BHW)}

    groups = [{"params": [weight for weight in network.parameters() if weight.requires_grad], "lr": 0.01}]
    schedule = Schedule(steps, lambda step: 1 - step / steps, 0.9, 1e-4, warmup=2)
    _, resumable = fine_tune(
        model,
        "toy",
        network,
        groups,
        samples or samples_of(folder),
        losses,
        schedule,
        KnnOptions(),
        batch_size=batch_size,
        seed=3,
        facts=[batchnorm, batch_size],
    )
    return network, resumable


def test_views_depend_on_the_seed_and_the_position_only(photos: Path) -> None:
    samples = samples_of(photos)
    steps = range(6)
    whole = everything(samples.training(model_of(), 4, seed=1, steps=steps))
    assert everything(samples.training(model_of(workers=2), 4, seed=1, steps=steps)) == whole
    assert everything(samples.training(model_of(), 4, seed=1, steps=range(3, 6))) == whole[12:]
    assert everything(samples.training(model_of(), 4, seed=2, steps=steps)) != whole
    indices = [index for index, _, _ in whole]
    assert [sorted(indices[:10]), sorted(indices[10:20])] == [[*range(10)]] * 2, "an epoch shows each image once"
    assert indices[:10] != indices[10:20]
    assert len({image for _, image, _ in whole}) == 24, "each view of an image is another one"


def test_masks_stay_in_step_with_images(photos: Path) -> None:
    for batch in samples_of(photos).training(model_of(), 5, seed=0, steps=range(4)):
        for one in batch.samples:
            is_red = (one.image_CHW[0].int() > one.image_CHW[2].int() + 60).long()
            assert (is_red == one.target["mask"]).float().mean() > 0.93
            assert one.size == (30, 40)


def test_unreadable_images_are_left_out_and_many_end_the_training(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(photos, folder)
    (folder / "images" / "3.png").write_bytes(b"nothing")
    batches = list(samples_of(folder).in_order(model_of(), range(10), 5))
    assert [len(batch.samples) for batch in batches] == [4, 5]
    assert list(batches[0].unreadable) == [3]
    train(model_of(), folder)  # One of ten is not more than a tenth.
    (folder / "images" / "4.png").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"2 of 10 images .* can't be read, as [34]\.png"):
        train(model_of(), folder)


def test_a_stop_and_a_resume_change_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    whole, resumable = train(model_of(), photos)
    resumable.done()
    interruption = new_interruption()
    stopped = model_of(Work(At("training", 4), interruption))
    with interruption.listening(), pytest.raises(Interrupted):
        train(stopped, photos)
    said: list[str] = []
    again = model_of()
    monkeypatch.setattr(again.work.reporter, "say", said.append)
    network, resumable = train(again, photos)
    assert any(line.startswith("resuming after step ") for line in said)
    assert weights_hash(network) == weights_hash(whole)
    kept, _ = train(model_of(), photos)  # It is over: nothing is trained.
    assert weights_hash(kept) == weights_hash(whole)
    assert resumable.path.is_file()
    resumable.done()
    assert not resumable.path.exists()


def without(read: Any, index: int, height: int, width: int) -> Any:
    """The target of an image; there is none of image 3, which one of two ranks meets first."""
    if index == 3:
        raise InputError("no mask of image 3")
    return read(index, height, width)


UNLIKE: dict[str, dict[str, Any]] = {
    "statistics of each rank": {"batchnorm": "train", "steps": 2},
    "parts of one and two images": {"batch_size": 3},
}


def work_of_ranks(folder: Path, out: Path) -> None:
    with joined() as ranks:
        model, rank = model_of(Work(ranks=ranks)), ranks.rank
        network, _ = train(model, folder)
        torch.save(dict(network.state_dict()), out / f"{rank}.pt")
        for name, settings in UNLIKE.items():
            torch.save(dict(train(model, folder, **settings)[0].state_dict()), out / f"{name}-{rank}.pt")
        spans = Spans(model, 5 * SPAN + 3, "toy").compute("testing", lambda span, advance: {"span": [*span], "by": rank})
        torch.save(spans, out / f"spans-{rank}.pt")
        damaged = samples_of(folder)
        with pytest.raises(InputError, match="no mask of image 3"):
            train(
                model, folder, 6, batch_size=2, samples=replace(damaged, read_target=partial(without, damaged.read_target))
            )

        def refuse(span: range, advance: Any) -> dict[str, Any]:
            if rank:
                raise InputError("a mask is damaged")
            return {}

        with pytest.raises(InputError, match="a mask is damaged"):
            Spans(model, 2 * SPAN, "damaged").compute("testing", refuse)
        shared, lone = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
        shared.grad = torch.full((2,), 1.0 + rank)
        lone.grad = torch.full((2,), 4.0) if rank else None
        average_gradients([shared, lone], ranks)
        torch.save((shared.grad, lone.grad), out / f"gradients-{rank}.pt")


def test_two_ranks_train_and_compute_what_one_process_does(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache"))
    in_ranks(2, tmp_path / "store", work_of_ranks, photos, tmp_path)
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    kept, _ = train(model_of(), photos)  # The first process goes on alone: it finds the training done.
    assert all(torch.equal(one[name], value) for name, value in kept.state_dict().items())
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path / "cache-of-one"))
    alone, _ = train(model_of(), photos)
    assert weights_hash(Segmenter(model_of())) != weights_hash(alone)
    # Sums over two parts of a batch are rounded in another order.
    assert max((one[name].double() - value.double()).abs().max() for name, value in alone.state_dict().items()) < 1e-3
    for name in UNLIKE:
        one, other = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    alone, _ = train(model_of(), photos, batch_size=3)
    assert max((one[name].double() - value.double()).abs().max() for name, value in alone.state_dict().items()) < 1e-3
    spans = torch.load(tmp_path / "spans-0.pt")
    assert spans == torch.load(tmp_path / "spans-1.pt")
    assert [row for span in spans for row in span["span"]] == [*range(5 * SPAN + 3)]
    assert {span["by"] for span in spans} == {0, 1}
    for rank in range(2):
        shared, lone = torch.load(tmp_path / f"gradients-{rank}.pt")
        assert (shared.tolist(), lone.tolist()) == ([1.5, 1.5], [2.0, 2.0]), "a rank without a gradient adds zeros"


def test_frozen_batch_norms_do_not_change(photos: Path) -> None:
    model = model_of()
    trunk = set_batch_norms(model.copy_of_trunk(), "frozen", model.work.ranks)
    norms = [layer for layer in trunk.modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in norms]
    trunk(torch.rand(4, 3, 44, 44))
    assert norms
    assert not any(weight.requires_grad for layer in norms for weight in layer.parameters())
    assert all(
        torch.equal(layer.state_dict()[n], v) for layer, state in zip(norms, before, strict=True) for n, v in state.items()
    )


def test_spans_that_were_made_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPCLUSTER_CACHE", str(tmp_path))
    model, made = model_of(), []

    def make(span: range, advance: Any) -> dict[str, Any]:
        if len(made) == 2:
            raise Interrupted("stopped")
        made.append(span.start)
        advance(len(span))
        return {"rows": torch.tensor([*span])}

    with pytest.raises(Interrupted):
        Spans(model, 200, "a").compute("testing", make)
    made.clear()
    spans = Spans(model, 200, "a")
    with pytest.raises(Interrupted):
        Spans(model, 200, "other facts").compute("testing", make)
    made.clear()
    found = spans.compute("testing", make)
    assert made == [128, 192]
    assert torch.equal(torch.cat([one["rows"] for one in found]), torch.arange(200))
    spans.done()
    assert len([*(tmp_path / "unfinished").iterdir()]) == 2, "those of other facts"


def test_more_ranks_than_images_of_a_step(photos: Path) -> None:
    class Many(type(model_of().work.ranks)):  # type: ignore[misc]
        size = 5

    model = model_of()
    crowded = replace(model, work=Work(ranks=Many()))
    with pytest.raises(InputError, match="5 processes are more than the 4 images of a step: raise --batch-size"):
        train(crowded, photos)


def test_a_killed_worker_ends_the_training_with_a_sentence(photos: Path) -> None:
    batches = samples_of(photos).training(model_of(workers=1), 2, seed=0, steps=range(1000))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    worker.join()
    with pytest.raises(WorkerLost, match="killed, perhaps because memory is short: use fewer --workers"):
        list(batches)


def two_caches(folder: Path, out: Path) -> None:
    with joined() as ranks:
        os.environ["DEEPCLUSTER_CACHE"] = str(out / f"cache-{ranks.rank}")
        if ranks.is_main:  # Only the first process finds a training that was done.
            train(model_of(), folder, 1)
        with pytest.raises(InputError, match="cache folder of process 1 differ"):
            train(model_of(Work(ranks=ranks)), folder, 1)
        (out / f"refused-{ranks.rank}").touch()


def test_ranks_with_caches_of_their_own_are_refused(photos: Path, tmp_path: Path) -> None:
    in_ranks(2, tmp_path / "store", two_caches, photos, tmp_path)
    assert all((tmp_path / f"refused-{rank}").is_file() for rank in range(2))
