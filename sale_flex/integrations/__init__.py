# SPDX-License-Identifier: BSD-3-Clause
"""sale_flex inside other libraries: a package per library, imported only by name."""
