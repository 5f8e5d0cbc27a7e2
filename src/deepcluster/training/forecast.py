"""What is printed before a run starts, and once it is known how long an epoch takes."""

from deepcluster.core.progress import Reporter
from deepcluster.core.text import duration, size
from deepcluster.run.folder import RunFolder
from deepcluster.run.settings import Settings
from deepcluster.training.plan import Plan


def say_plan(plan: Plan, memory: str) -> None:
    """Print the opening lines: what will be done, with what, and how much memory it takes."""
    settings, say, n_ranks = plan.settings, plan.work.reporter.say, plan.work.ranks.size
    processes = f"{n_ranks} processes, each on " if n_ranks > 1 else ""
    say(
        f"{settings.arch}{' with Sobel' if settings.sobel else ''} at {settings.image_size} px, "
        f"{settings.describe_clusters()}, {settings.epochs} epochs; {processes}{plan.machine.describe()}; "
        f"into {plan.folder.path}"
    )
    if plan.changes:
        say(f"recipe {settings.recipe}: fitted to these images (the paper's settings are for 1.28 million photos)")
        for change in plan.changes:
            say(f"  {change}")
    weights = sum(weight.nbytes for weight in plan.trunk.parameters()) + 4 * plan.trunk.dim * settings.n_clusters
    say(f"memory: {memory}, weights, gradients and momentum {size(3 * weights)}; decoded images: {plan.cache.describe()}")


def say_time_left(folder: RunFolder, settings: Settings, reporter: Reporter) -> None:
    """Print how long the remaining epochs will take if they are like the last one."""
    last = folder.read_metrics()[-1]
    left = settings.epochs - last["epoch"]
    if left:
        seconds = sum(last["seconds"].values())
        reporter.say(f"an epoch takes {duration(seconds)}: about {duration(seconds * left)} for the {left} that are left")
