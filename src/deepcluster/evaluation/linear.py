"""Linear classifiers on frozen stages (the paper's section 4.2 and table 1): all stages in one pass over the images.

A frozen trunk computes every stage on the way to the last one, so each batch goes through it once, and the rows of each
stage go to a classifier of their own. The classifiers share nothing: the gradient of the sum of their losses is, for each,
the gradient of its own loss.

B batch, V views of an image, D features, C classes, N images, S size of the views in pixels.
"""

import hashlib
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from math import sqrt
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from deepcluster.core.errors import InputError
from deepcluster.core.text import duration
from deepcluster.data.loader import Batch, Loader
from deepcluster.data.survey import MOST_UNREADABLE, check_unreadable
from deepcluster.data.views import ClusterView, ShiftedView, TenCrops
from deepcluster.evaluation.datasets.labelled import Labelled, TrainVal, left_out, open_train_val
from deepcluster.evaluation.logistic import fit_logistic, right_among, top_of
from deepcluster.evaluation.options import LinearOptions
from deepcluster.evaluation.results import Measured, Results
from deepcluster.evaluation.trainer import Diverged, Training, fit_source
from deepcluster.run.features import Pooled
from deepcluster.run.kept_features import kept_rows, readable
from deepcluster.run.model import Model, data_key
from deepcluster.run.resumable import ResumableState

KINDS = {"pooled": "pooled", "avgpool": "average"}
CROPS = 10

# For each of the stages the shares of images whose class is among the highest scores.
Shares = dict[Pooled, list[float]]


def evaluate(model: Model, data: Path, options: LinearOptions) -> Results:
    """Return top-1 and top-5 accuracy on `val` of a linear classifier of each stage, trained on `train`.

    Raises:
        InputError: wrong layout of the data, the trunk has no such stage, more than 10 % of the images can't be read, or
            the loss became infinite.
        Interrupted: the state is kept; the same call continues.
    """
    wanted = _wanted(model, options)
    parts = open_train_val(data)
    top = top_of(len(parts.train.class_names))
    if options.fast:
        shares, notes = _fast(model, parts, options, wanted)
    else:
        training, resumable = train_heads(model, parts.train, options, wanted)
        shares, bad = score_heads(model, training, parts.val, options, top, resumable)
        resumable.done()
        notes = left_out("train", training.unreadable, parts.train.source.name)
        notes += left_out("val", bad, parts.val.source.name)
    results: dict[str, Measured] = {f"top-{k}": {one.stage: shares[one][n] for one in wanted} for n, k in enumerate(top)}
    best = max(wanted, key=lambda one: shares[one][0])
    stages, numbers = [one.stage for one in wanted], {one.stage: width for one, width in model.widths(wanted).items()}
    settings = options.as_dict() | {"stages": stages, "numbers": numbers, "image_size": model.image_size}
    return Results("linear", parts.describe(), settings, results, ("top-1", best.stage), parts.notes + notes)


def prepare(model: Model, data: Path, options: LinearOptions) -> None:
    """Extract the features of both parts where classifiers are fitted to features that are kept."""
    if options.fast:
        parts = open_train_val(data)
        for part in (parts.train, parts.val):
            kept_rows(model, part.source, _wanted(model, options))


def _wanted(model: Model, options: LinearOptions) -> list[Pooled]:
    return [Pooled(stage, KINDS[options.head]) for stage in dict.fromkeys(model.stages(options.stages))]


def learning_rate(lr: float, weight_decay: float, step: int) -> float:
    """Return the rate at a step: lr / √(1 + lr · weight decay · step), as in the published script."""
    return lr / sqrt(1 + lr * weight_decay * step)


