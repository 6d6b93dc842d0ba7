#!/usr/bin/env bash
# transformers 5.24.0. In a Trainer that accumulates gradients, a language model's output.loss is no
# mean over its micro-batch: the Trainer hands the label count of the whole step to the forward, which
# divides by that. So whoever reads output.loss in training (a hook, a callback, a model that wraps
# another) sees 1/4 of it with gradient_accumulation_steps=4, at equal weights and data; the Trainer's
# own log adds the parts up and stays the same. Without accumulation it is the mean.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy transformers==5.24.0 accelerate==1.15.0
cat > "$folder/seen.py" <<'PY'
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(16)]
sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "bos_token_id": 0}
config = GPT2Config(**sizes, eos_token_id=0, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
means = {}
for parts in (1, 2, 4):
    set_seed(0)
    model, losses = GPT2LMHeadModel(config), []
    model.register_forward_hook(lambda m, given, output: losses.append(output.loss.item()))
    arguments = TrainingArguments(
        sys.argv[1], use_cpu=True, report_to=[], save_strategy="no", learning_rate=0.0,
        num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=parts,
        logging_steps=1, disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    logged = trainer.train().training_loss
    means[parts] = sum(losses) / len(losses)
    print(f"accumulation {parts}: output.loss {means[parts]:.3f}, logged {logged:.3f}")
    assert abs(logged - means[1]) < 0.01
assert abs(means[2] - means[1] / 2) < 0.01 and abs(means[4] - means[1] / 4) < 0.01
PY
"$folder/venv/bin/python" -W ignore "$folder/seen.py" "$folder/out" 2>&1 | grep accumulation
