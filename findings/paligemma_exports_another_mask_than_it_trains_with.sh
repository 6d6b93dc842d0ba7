#!/usr/bin/env bash
# torch 2.14.1, transformers 5.24.0. PaliGemma without token types computes something else when it is
# exported than when it is called, if no token is masked: an eager call finds a padding mask of ones,
# leaves the mask out, and attends to all tokens, as its attention is not causal; export may not ask
# for the values, keeps the mask, and that is a causal one. With one token masked both are the same.
# Nothing is said: logits of random weights are several per cent apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 transformers==5.24.0 pillow
cat > "$folder/seen.py" <<'PY'
import torch
import transformers as hf

sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
vision = hf.SiglipVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
text = hf.GemmaConfig(
    **sizes, num_key_value_heads=2, head_dim=8, vocab_size=60, pad_token_id=0,
    max_position_embeddings=32, tie_word_embeddings=False,
)
config = hf.PaliGemmaConfig(
    vision_config=vision, text_config=text, image_token_index=45, image_token_id=45,
    projection_dim=16, tie_word_embeddings=False,
)
torch.manual_seed(0)
model = hf.PaliGemmaForConditionalGeneration(config).train()
ids = torch.randint(3, 40, (2, 12))
ids[:, 1:5] = 45  # four patches of the image
image = torch.randn(2, 3, 16, 16)


def batch(masked):
    mask = torch.ones_like(ids)
    mask[0, 12 - masked :] = 0
    return dict(
        input_ids=ids, pixel_values=image, attention_mask=mask, use_cache=False, return_dict=False
    )


exported = torch.export.export(model, (), batch(1)).module()
for masked in (0, 1):
    with torch.no_grad():
        called, kept = model(**batch(masked))[0], exported(**batch(masked))[0]
    apart = float((called - kept).abs().max() / called.abs().max())
    print(f"{masked} tokens masked: {apart:.1%} apart")
    assert apart > 0.01 if masked == 0 else apart < 1e-4
PY
"$folder/venv/bin/python" "$folder/seen.py"
