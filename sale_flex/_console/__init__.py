# SPDX-License-Identifier: BSD-3-Clause
"""What the commands share: files read and written, progress, where a result comes from."""
