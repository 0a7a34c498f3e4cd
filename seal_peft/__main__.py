"""`python -m seal_peft` is the command line."""

import sys

from .cli import main

sys.exit(main())
