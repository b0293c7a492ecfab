# SPDX-License-Identifier: BSD-3-Clause
"""The sparse half: compiled flex_attention on a block mask."""
