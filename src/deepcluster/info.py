"""`info`, `doctor` and `cache`: describe a run, a checkpoint or images, this machine, and what is kept between runs."""

import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from deepcluster.core.addresses import is_address
from deepcluster.core.device import Machine, cpu_has_bf16, free_disk_bytes, free_memory_bytes
from deepcluster.core.errors import InputError
from deepcluster.core.files import user_path, usual_cache_folder
from deepcluster.core.limits import usable_cores
from deepcluster.core.progress import Reporter
from deepcluster.core.text import count_of, size
from deepcluster.data.loader import usual_workers
from deepcluster.data.sources import ImageSource, open_source
from deepcluster.data.survey import Look, even_sample, looks
from deepcluster.interop.loading import UNTRAINED, arch_and_path, load
from deepcluster.interop.weight_files import CAFFE_FILES, SAFETENSORS, TORCH_FILES, has_hub_files
from deepcluster.models.archs import ARCHITECTURES, PREFIXES
from deepcluster.models.trunk import Trunk
from deepcluster.run.cache_report import clear, kept
from deepcluster.run.cluster_names import read_names
from deepcluster.run.features import make_run_trunk
from deepcluster.run.folder import RunFolder, versions
from deepcluster.run.metrics import epoch_line
from deepcluster.run.model import Model
from deepcluster.run.settings import Settings
from deepcluster.run.space import PredictionSpace, ProjectedSpace

# Read in a few seconds; of more images, as many spread evenly.
MOST = 10_000
SHOWN = 5
BAR = 30
MOMENT = "%Y-%m-%d %H:%M"


def info(path: str, *, everything: bool = False, reporter: Reporter | None = None) -> str:
    """Describe a run folder, a checkpoint, `untrained:ARCH`, `ARCH@pretrained`, an architecture, or images.

    Args:
        everything: read all images instead of a sample of 10,000.
        reporter: shows progress.

    Raises:
        InputError: it is none of these.
    """
    if (
        path.startswith(UNTRAINED)
        or path.endswith((*TORCH_FILES, *CAFFE_FILES, SAFETENSORS))
        or has_hub_files(user_path(path))
        or arch_and_path(path)[0]
    ):
        return _about_model(load(path))
    if (path in ARCHITECTURES or path.startswith(PREFIXES)) and not Path(path).exists():
        return _about_model(load(UNTRAINED + path))
    if not is_address(path) and RunFolder(user_path(path)).is_run():
        return _about_run(RunFolder(user_path(path)))
    reporter = reporter or Reporter(quiet=True)
    source = open_source(path, on_trouble=reporter.warn)
    sample = even_sample(range(len(source)), len(source) if everything else MOST)
    with reporter.track("reading images", len(sample)) as progress:
        found = list(looks(source, sample, usual_workers(), progress, whole=True))
    return "\n".join(_about_images(source, found))


def _about_images(source: ImageSource, found: Sequence[tuple[int, Look]]) -> Iterator[str]:
    """Yield what was found in some images: how large they are, copies of each other, and which can't be read."""
    yield source.describe()
    if len(found) < len(source):
        yield f"read {len(found):,} of them, spread evenly (--all reads all):"
    sizes = Counter(look.sides[::-1] for _, look in found if look.reason is None)
    # Sizes themselves where they are few, else the shorter sides by powers of two.
    if len(sizes) <= SHOWN:
        rows = [(f"{width} × {height}", count) for (width, height), count in sizes.most_common()]
    else:
        sides: Counter[int] = Counter()
        for (width, height), count in sizes.items():
            sides[min(width, height).bit_length()] += count
        rows = [(f"shorter side {1 << bits - 1}–{(1 << bits) - 1}", sides[bits]) for bits in sorted(sides)]
    most, broad = max((count for _, count in rows), default=1), max((len(label) for label, _ in rows), default=0)
    for label, count in rows:
        yield f"  {label:<{broad}}  {'█' * max(1, round(BAR * count / most))} {count:,}"
    same: dict[bytes, list[int]] = {}
    reasons: dict[str, list[int]] = {}
    for index, look in found:
        if look.digest is not None:
            same.setdefault(look.digest, []).append(index)
        if look.reason is not None:  # Without the numbers in it, which differ from file to file.
            reasons.setdefault(look.reason.partition(":")[0], []).append(index)
    groups = [group for group in same.values() if len(group) > 1]
    copies = sum(len(group) - 1 for group in groups)
    if copies:
        examples = "; ".join(" = ".join(source.name(i) for i in group[:3]) for group in groups[:SHOWN])
        yield f"{copies:,} {'copy' if copies == 1 else 'copies'} of other images, byte for byte, e.g. {examples}"
    else:
        yield "no copies of other images, byte for byte"
    if not reasons:
        yield "none that can't be read"
        return
    yield f"{count_of(sum(map(len, reasons.values())), 'image')} can't be read:"
    for reason, indices in sorted(reasons.items(), key=lambda item: -len(item[1]))[:SHOWN]:
        yield f"  {reason}: {len(indices):,}, e.g. {source.name(indices[0])}"


