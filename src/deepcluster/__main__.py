"""`deepcluster`, and `python -m deepcluster`, as `torchrun -m deepcluster` starts it."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # While the command line is imported, Ctrl-C ends without a traceback.

from deepcluster.cli import main

if __name__ == "__main__":
    sys.exit(main())
