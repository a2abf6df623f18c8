"""A checkpoint in GLM-4.5-Air's own layout that takes no room: every shard is a hole with a true header.

One tensor for each expert, as many shards as asked for, the prediction layer behind the last one. It reads as zeros,
so it shows how loading behaves at full size (order, memory, time) where 206 GiB do not fit on the disk.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import Glm4MoeConfig

from planner import AIR, tensors


def write(folder: Path, config: Glm4MoeConfig = AIR, shards: int = 47) -> int:
    """Write the checkpoint of holes and return the bytes it reads as."""
    folder.mkdir(parents=True, exist_ok=True)
    size = {"BF16": 2, "F32": 4}
    entries = []
    for name, shape, kind in tensors(config):
        count = 1
        for length in shape:
            count *= length
        entries.append((name, shape, kind, count * size[kind]))
    total = sum(entry[3] for entry in entries)
    weight_map, headers, at, filled = {}, [{}], 0, 0
    for name, shape, kind, length in entries:
        if filled >= total / shards * len(headers):
            headers.append({})
            at = 0
        headers[-1][name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + length]}
        at, filled = at + length, filled + length
    for number, header in enumerate(headers, 1):
        file = f"model-{number:05d}-of-{len(headers):05d}.safetensors"
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        with (folder / file).open("wb") as out:
            out.write(len(head).to_bytes(8, "little") + head)
            out.truncate(8 + len(head) + max(entry["data_offsets"][1] for entry in header.values()))
        weight_map |= dict.fromkeys(header, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.architectures = ["Glm4MoeForCausalLM"]
    config.save_pretrained(folder)
    return total
