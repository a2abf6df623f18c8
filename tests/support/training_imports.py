"""What a process that trains imports, for the fork server of `training_process`; nothing is computed here."""

import datasets  # noqa: F401
import IPython.core.interactiveshell  # noqa: F401
import ipywidgets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import PIL.Image  # noqa: F401
import swanlab  # noqa: F401
import torch  # noqa: F401
import transformers.trainer  # noqa: F401
from swanlab.integration.transformers import SwanLabCallback  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer  # noqa: F401
from transformers.models.glm4_moe import modeling_glm4_moe  # noqa: F401
