"""`shims DIR`: the scripts of 2018 as files, so that old shell scripts and habits work: `cd DIR`, then `./main.sh`.

Each `.py` calls the module of its name here. The `.sh` files are new, around the variables that those of 2018 had.
An old one also runs, beside these `.py` files, once its paths are changed.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from deepcluster.core.errors import InputError
from deepcluster.interop.release2018.front_ends import FRONT_ENDS, FrontEnd

# Path below DIR → name of the script.
_PYTHON = {
    "main.py": "main",
    "eval_linear.py": "eval_linear",
    "eval_voc_classif.py": "eval_voc_classif",
    "eval_retrieval.py": "eval_retrieval",
    "visu/gradient_ascent.py": "gradient_ascent",
    "visu/activ-retrieval.py": "activ-retrieval",
}
_STUB = '''"""`{path}` of DeepCluster's release of 2018, run by today's `deepcluster`."""

import sys

from deepcluster.interop.release2018.__main__ import run

if __name__ == "__main__":
    sys.exit(run(["{name}", *sys.argv[1:]]))
'''

_BEGIN = """#!/bin/sh
# Change the values below, or set them in the environment: DIR=... {path}
set -e
HERE="$(dirname "$0")"
PYTHON="${{PYTHON:-{python}}}"
"""
# Path below DIR → variables with what they are, and commands.
_SHELL: dict[str, FrontEnd] = {
    "main.sh": (
        {
            "DIR": "/path/to/imagenet/train",
            "ARCH": "alexnet",
            "LR": "0.05",
            "WD": "-5",
            "K": "10000",
            "WORKERS": "12",
            "EXP": "$HOME/deepcluster_exp",
        },
        """"$PYTHON" "$HERE/main.py" "$DIR" --exp "$EXP" --arch "$ARCH" --lr "$LR" --wd "$WD" --k "$K" \\
    --sobel --verbose --workers "$WORKERS" "$@"
""",
    ),
    **FRONT_ENDS,
}


def shims() -> dict[str, str]:
    """Return the text of each file by its path below DIR."""
    python = {path: _STUB.format(path=path, name=name) for path, name in _PYTHON.items()}
    shell = {}
    for path, (variables, commands) in _SHELL.items():
        begin = _BEGIN.format(path=f"./{path}", python=re.sub(r'(["$`\\])', r"\\\1", sys.executable or "python"))
        values = "".join(f'{name}="${{{name}:-{value}}}"\n' for name, value in variables.items())
        shell[path] = f"{begin}{values}\n{commands}"
    return python | shell


def main(words: Sequence[str]) -> None:
    """Write the files into DIR, and print their paths.

    Raises:
        InputError: one of them is there already, with another content.
    """
    parser = argparse.ArgumentParser(
        prog="shims", description="Write the scripts of 2018, so that old shell scripts run on today's deepcluster."
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="folder for main.py, main.sh, visu/ and the others")
    folder, files = parser.parse_args(words).folder, shims()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file: give a folder")
    for path, text in files.items():
        if (folder / path).exists() and (folder / path).read_bytes() != text.encode():
            raise InputError(f"{folder / path} is there already and would be lost: give a new folder, or move it away")
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8", newline="\n")
        if path.endswith(".sh"):
            file.chmod(0o755)
        print(file)
