"""What settings must keep to beyond type, choices and bounds: rules of one of them, and rules between several."""

import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from deepcluster.core.errors import InputError
from deepcluster.data.crops import parse_crops
from deepcluster.models.archs import check_arch

if TYPE_CHECKING:
    from deepcluster.run.settings import Settings

# What deepcluster-v2 has no use for, and why where it is not plain. The defaults pass: a saved run has all options.
NOT_OF_V2 = {
    "clustering": "",
    "balance": "",
    "cluster_stage": "",
    "super_clusters": "",
    "rotations": "",
    "sampling": "",
    "head_lr": ", which has no head (--lr is the rate of all that it learns)",
    "head_momentum": ", which has no head (--momentum is that of all that it learns)",
    "memory": ", which keeps its points in memory",
}
# What the method of 2018 has no use for; `clusters` and `crops` have messages of their own, and it always whitens.
OF_V2_ALONE = ("small_crop_scale", "projection", "temperature")


def check_settings(settings: "Settings") -> None:
    """Raise `InputError` where a value is none that its option can have, or where two do not go together."""
    _check_values(settings)
    if settings.balance and settings.clustering != "kmeans":
        raise InputError(f"balance goes with clustering=kmeans, not with {settings.clustering}: leave out one of the two")
    if 0 < settings.reduce_to < settings.image_size:
        raise InputError(
            f"reduce_to={settings.reduce_to} is less than image_size={settings.image_size}, what the network sees; "
            f"use 0 (never), or {settings.image_size} or more"
        )
    if settings.method == "deepcluster-v2":
        _check_v2(settings)
    else:
        _check_first_version(settings)
        _check_super_clusters(settings)


def size_in_bytes(name: str, text: str) -> int | None:
    """Bytes of a size such as 8G, 500 MB or 1.5GiB (of 1,024³); None of auto.

    Raises:
        InputError: it is none of these.
    """
    if text == "auto":
        return None
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*(?:([KMGT])(I?))?B?", text.strip().upper())
    if match is None or float(match[1]) == 0:
        raise InputError(f"{name}={text!r} is not a size: use auto, or a number with K, M, G or T, such as 8G or 500M")
    number, letter, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(letter or " "))


def _check_values(settings: "Settings") -> None:
    """Rules of one option each."""
    check_arch(settings.arch)
    size_in_bytes("memory", settings.memory)
    size_in_bytes("cache_size", settings.cache_size)
    settings.cache_folder()
    if settings.crops:
        parse_crops(settings.crops)
    for name in ("crop_scale", "small_crop_scale"):
        low, high = getattr(settings, name)
        if not 0 < low <= high <= 1:
            raise InputError(f"{name}={low:g},{high:g} must be two shares with 0 < least <= most <= 1")
    if settings.temperature <= 0:
        raise InputError(f"temperature={settings.temperature:g} must be more than 0; 0.1 is usual")
    for name in ("grey", "jitter", "jitter_share", "blur"):
        if getattr(settings, name) > 1:
            raise InputError(f"{name}={getattr(settings, name):g} must lie between 0 and 1")


def _check_v2(settings: "Settings") -> None:
    side = settings.crop_groups[0][1]
    if side != settings.image_size:
        raise InputError(
            f"crops={settings.crops} begins with crops of {side} px, and image_size={settings.image_size}: they are "
            f"the same; use --image-size {side}"
        )
    usual = _defaults(settings)
    for name, why in NOT_OF_V2.items():
        value = getattr(settings, name)
        if value != usual[name]:
            raise InputError(f"{name}={value} does not go with method=deepcluster-v2{why}; leave it out")


def _check_first_version(settings: "Settings") -> None:
    if len(settings.heads) > 1:
        raise InputError(f"clusters={_shown(settings.clusters)}: several groupings go with --method deepcluster-v2 alone")
    if settings.crops:
        raise InputError(f"crops={settings.crops}: several crops of an image go with --method deepcluster-v2 alone")
    usual = _defaults(settings)
    for name in OF_V2_ALONE:
        value = getattr(settings, name)
        if value != usual[name]:
            raise InputError(f"{name}={_shown(value)} goes with --method deepcluster-v2 alone; leave it out")


def _check_super_clusters(settings: "Settings") -> None:
    if settings.super_clusters and (settings.clustering != "kmeans" or settings.balance):
        raise InputError("super_clusters goes with --clustering kmeans and without --balance")
    if settings.super_clusters > settings.n_clusters:
        raise InputError(f"super_clusters={settings.super_clusters} is more than clusters={settings.n_clusters}")
    if settings.rotations and not settings.super_clusters:
        raise InputError("rotations are learned with super-clusters: give --super-clusters, such as 4")
    if settings.rotations and not settings.looks_again:
        raise InputError("rotations go with --look-again")


def _defaults(settings: "Settings") -> dict[str, Any]:
    return {one.name: one.default for one in fields(settings)}


def _shown(value: Any) -> str:
    """As the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
