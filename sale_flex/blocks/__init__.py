# SPDX-License-Identifier: BSD-3-Clause
"""The grid of blocks: positions, bits, packed codes, and the tuples that stages pass on. Plain torch."""
