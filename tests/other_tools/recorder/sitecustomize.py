"""Python loads this file at its start: what a tool's Trainer is given first is noted, whatever the tool prints."""

import json
import os
from pathlib import Path

from transformers import Trainer

given_step = Trainer.training_step


def training_step(self, model, inputs, *args, **kwargs):
    record = Path(os.environ["OTHER_TOOLS_RECORD"])
    if not record.exists():
        trained = {name: value.numel() for name, value in model.named_parameters() if value.requires_grad}
        batch = {name: inputs[name].tolist() for name in ("input_ids", "labels")}
        record.write_text(json.dumps({"trained": trained, **batch}), encoding="utf-8")
    return given_step(self, model, inputs, *args, **kwargs)


Trainer.training_step = training_step
