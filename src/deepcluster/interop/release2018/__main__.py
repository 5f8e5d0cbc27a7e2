"""`python -m deepcluster.interop.release2018 SCRIPT ...`: the scripts of 2018 by name, one module each."""

import gc
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module

from deepcluster.core.errors import DeepClusterError, did_you_mean
from deepcluster.core.output import open_standard_files, safe_streams, silence
from deepcluster.core.text import visible
from deepcluster.core.wording import on_command_line

# Name of a script (its ending .py or .sh, and folders before it, may be given) → the module that has `main(words)`.
SCRIPTS = {
    "main": "main",
    "eval_linear": "eval_linear",
    "eval_voc_classif": "eval_voc_classif",
    "eval_retrieval": "eval_retrieval",
    "gradient_ascent": "gradient_ascent",
    "activ-retrieval": "activ_retrieval",
    "download_model": "download_model",
    "shims": "shims",
}
USAGE = f"""usage: python -m deepcluster.interop.release2018 {{{",".join(SCRIPTS)}}} ...

The scripts of DeepCluster's release of 2018, with their flags, files and printed lines; SCRIPT --help lists the flags.
`shims DIR` writes main.py, main.sh and so on into DIR, so that old shell scripts run there."""


def main(words: Sequence[str]) -> int:
    """Run a script of 2018; return the exit status: 0, 2 (wrong input), 130 (interrupted), or 1 (anything else)."""
    on_command_line()
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    name = words[0].rpartition("/")[2].removesuffix(".py").removesuffix(".sh").replace("activ_", "activ-")
    if name not in SCRIPTS:
        return _complain(f"no script {words[0]!r}{did_you_mean(name, SCRIPTS)}; it is one of {', '.join(SCRIPTS)}", 2)
    try:
        import_module(f"deepcluster.interop.release2018.{SCRIPTS[name]}").main(list(words[1:]))
    except DeepClusterError as fault:
        return _complain(str(fault), fault.exit_status)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except OSError as fault:  # What the system or a disk refuses.
        return _complain(f"{fault.strerror}: {fault.filename}" if fault.filename and fault.strerror else str(fault), 1)
    except Exception as fault:
        traceback.print_exception(fault)
        return _complain(f"unexpected {type(fault).__name__}: {fault}. This is a defect of deepcluster: please report it", 1)
    return 0


def run(words: Sequence[str]) -> int:
    """Run a script of 2018 as this process, which ends with it; streams that are closed or full end nothing."""
    open_standard_files()
    with safe_streams() as outputs:
        try:
            status = main(words)
        except SystemExit as ending:  # Of argparse: --help, or a wrong option.
            status = ending.code if isinstance(ending.code, int) else 0
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Nothing is left that could be interrupted.
    gc.freeze()  # Python would look through all that torch has made once more.
    for output in outputs:
        silence(output)
    return status


def _complain(message: str, status: int) -> int:
    print(f"deepcluster: {visible(message, lines=True)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
