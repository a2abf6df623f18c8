"""How long loading takes, one tensor after another and read ahead, in turn, from shards that are holes.

    python benchmarks/loading.py --out FILE     on a machine with a GPU, as root (the page cache is emptied before each)
    python benchmarks/loading.py --tiny         on any machine: tries the script, measures nothing of interest

Prints a line for each load, and appends it to the file as JSON: seconds, GiB read, the most of the process's own
memory and of the GPU's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch
from transformers import AutoConfig

import utils
from course.memory import MemoryWatch
from finetune import model
from finetune.checkpoint import write_holes
from finetune.config import AIR

CACHE = Path("/proc/sys/vm/drop_caches")
GIB = 2**30


def seconds(folder: Path, load_in_4bit: bool, ahead: bool, cold: bool) -> dict[str, Any]:
    """Load the checkpoint of this folder once, in one of the two ways; `cold`: with an empty page cache, if allowed."""
    if emptied := cold and os.access(CACHE, os.W_OK):
        os.sync()
        CACHE.write_text("3", encoding="ascii")
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    with MemoryWatch() as watch, patch.object(model, "_only_gpus", return_value=ahead):
        began = time.perf_counter()
        loaded = model.load_model(folder, load_in_4bit)
        if gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - began
    del loaded
    gc.collect()
    peak = torch.cuda.max_memory_allocated() / GIB if gpu else None
    if gpu:
        torch.cuda.empty_cache()
    found = {"read_ahead": ahead, "seconds": round(took, 1), "page_cache_emptied": emptied}
    return found | {"host_gib": round(watch.most, 1), "peak_gib": peak and round(peak, 1)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="the bundled model's shape, on whatever is there")
    parser.add_argument("--bits", type=int, choices=(4, 16), default=4)
    parser.add_argument("--layers", type=int, help="the first ones only")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and not options.tiny:
        sys.exit("No GPU here. To try the script: --tiny")
    config = AutoConfig.from_pretrained(utils.BUNDLED) if options.tiny else deepcopy(AIR)
    config.num_hidden_layers = options.layers or config.num_hidden_layers
    facts = {"gpu": torch.cuda.get_device_name(0) if gpu else "CPU", "gpus": 1, "bits": options.bits}
    facts |= {"layers": config.num_hidden_layers, "torch": torch.__version__, "cpus": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        total = write_holes(Path(folder), config, shards=config.num_hidden_layers + 1)
        facts["read_gib"] = round(total / GIB, 1)
        for ahead in (True, False, True):
            line = json.dumps(facts | seconds(Path(folder), options.bits == 4, ahead, cold=not options.tiny))
            print(line, flush=True)
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(line + "\n")


if __name__ == "__main__":
    main()
