# SPDX-License-Identifier: BSD-3-Clause
"""`sale-flex eval`: what rules cost a model on text, beside dense attention, and a verdict."""
