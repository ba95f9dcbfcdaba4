"""``python -m dattri_core``: the command line where the script ``dattri`` is not on the path."""

from __future__ import annotations

import sys

from dattri_core.cli import main

sys.exit(main())
