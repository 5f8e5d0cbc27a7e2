"""`python -m deepcluster.interop.release2018 SCRIPT ...`: the scripts of 2018 by name, one module each."""

import sys
from collections.abc import Sequence
from importlib import import_module

from deepcluster.core.errors import DeepClusterError

# Name of a script (its ending .py, and the folder visu/, may be left out) → the module that has `main(arguments)`.
SCRIPTS = {
    "main": "main",
    "eval_linear": "eval_linear",
    "eval_voc_classif": "eval_voc_classif",
    "eval_retrieval": "eval_retrieval",
    "gradient_ascent": "gradient_ascent",
    "activ-retrieval": "activ_retrieval",
    "download_model": "download_model",
}


def main(words: Sequence[str]) -> int:
    """Run a script of 2018; return the exit status: 0, 2 (wrong input), 130 (interrupted), or 1 (anything else)."""
    name = words[0].removeprefix("visu/").removesuffix(".py").removesuffix(".sh") if words else ""
    if name not in SCRIPTS:
        print(f"usage: python -m deepcluster.interop.release2018 {{{','.join(SCRIPTS)}}} ...", file=sys.stderr)
        return 2
    try:
        import_module(f"deepcluster.interop.release2018.{SCRIPTS[name]}").main(list(words[1:]))
    except DeepClusterError as fault:
        print(f"deepcluster: {fault}", file=sys.stderr)
        return fault.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