class LinearHeads(nn.Module):
    """A linear classifier for each stage.

    Args:
        widths: D of the rows of each stage.
        seed: of the first weights, which are uniform within ± 1/√D, as those of `nn.Linear`.
    """

    def __init__(self, widths: Mapping[Pooled, int], n_classes: int, *, seed: int) -> None:
        super().__init__()
        self.wanted, self.layers = list(widths), nn.ModuleList()
        for width in widths.values():
            layer: nn.Linear = nn.utils.skip_init(nn.Linear, width, n_classes)
            generator, bound = torch.Generator().manual_seed(seed), 1 / sqrt(width)
            for value in layer.parameters():
                nn.init.uniform_(value, -bound, bound, generator=generator)
            self.layers.append(layer)

    def forward(self, rows: Mapping[Pooled, Tensor]) -> dict[Pooled, Tensor]:
        """Return scores (B, C) of rows (B, D) by stage."""
        return {one: layer(rows[one].float()) for one, layer in zip(self.wanted, self.layers, strict=True)}

    def probabilities(self, rows: Mapping[Pooled, Tensor], n_views: int) -> dict[Pooled, Tensor]:
        """Return probabilities (B, C) for rows (B·V, D) by stage, averaged over the views of an image."""
        with torch.no_grad():
            return {one: scores.softmax(1).unflatten(0, (-1, n_views)).mean(1) for one, scores in self(rows).items()}


def train_step(training: Training[LinearHeads], rows: Mapping[Pooled, Tensor], labels_B: Tensor) -> dict[str, Tensor]:
    """Take one step, and return for each stage its loss, and its top-1 accuracy as `top-1 STAGE`."""
    scores = training.network(rows)
    losses = {one.stage: cross_entropy(scores_BC, labels_B) for one, scores_BC in scores.items()}
    training.optimizer.zero_grad(set_to_none=True)
    torch.stack(list(losses.values())).sum().backward()
    training.optimizer.step()
    values = {stage: loss.detach() for stage, loss in losses.items()}
    for one, scores_BC in scores.items():
        values[f"top-1 {one.stage}"] = (scores_BC.detach().argmax(1) == labels_B).float().mean()
    return values