def _about_run(folder: RunFolder) -> str:
    config, metrics = folder.read_config(), folder.read_metrics()
    if clustered := folder.clustered():
        return _about_clustered(folder, config, clustered)
    settings = Settings.from_saved(config["settings"])
    usual = Settings().as_dict()
    others = []
    for name, value in settings.as_dict().items():
        if value != usual[name]:
            others.append(f"{name}={','.join(map(str, value)) if isinstance(value, list | tuple) else value}")
    lines = [f"run {folder.path}: {config['data']['description']}"]
    if config["data"].get("address", True):  # An imported model was not trained with these settings.
        lines += [
            f"{settings.arch} at {settings.image_size} px, {settings.describe_clusters()}, "
            f"{len(metrics)} of {count_of(settings.epochs, 'epoch')}",
            f"settings other than the paper's: {', '.join(others)}",
        ]
    else:
        lines.append(f"{settings.arch}{' with Sobel' if settings.sobel else ''} at {settings.image_size} px")
    with suppress(InputError):  # The library of its trunk may be missing here.
        lines += _about_stages(make_run_trunk(settings), settings)
    if metrics:
        lines.append(epoch_line(metrics[-1], settings.epochs))
    lines += _about_commands(folder, config)
    lines += [f"checkpoint {path}, {size(path.stat().st_size)}" for path in sorted(folder.checkpoints.glob("*.pt"))]
    newest = folder.newest_clusters()
    lines += [f"clusters of each image: {newest}"] if newest else []
    return "\n".join(lines)


