"""The page of public functions and classes: every name of `deepcluster.__all__`, from its docstring."""

import inspect
from dataclasses import fields

import deepcluster
from deepcluster.cli import cli
from deepcluster.core.options import flag, plain_type

# Sections of the page, and the names in them. A name that none of them has comes under "More".
SECTIONS = {
    "Train and use a model": ("train", "embed", "assign", "cluster", "load", "Model", "register"),
    "Results": ("Run", "Embeddings", "Clusters", "name_clusters"),
    "Find and choose images": ("similar", "duplicates", "sample", "compare"),
    "See and evaluate": ("report", "evaluate"),
    "Other programs": ("export", "import_file", "download"),
    "The clustering engine": ("KMeans", "BalancedKMeans", "PowerIterationClustering", "Whitening", "Assignment"),
    "More": (),
    "Settings": ("Settings",),
    "Errors": ("DeepClusterError", "InputError", "TrainingError", "Interrupted"),
}


def functions_page() -> str:
    """Return the Markdown of the page, with the blocks that mkdocstrings fills."""
    placed = {name for names in SECTIONS.values() for name in names}
    parts = [
        "# Functions and classes",
        "What `import deepcluster` offers. The functions have the names and defaults of the "
        "[commands](commands/index.md). [Python and notebooks](../python.md) shows them in use.",
    ]
    for title, names in SECTIONS.items():
        here = [name for name in names if name in deepcluster.__all__]
        if title == "More":
            here = [name for name in deepcluster.__all__ if name not in placed]
        if here:
            parts.append(f"## {title}")
            parts += [_block(name) for name in here]
    return "\n\n".join(parts) + "\n"


def _block(name: str) -> str:
    if name != "Settings":
        return f"::: deepcluster.{name}{_options(name)}"
    rows = ["| field | type | default of the paper | |", "|---|---|---|---|"]
    for one in fields(deepcluster.Settings):
        kind = getattr(plain_type(deepcluster.Settings, one.name)[0], "__name__", "")
        anchor = f"commands/train.md#train{flag(one.name)}"
        default = "" if one.default in (None, "") else f"`{one.default}`"
        rows.append(f"| [`{one.name}`]({anchor}) | {kind} | {default} | {one.metadata['help'].replace('|', ', ')} |")
    options = "    options:\n      members: false\n      show_signature: false\n"
    return f"::: deepcluster.Settings\n{options}\n" + "\n".join(rows)


def _options(name: str) -> str:
    """Return a line that says where the options of a function are listed, if it has any that its signature does not name."""
    function = getattr(deepcluster, name)
    if not inspect.isfunction(function) or name not in cli.commands:
        return ""
    more = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in inspect.signature(function).parameters.values())
    text = "\n\nThe other options are those of" if more or name == "train" else "\n\nThe command:"
    return f"{text} [`deepcluster {name}`](commands/{name}.md)."
