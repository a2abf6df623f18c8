#!/bin/bash
# bash docs/other_tools/ms_swift.sh [more options of swift sft]
set -e
folder=output/other_tools/ms_swift
rm -rf "$folder/run" "$folder/lora/adapter"
dense=(gate_proj.weight up_proj.weight down_proj.weight)
swift sft \
  --model models/glm4-moe-mini --model_type glm4_moe --template glm4_5 --torch_dtype float32 \
  --dataset "$folder/train.jsonl" --val_dataset "$folder/new_wordings.jsonl" --max_length 1024 \
  --enable_thinking false --disable_ignore_empty_think true \
  --tuner_type lora --lora_rank 8 --lora_alpha 32 --lora_dropout 0 \
  --target_modules q_proj k_proj v_proj o_proj \
  --target_parameters mlp.experts.gate_up_proj mlp.experts.down_proj \
    "${dense[@]/#/shared_experts.}" "${dense[@]/#/layers.0.mlp.}" \
  --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --num_train_epochs 2 \
  --learning_rate 4e-3 --lr_scheduler_type cosine --warmup_ratio 0.05 --seed 42 \
  --gradient_checkpointing false --dataset_num_proc 1 --dataloader_num_workers 0 \
  --per_device_eval_batch_size 16 --eval_steps 100 --logging_steps 10 --save_steps 1000 \
  --output_dir "$folder/run" --add_version false --report_to none "$@"
cp -r "$(ls -d "$folder"/run/checkpoint-* | sort -V | tail -n 1)" "$folder/lora/adapter"
