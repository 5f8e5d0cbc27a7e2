"""The random views that a run trains on, of one image, and what its network predicts for them.

C channels, H and W pixels, D features, K clusters, V views, G clusterings that are trained on side by side, R random numbers
of a view.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deepcluster.data.multi_crop import crop_draws
from deepcluster.data.views import CROP_ATTEMPTS, TrainingView, rotate_quarters
from deepcluster.visualization.report.method.explained import Explained, Floats

# Random views of an image that are shown of a run of the first version.
VIEWS = 6


@dataclass(frozen=True)
class View:
    """A random view of an image that training drew.

    Attributes:
        cut_CHW: uint8, before colours change.
        coloured_CHW: as the network gets it, before it is normalised: uint8, or in [0, 1]; on the CPU.
        box_4: top, left, height and width in its image, pixels.
        is_large: whether it is one of DeepCluster-v2's large crops, or a view of the first version.
    """

    cut_CHW: Tensor
    coloured_CHW: Tensor
    box_4: tuple[int, ...]
    is_large: bool
    is_flipped: bool
    is_grey: bool
    is_blurred: bool


@dataclass(frozen=True)
class TrainingViews:
    """What the last trained epoch showed of one image, and what the network predicts for it now.

    Attributes:
        times: how often the epoch drew the image.
        n_drawn: number of `views`, from the first on, that the epoch drew; the others are what other draws would have made.
        views: random views.
        labels: cluster of the image in each of the G clusterings, -1 = none.
        sizes: number of images with the same label, in each clustering.
        rows_VD: what the predictions are made from: features, or points on the sphere of DeepCluster-v2.
        predictions: log-probability (V, K), float64, of each cluster for each view, in each clustering.
        centre_K: log-probability, float64, of each cluster of the first clustering for the centre view.
        guess: cost of blind guessing, in nats, the mean over clusterings.
    """

    times: int
    n_drawn: int
    views: list[View]
    labels: list[int]
    sizes: list[int]
    rows_VD: Tensor
    predictions: list[Tensor]
    centre_K: Tensor
    guess: float

    @property
    def losses_VG(self) -> Floats:
        """Cross-entropy of each view in each clustering; 0 where there is no label."""
        columns = [
            -log_VK[:, label] if label >= 0 else log_VK.new_zeros(len(log_VK))
            for log_VK, label in zip(self.predictions, self.labels, strict=True)
        ]
        losses_VG: Floats = torch.stack(columns, dim=1).numpy()
        return losses_VG


def training_views(run: Explained, image_HWC: Tensor, index: int) -> TrainingViews | None:
    """Return what the last trained epoch showed of an image; None where there is no head, or v2 did not draw the image."""
    drawn, quarters = run.positions(index), 0
    if not len(run.labels_GN) or (run.version == 2 and not len(drawn)):
        return None
    shown, n_drawn = drawn[:1], run.view.n_views
    if run.version == 1:
        n_drawn, quarters = min(len(drawn), VIEWS), run.quarters(index)
        others = np.setdiff1d(np.arange(2 * VIEWS), drawn[:VIEWS])[: VIEWS - n_drawn]
        shown = np.concatenate([drawn[:VIEWS], others])
    views = [view for position in shown.tolist() for view in random_views(run, image_HWC, position, quarters)]
    rows_VD = torch.cat([run.rows(view.coloured_CHW[None]) for view in views])
    centre_1CHW = rotate_quarters(run.cluster_view([image_HWC]), torch.tensor([quarters]))
    labels = run.labels_GN[:, index].tolist()
    return TrainingViews(
        times=len(drawn),
        n_drawn=n_drawn,
        views=views,
        labels=labels,
        sizes=[int((labels_N == label).sum()) for labels_N, label in zip(run.labels_GN, labels, strict=True)],
        rows_VD=rows_VD.double().cpu(),
        predictions=run.predictions(rows_VD),
        centre_K=run.predictions(run.rows(centre_1CHW))[0][0],
        guess=run.guess(labels[0]),
    )


def random_views(run: Explained, image_HWC: Tensor, position: int, quarters: int = 0) -> list[View]:
    """Return the random views of an image at a position of the last trained epoch, as the run drew them.

    Args:
        quarters: number of quarter turns by which they are rotated.
    """
    draws_VR = crop_draws(run.settings.seed, run.trained_epoch, position, 1, run.view.n_views)[0]
    cuts = [cut_CHW for cut_VCHW in run.view([image_HWC], draws_VR[None]) for cut_CHW in cut_VCHW]
    kinds = [kind for kind, (count, _) in zip(run.view.views, run.view.crops, strict=True) for _ in range(count)]
    return [
        _view(run, image_HWC, cut_CHW, kind, draws_VR[number : number + 1], quarters)
        for number, (cut_CHW, kind) in enumerate(zip(cuts, kinds, strict=True))
    ]


def _view(run: Explained, image_HWC: Tensor, cut_CHW: Tensor, kind: TrainingView, draws_1R: Floats, quarters: int) -> View:
    given_1CHW = run.model.machine.put(cut_CHW[None])
    coloured_1CHW = run.colours(given_1CHW, draws_1R)
    sharp_1CHW = replace(run.colours, blur=0.0)(given_1CHW, draws_1R)
    vivid_1CHW = replace(run.colours, grey=0.0)(given_1CHW, draws_1R)
    sides = (np.full(1, side) for side in image_HWC.shape[:2])
    return View(
        cut_CHW=cut_CHW,
        coloured_CHW=rotate_quarters(coloured_1CHW, torch.tensor([quarters]))[0].cpu(),
        box_4=tuple(kind.boxes(draws_1R, *sides)[0].tolist()),
        is_large=kind is run.view.views[0],
        is_flipped=kind.flip and bool(draws_1R[0, 2 * CROP_ATTEMPTS + 2] < 0.5),
        is_grey=not torch.equal(coloured_1CHW, vivid_1CHW),
        is_blurred=not torch.equal(coloured_1CHW, sharp_1CHW),
    )
