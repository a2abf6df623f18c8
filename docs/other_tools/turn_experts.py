"""An adapter of peft 0.18 in the form of peft 0.21, or the other way round: only the routed experts differ.

    python docs/other_tools/turn_experts.py FROM TO

A fused tensor of a layer has the shape (experts, out, in). peft 0.18 takes it for (experts, in, out), so its A is what
peft 0.21 calls B. The update of the weights is the same: (B A)^T = A^T B^T.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def turned(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
    """The tensors with A and B of the routed experts exchanged; A holds (experts, rank), B has (rank, experts)."""
    result = dict(tensors)
    for name in tensors:
        if "mlp.experts" in name and "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            a, b = tensors[name], tensors[other]
            a = a.reshape(-1, rank, a.shape[1])
            b = b.reshape(b.shape[0], rank, -1)
            result[name] = b.permute(2, 1, 0).flatten(0, 1).contiguous()
            result[other] = a.permute(2, 1, 0).flatten(1).contiguous()
    return result


def turn(source: Path, target: Path) -> None:
    """Write the adapter of one folder, turned, to another."""
    rank = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))["r"]
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "adapter_config.json", target)
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(turned(tensors, rank), target / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    turn(Path(sys.argv[1]), Path(sys.argv[2]))
