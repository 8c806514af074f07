"""`python -m influence_fast`, which launchers such as torchrun start."""

import sys

from influence_fast.cli import main

sys.exit(main())
