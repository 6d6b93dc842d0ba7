#!/usr/bin/env bash
# transformers 5.24.0. A model whose forward takes any keyword is trusted by the Trainer to divide its loss by the
# labels of a whole step, so that the Trainer does not divide it by `gradient_accumulation_steps`.
# BertForSequenceClassification takes any keyword, and averages over its own micro-batch all the same: four
# micro-batches of two rows make four times the gradient of one batch of the same eight, and the log says four times
# the loss. Nothing warns. A model of the same kind whose attribute `accepts_loss_kwargs` is False is divided, and equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy transformers==5.24.0 accelerate==1.15.0
cat > "$folder/seen.py" <<'PY'
import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
QUIET = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
EXACT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
generator = torch.Generator().manual_seed(0)
rows = [
    {"input_ids": torch.randint(1, 20, (6,), generator=generator), "labels": i % 2} for i in range(8)
]


class Told(BertForSequenceClassification):
    accepts_loss_kwargs = False


def one_step(kind, batch, parts):
    torch.manual_seed(0)
    model = kind(BertConfig(**SMALL, **EXACT, intermediate_size=16))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    arguments = TrainingArguments(
        tempfile.mkdtemp(), max_steps=1, optim="sgd", learning_rate=0.1, max_grad_norm=0.0,
        per_device_train_batch_size=batch, gradient_accumulation_steps=parts, **QUIET,
    )
    loss = Trainer(model, arguments, train_dataset=rows).train().training_loss
    return loss, torch.cat([p.detach().flatten() for p in model.parameters()]) - before


for kind in (BertForSequenceClassification, Told):
    (loss, step), (added, sum_of_parts) = one_step(kind, 8, 1), one_step(kind, 2, 4)
    times = sum_of_parts.norm() / step.norm()
    print(f"{kind.__name__}: four of two against eight: step x{times:.2f}, loss x{added / loss:.2f}")
PY
cat > "$folder/expected" <<'OUT'
BertForSequenceClassification: four of two against eight: step x4.00, loss x4.00
Told: four of two against eight: step x1.00, loss x1.00
OUT
"$folder/venv/bin/python" -W ignore "$folder/seen.py" 2> /dev/null | grep four | tee "$folder/seen"
diff "$folder/expected" "$folder/seen"
