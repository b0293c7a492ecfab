# SPDX-License-Identifier: BSD-3-Clause
"""One attention call: checked, settled, and taken through its stages."""
