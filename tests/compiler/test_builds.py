# SPDX-License-Identifier: BSD-3-Clause
"""Generated functions compile for a GPU, on a machine without one; run as a script, this file compiles them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="mods become Triton functions, and triton is not installed")
tl = pytest.importorskip("triton.language")

INTS = torch.arange(30).view(5, 6)
BYTES = INTS.to(torch.uint8)
FLAGS = INTS > 7
HALVES = INTS.half()
DOUBLES = INTS.double()
SCALAR = torch.tensor(3)
ONES = torch.ones(1, 6, 1)


def integers(s, b, h, q, kv):
    steps = q // 3 + kv % 5 + torch.fmod(q, 7) + torch.div(kv, 3, rounding_mode="trunc") + q // 8 + kv % 16
    return s + steps + (q << (kv & 3)) + (kv >> (q & 7)) + (q >> 2) + 2 ** (kv % 7) + torch.sign(q - kv) + (~q & kv) ^ h


def captures(s, b, h, q, kv):
    at = ONES[q, kv, h] + INTS[q, kv] + BYTES[-q, INTS[h, kv]] + FLAGS[q][kv] + SCALAR + INTS.cumsum(0)[q, b]
    return s * HALVES[h, q] + DOUBLES[q, h] * at + torch.tensor(2.5) + (BYTES[q, h] - 3) // 2


def functions(s, b, h, q, kv):
    x = s * 0.1
    parts = torch.tanh(x) + torch.exp(x) + torch.exp2(x) + torch.log(s.abs() + 1) + torch.log2(s.abs() + 1) + x**3
    parts = parts + torch.sqrt(x.abs()) + torch.rsqrt(x.abs() + 1) + torch.sigmoid(x) + torch.sin(x) + torch.erf(x)
    parts = (
        parts
        + torch.floor(x)
        + torch.round(x)
        + torch.trunc(x)
        + torch.ceil(x)
        + x % 3
        + x // 2.5
        + torch.fmod(x, q + 1)
    )
    parts = parts + 3.0**x + torch.maximum(x, s) + x.clamp(-1, 2) + torch.where(torch.isnan(s) | torch.isinf(x), 0.0, x)
    return parts + torch.cos(x) + x.double() * 0.1 + torch.tanh(x.double()) + s.half() + s.bfloat16() * 3 + q / kv


MODS: dict[str, Any] = {
    "score integers": lambda s, b, h, q, kv: integers(s.int(), b, h, q, kv),
    "score captures": captures,
    "score functions": functions,
    "score constant": lambda s, b, h, q, kv: 1.0,
    "mask constant": lambda b, h, q, kv: True,
    "mask of scalars": lambda b, h, q, kv: (h > 2) & ~(b == 1) | (h * 0.5 < 1.0),
    "mask window": lambda b, h, q, kv: (q - kv <= 5) & (q >= kv) & (INTS[b, q] == INTS[b, kv]),
    "mask bools": lambda b, h, q, kv: ((q > 3) + (kv > 3)) * (q < 9) | torch.logical_xor(q, kv),
    "range": lambda b, h, first, last: (torch.clamp(first - 5, 0), INTS[b, last]),
}


@triton.jit
def _apply(out, AUX, b, h, q_len, kv_len, KIND: tl.constexpr, MOD: tl.constexpr):
    q = tl.program_id(0) * 32 + tl.arange(0, 32)[:, None]
    kv = tl.program_id(1) * 32 + tl.arange(0, 32)[None, :]
    place = q.to(tl.int64) * kv_len + kv
    if KIND == "score":
        value = MOD(tl.load(out + place), b, h, q, kv, AUX)
    elif KIND == "mask":
        value = tl.where(MOD(b, h, q, kv, AUX), 1.0, 0.0)
    else:
        first, last = MOD(b, h, tl.program_id(0), tl.program_id(1), AUX)
        value = (first + last).to(tl.float32)
    tl.store(out + place, tl.zeros([32, 32], tl.float32) + value)


def type_of(x: Any) -> str:
    names = {torch.bool: "i1", torch.uint8: "u8", torch.float16: "fp16", torch.float64: "fp64"}
    if isinstance(x, int):
        return "i32" if x != 1 else "constexpr"  # as a launch would have it
    return "*" + names.get(x.dtype, str(x.dtype).replace("torch.int", "i").replace("torch.float", "fp"))


def build_all(capability: int) -> None:
    """Compile every mod and print a line of JSON for each."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sale_flex.mods.compiler import describe, program, require_supported

    for name, mod in MODS.items():
        kind = name.split()[0]
        described = describe(mod, kind)
        require_supported(described.key, name)
        found = program(described.key)
        aux = tuple(type_of(x) for x in found.arguments(described.tensors))
        scalars = dict.fromkeys(("b", "h", "q_len", "kv_len"), "i32")
        signature = {"out": "*fp32", "AUX": aux, **scalars, "KIND": "constexpr", "MOD": "constexpr"}
        ones = {(1, place): 1 for place, type_name in enumerate(aux) if type_name == "constexpr"}
        source = ASTSource(fn=_apply, signature=signature, constexprs={**ones, (6,): kind, (7,): found.triton})
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        print(json.dumps({"mod": name, "cubin": len(built.asm["cubin"])}))


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_generated_functions_compile(capability):
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__)), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=compiling)
    assert done.returncode == 0, done.stderr
    built = [json.loads(line) for line in done.stdout.splitlines()]
    assert [x["mod"] for x in built] == list(MODS)
    assert all(x["cubin"] for x in built)


if __name__ == "__main__":
    build_all(int(sys.argv[1]))
