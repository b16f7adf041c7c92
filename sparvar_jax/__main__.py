"""`python -m sparvar_jax`: the same as the `sparvar` command."""

import sys

from sparvar_jax.cli import main

sys.exit(main())
