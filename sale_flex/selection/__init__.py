# SPDX-License-Identifier: BSD-3-Clause
"""What chooses blocks: rules, and the codes that they keep of earlier keys."""
