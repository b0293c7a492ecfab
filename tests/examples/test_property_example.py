# SPDX-License-Identifier: BSD-3-Clause
"""The example of testing a foreign kernel finds the bug planted in it, and none in the corrected kernel."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "property_test_your_kernel.py"


def test_the_example_finds_its_bug(tmp_path):
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    bug, corrected = done.stdout.splitlines()
    heads = re.match(r"kernel with a bug: found at Shape\(q_len=\d+, .*\bheads=(\d+), kv_heads=2", bug)
    assert heads, bug
    assert int(heads[1]) & (int(heads[1]) - 1), f"{bug}: right for powers of two"
    assert re.fullmatch(r"corrected kernel: \d+ calls of all shapes are right", corrected), corrected
