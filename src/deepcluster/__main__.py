"""`python -m deepcluster`, as `torchrun -m deepcluster` starts it."""

import sys

from deepcluster.cli import main

sys.exit(main())
