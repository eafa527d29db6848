"""``python -m lightning_plasticity.cli``."""

import sys

from lightning_plasticity.cli.main import main

sys.exit(main())
