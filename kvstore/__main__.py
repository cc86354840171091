"""`python -m kvstore`: runs one store node, through `services.store`; the package's only way up."""

from __future__ import annotations

import sys

from services.store.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
