"""What a run says of itself before it starts, and once it knows how long an epoch takes."""

from deepcluster.core.distributed import world_size
from deepcluster.core.progress import Reporter
from deepcluster.core.text import duration, size
from deepcluster.run.folder import RunFolder
from deepcluster.run.settings import Settings
from deepcluster.training.grouping import super_classes
from deepcluster.training.plan import Plan


def say_plan(plan: Plan, memory: str, reporter: Reporter) -> None:
    """The opening lines: what will be done, with what, and how much memory it takes."""
    settings = plan.settings
    reporter.say(
        f"{settings.arch}{' with Sobel' if settings.sobel else ''} at {settings.image_size} px, "
        f"{settings.describe_clusters()}, {settings.epochs} epochs; {_processes()}{plan.machine.describe()}; "
        f"into {plan.folder.path}"
    )
    if plan.changes:
        reporter.say(f"recipe {settings.recipe}: fitted to these images (the paper's settings are for 1.28 million photos)")
        for change in plan.changes:
            reporter.say(f"  {change}")
    # With super-clusters each of several processes has a part of the head; that of the fullest is a little more.
    parts = min(world_size(), super_classes(settings)) or 1
    weights = sum(weight.nbytes for weight in plan.trunk.parameters())
    weights += 4 * plan.trunk.dim * -(-settings.n_clusters // parts)
    reporter.say(
        f"memory: {memory}, weights, gradients and momentum {size(3 * weights)}; decoded images: {plan.cache.describe()}"
    )


def _processes() -> str:
    return f"{world_size()} processes, each on " if world_size() > 1 else ""


def say_time_left(folder: RunFolder, settings: Settings, reporter: Reporter) -> None:
    """How long the epochs that are left will take, if they are like the last."""
    last = folder.read_metrics()[-1]
    left = settings.epochs - last["epoch"]
    if left:
        seconds = sum(last["seconds"].values())
        reporter.say(f"an epoch takes {duration(seconds)}: about {duration(seconds * left)} for the {left} that are left")
