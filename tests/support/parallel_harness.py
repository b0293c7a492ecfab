# SPDX-License-Identifier: BSD-3-Clause
"""Two processes beside one, on CPUs and on GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_harness import assert_selective
from models_structure import plant_topics
from transformers import LlamaConfig, LlamaForCausalLM

WORKER = Path(__file__).with_name("parallel_worker.py")


def run(folder: Path, processes: int) -> None:
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(WORKER), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]


def check_two_processes_against_one(folder: Path) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    special = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    config = LlamaConfig(**shape, **heads, **special, max_position_embeddings=2048, initializer_range=0.1)
    plant_topics(LlamaForCausalLM(config)).save_pretrained(folder)
    run(folder, 1)
    run(folder, 2)
    alone, *ranks = (json.loads((folder / name).read_text()) for name in ("alone.json", "rank0.json", "rank1.json"))
    for rank in ranks:
        assert rank["tokens"] == alone["tokens"]
        assert rank["sparse"] == [1, 1]
        # Sums over two processes are rounded in another order.
        torch.testing.assert_close(torch.tensor(rank["logits"]), torch.tensor(alone["logits"]), atol=1e-4, rtol=1e-4)
    for layer in ("0", "1"):
        for what in ("thresholds", "density"):
            assert ranks[0][what][layer] + ranks[1][what][layer] == pytest.approx(alone[what][layer], abs=1e-6)
        assert len(set(alone["density"][layer])) == 4  # so heads can not have been mixed up
        for density in alone["density"][layer]:
            assert_selective(density)
