# SPDX-License-Identifier: BSD-3-Clause
"""The Triton kernels of sale_flex, installed as ``sale_flex.kernels``."""

if __name__ == "kernels":
    # Imported by a bare name: the root of a checkout is on ``sys.path`` (``python -m``, ``python -c``, a notebook),
    # and this folder hides Hugging Face's package ``kernels``, which transformers imports. Hand the name over to that
    # package where it is installed; where it is not, stay as harmless as an empty package.
    import importlib.util
    import sys
    from importlib.machinery import PathFinder
    from pathlib import Path

    _checkout = Path(__file__).resolve().parent.parent
    _spec = PathFinder.find_spec("kernels", [entry for entry in sys.path if Path(entry or ".").resolve() != _checkout])
    if _spec is not None and _spec.loader is not None:
        _package = importlib.util.module_from_spec(_spec)
        sys.modules["kernels"] = _package
        _spec.loader.exec_module(_package)
