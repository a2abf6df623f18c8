"""LoRA fine-tuning of GLM-4.5-Air, from one processor to several hosts: `python -m finetune plan|train|chat|merge`.

One idea a module. They read in this order: config, planner, lora, experts, parallel, quantize, packing, model,
checkpoint, resume, train. Rows and prompt come from notebooks 03 and 04; this package knows neither.
"""

import logging

# Imported by peft, it asks on some processors for a package that a processor can do without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
