"""Writes the DeepSpeed checkpoints beside it: two steps of a tiny model, and what DeepSpeed itself reads back.

    torchrun --nproc-per-node N make.py STAGE PRECISION FOLDER

Run on a CPU with a C++ compiler. Only rank 0's `expected.safetensors` comes from DeepSpeed's `zero_to_fp32`.
"""

import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.b = nn.Linear(7, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.register_buffer("statistics", torch.arange(3.0))

    def forward(self, x):
        return (self.b(self.a(x)) * self.scale).square().sum() + self.frozen.sum()


stage, precision, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
deepspeed.init_distributed("gloo")
torch.manual_seed(0)
model = Model()
groups = [
    {"params": [model.a.weight, model.b.weight], "weight_decay": 0.1},
    {"params": [model.a.bias, model.scale], "weight_decay": 0.0},
]
config = {
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": stage},
    "zero_allow_untested_optimizer": True,
    "bf16": {"enabled": precision == "bf16"},
}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
for _ in range(2):
    batch = torch.randn(2, 5, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    engine.backward(engine(batch))
    engine.step()
engine.save_checkpoint(str(folder), tag="epoch_1")
torch.distributed.barrier()
if torch.distributed.get_rank() == 0:
    whole = get_fp32_state_dict_from_zero_checkpoint(str(folder)) if stage else model.state_dict()
    copies = {name: tensor.detach().clone().contiguous() for name, tensor in whole.items()}
    save_file(copies, folder / "expected.safetensors")
    for script in folder.glob("zero_to_*.py"):
        script.unlink()
