"""`python -m drifting_diffusers.cli`, as `torchrun -m` starts it on every process."""

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
