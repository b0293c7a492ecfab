# SPDX-License-Identifier: BSD-3-Clause
"""``python -m sale_flex``: the same as the command ``sale-flex``."""

from sale_flex.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
