# SPDX-License-Identifier: BSD-3-Clause
"""One process of a tensor parallel run: python -m torch.distributed.run --nproc-per-node 2 parallel_worker.py FOLDER.

Loads the model in FOLDER over all processes, generates, and writes what this process saw to FOLDER/rank<N>.json. Run by
itself it is the run to compare with.
"""

import json
import os
import sys
from pathlib import Path

import torch
from models_structure import passages
from transformers import AutoModelForCausalLM

import sale_flex.integrations.transformers as sale_hf
from sale_flex import Mass, SaleConfig
from sale_flex.integrations.transformers.layers import state_of

LENGTH = 1280


def main(folder: Path) -> None:
    parallel = int(os.environ.get("WORLD_SIZE", "1")) > 1
    sale_hf.register()
    options: dict = {"dtype": torch.float32} | ({"tp_plan": "auto"} if parallel else {})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sale_flex", **options)
    if not parallel:
        model = model.to(device)
    layers = sale_hf.attention_layers(model)
    heads = sale_hf.query_heads(layers[0])
    # Every head of every layer has a threshold of its own.
    configs = {
        index: SaleConfig(Mass(0.02 * 2 ** torch.arange(heads) + 0.01 * index), min_length=64, local_tokens=32)
        for index in layers
    }
    sale_hf.configure(model, configs)
    ids = passages(2, LENGTH).to(device)
    with torch.no_grad():
        logits = model(ids).logits[:, -1].tolist()
        sale_hf.reset_stats(model)
        tokens = model.generate(ids, max_new_tokens=5, do_sample=False)[:, LENGTH:].tolist()
    seen = {
        "tokens": tokens,
        "logits": logits,
        "thresholds": {index: state_of(module).config.rule.threshold.tolist() for index, module in layers.items()},
        "density": {one.layer: one.density for one in sale_hf.stats(model).layers},
        "sparse": [one.sparse_calls for one in sale_hf.stats(model).layers],
    }
    name = f"rank{os.environ['RANK']}.json" if parallel else "alone.json"
    (folder / name).write_text(json.dumps(seen))
    if parallel:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
