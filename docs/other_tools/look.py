"""What an adapter holds, group by group: python docs/other_tools/look.py FOLDER. It needs safetensors only."""

import math
import sys
from pathlib import Path

from safetensors import safe_open

#: The groups of notebook 05, and the part of a tensor's name by which each is known.
GROUPS = {
    "attention": "self_attn",
    "dense layer": "layers.0.mlp",
    "shared experts": "shared_experts",
    "routed experts": "mlp.experts",
}


def held(adapter: Path) -> dict[str, int]:
    """Numbers in each group; whatever is in none of them counts as `elsewhere`, as the router does."""
    counts = dict.fromkeys([*GROUPS, "elsewhere"], 0)
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118 (safe_open is no dict)
            group = next((group for group, part in GROUPS.items() if part in name), "elsewhere")
            counts[group] += math.prod(file.get_slice(name).get_shape())
    return counts


if __name__ == "__main__":
    for group, count in held(Path(sys.argv[1])).items():
        print(f"{group:15}{count:12,}")
