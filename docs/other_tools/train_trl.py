"""TRL: python docs/other_tools/train_trl.py [--max-steps N]. The name of a script must not be `trl`."""

import argparse
import json
from pathlib import Path

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

MODEL = "models/glm4-moe-mini"
FOLDER = Path("output/other_tools/trl")
#: TRL's copy of GLM-4.5's template, which marks what the assistant says and lets it end with `<|user|>`.
TEMPLATE = Path(trl.__file__).parent / "chat_templates" / "glm4moe_training.jinja"
DENSE = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


def samples(name: str, most: int | None) -> Dataset:
    """Rows of notebook 03 with the system prompt, thinking off."""
    rows = json.loads((FOLDER / "rows" / f"{name}.json").read_text(encoding="utf-8"))[:most]
    system = json.loads((FOLDER / "lora" / "prompt.json").read_text(encoding="utf-8"))
    first = {"role": "system", "content": system["system"]}
    return Dataset.from_list(
        [{"messages": [first, *row["messages"]], "chat_template_kwargs": {"enable_thinking": False}} for row in rows]
    )


parser = argparse.ArgumentParser()
parser.add_argument("--max-steps", type=int, default=-1)
parser.add_argument("--rows", type=int, help="of each file only so many rows")
given = parser.parse_args()
lora = LoraConfig(
    task_type="CAUSAL_LM",
    r=8,
    lora_alpha=32,
    lora_dropout=0.0,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
    target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    + [f"shared_experts.{name}" for name in DENSE]
    + [f"layers.0.mlp.{name}" for name in DENSE],
)
arguments = SFTConfig(
    output_dir=str(FOLDER / "lora" / "adapter"),
    assistant_only_loss=True,
    chat_template_path=str(TEMPLATE),
    max_length=1024,
    per_device_train_batch_size=16,
    learning_rate=4e-3,
    lr_scheduler_type="cosine",
    warmup_steps=0.05,
    num_train_epochs=2,
    max_steps=given.max_steps,
    seed=42,
    bf16=torch.cuda.is_available(),
    gradient_checkpointing=False,
    per_device_eval_batch_size=16,
    eval_strategy="steps",
    eval_steps=100,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16 if arguments.bf16 else torch.float32),
    args=arguments,
    train_dataset=samples("train", given.rows),
    eval_dataset={name: samples(name, given.rows) for name in ("new_wordings", "new_answers")},
    processing_class=AutoTokenizer.from_pretrained(MODEL),
    peft_config=lora,
)
sample = trainer.train_dataset[0]  # what a training reads and what it learns: look before it runs
print("read:   ", repr(trainer.processing_class.decode(sample["input_ids"])))
print("learned:", repr(trainer.processing_class.decode([label for label in sample["labels"] if label != -100])))
trainer.train()
trainer.save_model()
