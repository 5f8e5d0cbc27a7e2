"""The settings once more, as type checkers want the keyword arguments of `deepcluster.train`; a test keeps them the same."""

from typing import TypedDict


class Options(TypedDict, total=False):
    """The settings as keyword arguments of `deepcluster.train`; those left out are the recipe's."""

    method: str
    recipe: str
    arch: str
    init: str | None
    image_size: int
    reduce_to: int
    sobel: bool
    dropout: float
    clustering: str
    balance: bool
    clusters: int | tuple[int, ...]
    pca: int
    kmeans_iterations: int
    cluster_stage: str
    reassign_every: int
    look_again: bool | None
    stop_reassigning: int
    super_clusters: int
    rotations: bool
    epochs: int
    batch_size: int
    lr: float
    lr_schedule: str
    warmup_epochs: float
    optimizer: str
    clip_gradient: float
    momentum: float
    head_lr: float | None
    head_start: str
    head_momentum: float
    weight_decay: float
    sampling: str
    crop_scale: tuple[float, float]
    crops: str
    small_crop_scale: tuple[float, float]
    flip: bool
    jitter: float
    jitter_share: float
    grey: float
    blur: float
    projection: tuple[int, int]
    whiten: bool
    temperature: float
    seed: int
    device: str
    precision: str
    compile: bool
    workers: int | None
    cache: str
    cache_size: str
    memory: str
    limit: int | None
    eval_every: int
    eval_with: str
    checkpoint_minutes: float
    checkpoint_every: int
    tensorboard: bool