def train_heads(
    model: Model, train: Labelled, options: LinearOptions, wanted: Sequence[Pooled]
) -> tuple[Training[LinearHeads], ResumableState]:
    """Train the classifiers on random crops, or continue where an earlier call was stopped.

    Raises:
        InputError: the loss of a stage is not finite, or more than 10 % of the images can't be read.
    """
    device, lr, decay = model.machine.device, options.lr, options.weight_decay
    heads = LinearHeads(model.widths(wanted), len(train.class_names), seed=options.seed).to(device)
    weights, fused = heads.parameters(), device.type == "cuda"
    optimizer = torch.optim.SGD(weights, lr=lr, momentum=options.momentum, weight_decay=decay, fused=fused)
    steps_per_epoch, labels_N = -(-len(train.source) // options.batch_size), train.labels_N.to(device)
    training, view = Training(heads, optimizer, options.epochs * steps_per_epoch), ShiftedView(model.image_size)
    # The training does not depend on how the classifiers are tested.
    facts = {name: value for name, value in options.as_dict().items() if name not in ("ten_crops", "fast", "stages")}
    labels = hashlib.sha256(train.labels_N.numpy().tobytes()).hexdigest()
    where = (data_key(train.source), labels, model.image_size, model.settings.reduce_to)
    resumable = model.resumable("linear-2", sorted(facts.items()), wanted, *where)

    def line(means: Mapping[str, float]) -> str:
        best = max((one.stage for one in wanted), key=lambda stage: means[f"top-1 {stage}"])
        epoch = f"epoch {training.step // steps_per_epoch:>3}/{options.epochs}"
        return f"{epoch}  {best}: loss {means[best]:.3f}, train top-1 {100 * means[f'top-1 {best}']:.1f}%"

    def learn(batch: Batch, _: int) -> dict[str, Tensor]:
        return train_step(training, model.extract(batch.images_BCHW, wanted), labels_N[batch.indices_B.to(device)])

    def rates(step: int) -> list[float]:
        return [learning_rate(lr, decay, step)]

    try:
        reports = steps_per_epoch, line
        fit_source(model, training, train.source, view, learn, options, rates=rates, resumable=resumable, reports=reports)
    except Diverged as fault:
        resumable.done()
        raise InputError(
            f"the loss of {fault.name} is not finite at {training.where}: use a lower --lr than {lr:g}, or leave "
            "this stage out with --stages"
        ) from None
    return training, resumable


def score_heads(
    model: Model, trained: Training[LinearHeads], val: Labelled, options: LinearOptions, top: list[int], kept: ResumableState
) -> tuple[Shares, dict[int, str]]:
    """Return the shares of images that each classifier ranks among its `top` classes, and why images can't be read."""
    heads, n_views = trained.network, CROPS if options.ten_crops else 1
    right = {one: torch.zeros(len(top), dtype=torch.int64) for one in heads.wanted}
    seen = 0
    with (
        model.loader(val.source) as loader,
        kept.track("testing", len(val.source), state=trained.state) as advance,
        closing(_test_batches(loader, model.view, options)) as batches,
    ):
        for batch in batches:
            if len(batch.indices_B):
                images = batch.images_BCHW.flatten(0, 1) if n_views > 1 else batch.images_BCHW
                probabilities = heads.probabilities(model.extract(images, heads.wanted), n_views)
                labels_B = val.labels_N[batch.indices_B].to(model.machine.device)
                for one, probabilities_BC in probabilities.items():
                    right[one] += right_among(probabilities_BC, labels_B, top).cpu()
            seen += len(batch.indices_B)
            check_unreadable(loader, len(val.source))
            advance(len(batch.indices_B))
        return {one: [int(n) / seen for n in right_T] for one, right_T in right.items()}, dict(loader.unreadable)


def _test_batches(loader: Loader, view: ClusterView, options: LinearOptions) -> Generator[Batch, None, None]:
    """Return batches of the centre crop of each image, or of its ten crops: (B, V, 3, S, S)."""
    all_N = torch.arange(len(loader.images))
    if not options.ten_crops:
        return loader.cluster_views(view, all_N, options.batch_size)
    return loader.training_views(TenCrops(view.size), all_N, -(-options.batch_size // CROPS), seed=options.seed, epoch=0)


def _fast(model: Model, parts: TrainVal, options: LinearOptions, wanted: list[Pooled]) -> tuple[Shares, list[str]]:
    """Return the shares of classifiers fitted by L-BFGS on features of centre crops, which are kept on disk."""
    shares: Shares = {}
    rows, labels_N, notes = dict[str, dict[Pooled, Tensor]](), dict[str, Tensor](), list[str]()
    for name, part in (("train", parts.train), ("val", parts.val)):
        rows[name] = kept_rows(model, part.source, wanted)
        reads_N = readable(rows[name][wanted[0]])
        bad = (~reads_N).nonzero()[:, 0].tolist()
        if len(bad) > MOST_UNREADABLE * len(reads_N):
            raise InputError(f"{part.source.describe()}: {len(bad):,} of {len(reads_N):,} images can't be read")
        labels_N[name] = torch.where(reads_N, part.labels_N, -1)
        notes += left_out(name, dict.fromkeys(bad, ""), part.source.name)
    n_classes, device = len(parts.train.class_names), model.machine.clustering_device
    for one in wanted:
        started = time.perf_counter()
        with model.work.track(f"fitting {one.stage}", None, "passes") as advance:
            learned = rows["train"][one], labels_N["train"], n_classes
            fitted = fit_logistic(*learned, seed=options.seed, device=device, advance=advance)
        shares[one] = fitted.accuracy(rows["val"][one], labels_N["val"], top=top_of(n_classes))
        model.work.reporter.say(
            f"{one.stage}: top-1 {100 * shares[one][0]:.1f}%  l2 {fitted.l2:g}  {duration(time.perf_counter() - started)}"
        )
    return shares, notes