def _about_commands(folder: RunFolder, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield when a run was started, when it last wrote into its log, the commands that made it, and names of clusters."""
    moments = []
    with suppress(TypeError, ValueError):  # Earlier versions did not write it.
        moments.append(f"started {datetime.fromisoformat(config.get('started')):{MOMENT}}")  # type: ignore[arg-type]
    with suppress(OSError, IndexError, ValueError):
        last = folder.log.read_text(encoding="utf-8", errors="replace").splitlines()[-1]
        moments.append(f"last line of its log {datetime.fromisoformat(last[:19]):{MOMENT}}")
    if moments:
        yield "; ".join(moments)
    commands = [*(config.get("earlier_commands") or ()), *filter(None, [config.get("command")])]
    for number, command in enumerate(commands, 1):
        yield f"command{f' {number} of {len(commands)}' if len(commands) > 1 else ''}: {command}"
    if names := read_names(folder.path):
        yield f"{count_of(len(names), 'cluster')} with a name: deepcluster names {folder.path} shows them"


def _about_clustered(folder: RunFolder, config: dict[str, Any], clustered: dict[str, Any]) -> str:
    """Describe a run that `deepcluster cluster` made."""
    settings = Settings.from_saved(config["settings"])
    whitened = f"{settings.pca} whitened components" if clustered["whitened"] else "rows of unit length"
    lines = [
        f"run {folder.path}: {config['data']['description']}",
        f"clustered, not trained: {settings.describe_clusters()} of {whitened}, by {settings.clustering}",
    ]
    if clustered["stage"]:
        lines.append(
            f"features: stage {clustered['stage']} of {clustered['model']}: "
            f"{settings.arch}{' with Sobel' if settings.sobel else ''} at {settings.image_size} px"
        )
        with suppress(InputError):  # The library of its trunk may be missing here.
            lines += _about_stages(make_run_trunk(settings), settings)
    else:
        lines.append(f"features: the table {clustered['model']}; the run has no network")
    lines += _about_commands(folder, config)
    lines += [f"checkpoint {folder.last}, {size(folder.last.stat().st_size)}"] if folder.last.is_file() else []
    return "\n".join([*lines, f"clusters of each image: {folder.clusters}"])


def _about_model(model: Model) -> str:
    trunk, settings = model.trunk, model.settings
    weights = sum(weight.numel() for weight in trunk.parameters())
    lines = [
        f"{model.name}: {settings.arch}{' with Sobel' if settings.sobel else ''}, {weights:,} weights, "
        f"made for images of {settings.image_size} px",
        *_about_stages(trunk, settings),
    ]
    if model.centroids_KP is not None:
        clusters, components = model.centroids_KP.shape
        match model.space:
            case ProjectedSpace():
                space = f"on a sphere of {components} projected features"
            case PredictionSpace():
                space = "that the last layer predicts"
            case _:
                space = f"in a space of {components} whitened features"
        lines.append(f"{clusters:,} clusters {space}")
    if model.remark:
        lines.append(f"used {model.remark}")
    return "\n".join(lines)


def _about_stages(trunk: Trunk, settings: Settings) -> list[str]:
    blank = torch.zeros(1, 3, settings.image_size, settings.image_size, dtype=next(trunk.parameters()).dtype)
    with torch.no_grad():
        shapes = {name: tuple(trunk.eval().stage(blank, name).shape[1:]) for name in trunk.stages}
        width = trunk.vectors(blank, trunk.embed_stage).shape[1]
    return [
        "stages (channels, height, width): " + ", ".join(f"{name} {shape}" for name, shape in shapes.items()),
        f"embed gives {trunk.embed_stage} by default, {width} numbers per image",
    ]


def cache_info(folder: Path | None = None) -> str:
    """Return what is kept in the cache folder (None: the usual one), one line each."""
    folder = folder or usual_cache_folder()
    things = kept(folder)
    lines = [f"{folder}: {size(sum(thing.bytes for thing in things))}, {size(free_disk_bytes(folder))} free on its disk"]
    return "\n".join([*lines, *(f"  {thing.describe()}" for thing in things)])


def cache_clear(kinds: Sequence[str] = (), folder: Path | None = None) -> str:
    """Delete what is kept in the cache folder (None: the usual one), or some kinds of it; return how much that was.

    Raises:
        InputError: an unknown kind.
    """
    folder = folder or usual_cache_folder()
    return f"{size(clear(folder, kinds))} deleted in {folder}"


def doctor() -> str:
    """Return what this machine offers, one fact per line."""
    machine, cores, usable = Machine.choose(), os.cpu_count() or 1, usable_cores()
    # A container or job may have some of them.
    available = f"{usable} of {count_of(cores, 'core')}" if usable < cores else count_of(cores, "core")
    facts: dict[str, Any] = {
        "would run on": machine.describe(),
        "processor": f"{platform.machine()}, {available}, {'fast' if cpu_has_bf16() else 'slow'} at bf16",
        "product of two 1,024 × 1,024 matrices": ", ".join(
            f"{precision} {_product_gflops(machine, dtype):,.0f} GFLOP/s"
            for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
        ),
        "CUDA": _cuda(),
        "memory free": size(free_memory_bytes()),
        "disk free here": size(shutil.disk_usage(".").free),
        "processes that prepare images": usual_workers(),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    return "\n".join(f"{name + ':':<42}{value}" for name, value in facts.items())


def _cuda() -> str:
    if not torch.cuda.is_available():
        return "no device" + ("" if torch.version.cuda else " (this torch is built without CUDA)")
    return ", ".join(
        f"cuda:{i} {torch.cuda.get_device_name(i)}, {size(torch.cuda.get_device_properties(i).total_memory)}"
        for i in range(torch.cuda.device_count())
    )


def _product_gflops(machine: Machine, dtype: torch.dtype) -> float:
    """Return the rate of a matrix product, the best of several."""
    side = 1024
    a = torch.randn(side, side, device=machine.device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2e-9 * side**3 / best
