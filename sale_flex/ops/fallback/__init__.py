# SPDX-License-Identifier: BSD-3-Clause
"""Every op in vectorised torch, for machines without a CUDA device: the kernels' arithmetic in bounded memory."""
