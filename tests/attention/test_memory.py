# SPDX-License-Identifier: BSD-3-Clause
"""What a machine without a GPU needs: 16K tokens and 8 heads within 4 GiB, interpreter and compiler included."""

import subprocess
import sys

import pytest

resource = pytest.importorskip("resource", reason="peak memory is read from the operating system")

PROGRAM = """
import resource, sys
import torch
from sale_flex import AuxRequest, Path, SaleConfig, create_sale_block_mask, sale_attention
from sale_flex.testing import Shape, structured_inputs

shape = Shape(16384, 16384, heads=8, kv_heads=int(sys.argv[1]), head_dim=64)
inputs = structured_inputs(shape)
config = SaleConfig.from_options(sys.argv[3], threshold=0.1, bits=8, min_length=1024)
if sys.argv[2] == "mask":
    _, stats = create_sale_block_mask(inputs.query, inputs.key, config, stats=True)
else:
    _, (_, stats) = sale_attention(*inputs, config, return_aux=AuxRequest(stats=True))
assert stats.path is Path.FLEX
kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(kib if sys.platform.startswith("linux") else kib // 1024, float(stats.density.mean()))
"""


@pytest.mark.parametrize(("kv_heads", "call", "metric"), [(1, "mask", "relative"), (8, "attention", "mass")])
def test_sixteen_thousand_tokens_fit_in_four_gib(kv_heads, call, metric):
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(kv_heads), call, metric], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kib, density = done.stdout.split()
    assert int(kib) < 4 * 2**20
    assert float(density) < 0.5
