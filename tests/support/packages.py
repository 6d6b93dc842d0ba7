"""Small models of packages that people train with: how each is built, and one batch of it.

A package is imported where a model of it is built, so that one that is missing skips its models.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Entry"]


class Entry(NamedTuple):
    """A model and one batch of it.

    Attributes:
        build: makes the model.
        batch: its inputs by the names of its forward's arguments.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]


def _package(name: str) -> Any:
    pytest.importorskip(name.partition(".")[0])
    return import_module(name)


def _image(size: int = 32, name: str = "x", channels: int = 3, dims: int = 2) -> Any:
    return lambda: {name: torch.randn(2, channels, *[size] * dims)}


def _torchvision(name: str, size: int = 32, **options: Any) -> Entry:
    def build() -> nn.Module:
        models = _package("torchvision.models")
        return models.get_model(name, weights=None, num_classes=5, **options)

    return Entry(build, _image(size))


def _dense(name: str) -> Entry:
    options = {"weights_backbone": None}
    entry = _torchvision(name, **options)
    return Entry(entry.build, _image(64))


def _timm(name: str, size: int = 64, **options: Any) -> Entry:
    def build() -> nn.Module:
        timm = _package("timm")
        classes = {} if options.get("features_only") else {"num_classes": 5}
        return timm.create_model(name, pretrained=False, **classes, **options)

    return Entry(build, _image(size))


def _smp(name: str, encoder: str = "resnet18", **options: Any) -> Entry:
    def build() -> nn.Module:
        smp = _package("segmentation_models_pytorch")
        return getattr(smp, name)(encoder, encoder_weights=None, classes=3, **options)

    return Entry(build, _image(64))


def _monai(name: str, size: int = 32, dims: int = 2, **options: Any) -> Entry:
    def build() -> nn.Module:
        made = getattr(_package("monai.networks.nets"), name)
        return made(spatial_dims=dims, in_channels=1, **options)

    return Entry(build, _image(size, "x", 1, dims))


def _fastai(name: str, *args: Any, **options: Any) -> Entry:
    def build() -> nn.Module:
        return getattr(_package("fastai.vision.models.xresnet"), name)(*args, **options)

    return Entry(build, _image(32, "input"))


_TINY = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
_TEXT = {**_TINY, "num_hidden_layers": 4, "vocab_size": 50}
_IMAGE = {**_TINY, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8, "num_labels": 4}


def _transformers(model: str, batch: Callable[[], dict[str, Any]], **options: Any) -> Entry:
    def build() -> nn.Module:
        made = getattr(_package("transformers"), model)
        return made(made.config_class(**options))

    return Entry(build, batch)


def _ids() -> Tensor:
    return torch.randint(3, 50, (2, 9))


def _classified() -> dict[str, Any]:
    mask = torch.ones(2, 9, dtype=torch.long)
    return {"input_ids": _ids(), "attention_mask": mask, "labels": torch.tensor([1, 0])}


def _spoken() -> dict[str, Any]:
    ids = _ids()
    return {"input_ids": ids, "labels": ids}


def _seen() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32), "labels": torch.tensor([1, 2])}


def _segmented() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.randint(3, (2, 64, 64))}


def _diffusers(name: str, batch: Callable[[], dict[str, Any]], **options: Any) -> Entry:
    return Entry(lambda: getattr(_package("diffusers"), name)(**options), batch)


def _noisy() -> dict[str, Any]:
    return {"sample": torch.randn(2, 3, 16, 16), "timestep": torch.tensor([3, 7])}


def _conditioned() -> dict[str, Any]:
    return {**_noisy(), "encoder_hidden_states": torch.randn(2, 5, 16)}


def _adapted(entry: Entry, targets: list[str], **options: Any) -> Entry:
    def build() -> nn.Module:
        peft = _package("peft")
        config = peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.1, **options)
        return peft.get_peft_model(entry.build(), config)

    return Entry(build, entry.batch)


_UNET = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "layers_per_block": 1}
_UNET |= {"block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4}
# No cache in the output, and no weight that is tied over all blocks.
_PLAIN = {"use_cache": False, "tie_word_embeddings": False}
_VIT = _transformers("ViTForImageClassification", _seen, **_IMAGE)
_BERT = _transformers("BertForSequenceClassification", _classified, num_labels=4, **_TEXT)
_GPT2 = _transformers(
    "GPT2LMHeadModel", _spoken, n_embd=16, n_layer=3, n_head=2, vocab_size=50, **_PLAIN
)
_LLAMA = _transformers("LlamaForCausalLM", _spoken, num_key_value_heads=2, **_PLAIN, **_TEXT)

MODELS: dict[str, Entry] = {
    "torchvision resnet18": _torchvision("resnet18"),
    "torchvision mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "torchvision shufflenet_v2_x0_5": _torchvision("shufflenet_v2_x0_5"),
    "torchvision swin_t": _torchvision("swin_t"),
    "torchvision vit_b_32": _torchvision("vit_b_32", image_size=32),
    "torchvision deeplabv3_mobilenet_v3_large": _dense("deeplabv3_mobilenet_v3_large"),
    "timm resnet10t": _timm("resnet10t"),
    "timm resnet18 features": _timm("resnet18", features_only=True),
    "timm efficientnet_lite0": _timm("efficientnet_lite0"),
    "timm convnext_atto": _timm("convnext_atto"),
    "timm vit_tiny": _timm("vit_tiny_patch16_224", img_size=64, depth=6),
    "timm dinov3": _timm("vit_small_patch16_dinov3", img_size=64, depth=4),
    "timm mixer": _timm("mixer_s32_224", img_size=64),
    "timm ghostnet_050": _timm("ghostnet_050"),
    "timm hrnet_w18_small": _timm("hrnet_w18_small"),
    "timm dla34": _timm("dla34"),
    "timm poolformer": _timm("poolformer_s12"),
    "smp Unet": _smp("Unet"),
    "smp UnetPlusPlus": _smp("UnetPlusPlus"),
    "smp FPN": _smp("FPN"),
    "smp Linknet": _smp("Linknet"),
    "smp DeepLabV3Plus": _smp("DeepLabV3Plus"),
    "smp PSPNet": _smp("PSPNet"),
    "smp Unet, mobilenet_v2": _smp("Unet", "mobilenet_v2"),
    "monai UNet": _monai("UNet", out_channels=2, channels=(4, 8, 16), strides=(2, 2)),
    "monai BasicUNet": _monai("BasicUNet", out_channels=2, features=(4, 4, 8, 8, 16, 4)),
    "monai SegResNet": _monai("SegResNet", 16, 3, init_filters=8),
    "monai DynUNet": _monai(
        "DynUNet",
        out_channels=2,
        kernel_size=(3, 3, 3),
        strides=(1, 2, 2),
        upsample_kernel_size=(2, 2),
        filters=(4, 8, 16),
    ),
    "monai VNet": _monai("VNet", 32, 3, out_channels=1),
    "monai AttentionUnet": _monai(
        "AttentionUnet", out_channels=2, channels=(4, 8, 16), strides=(2, 2)
    ),
    "monai DenseNet": _monai("DenseNet", out_channels=2, block_config=(2, 2, 2), growth_rate=4),
    "transformers ViT": _VIT,
    "transformers BERT": _BERT,
    "transformers GPT-2": _GPT2,
    "transformers Llama": _LLAMA,
    "transformers DistilBert": _transformers(
        "DistilBertForSequenceClassification",
        _classified,
        dim=16,
        n_heads=2,
        n_layers=3,
        hidden_dim=32,
        vocab_size=50,
    ),
    "transformers DeiT": _transformers("DeiTForImageClassification", _seen, **_IMAGE),
    "transformers ResNet": _transformers(
        "ResNetForImageClassification",
        _seen,
        embedding_size=8,
        hidden_sizes=[8, 16, 24, 32],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        num_labels=4,
    ),
    "transformers ConvNext": _transformers(
        "ConvNextForImageClassification",
        _seen,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 2, 1],
        num_labels=4,
    ),
    "transformers Segformer": _transformers(
        "SegformerForSemanticSegmentation",
        _segmented,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16,
        num_labels=3,
    ),
    "transformers T5": _transformers(
        "T5ForConditionalGeneration",
        _spoken,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        vocab_size=50,
        decoder_start_token_id=0,
        **_PLAIN,
    ),
    "transformers Whisper": _transformers(
        "WhisperForAudioClassification",
        lambda: {"input_features": torch.randn(2, 16, 64), "labels": torch.tensor([1, 0])},
        d_model=16,
        encoder_layers=3,
        encoder_attention_heads=2,
        encoder_ffn_dim=32,
        num_mel_bins=16,
        max_source_positions=32,
        num_labels=4,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=32,
    ),
    "diffusers UNet2D": _diffusers(
        "UNet2DModel",
        _noisy,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **_UNET,
    ),
    "diffusers UNet2DCondition": _diffusers(
        "UNet2DConditionModel",
        _conditioned,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        **_UNET,
    ),
    "diffusers AutoencoderKL": _diffusers(
        "AutoencoderKL",
        lambda: {"sample": torch.randn(2, 3, 16, 16)},
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ),
    "diffusers DiT": _diffusers(
        "DiTTransformer2DModel",
        lambda: {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 7]),
            "class_labels": torch.tensor([1, 2]),
        },
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=3,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    ),
    "peft LoRA ViT": _adapted(_VIT, ["q_proj", "v_proj"]),
    "peft LoRA BERT": _adapted(_BERT, ["query", "value"]),
    "peft LoRA GPT-2": _adapted(_GPT2, ["c_attn"], fan_in_fan_out=True),
    "fastai xresnet18": _fastai("xresnet18", n_out=5),
    "fastai xresnet18 deep": _fastai("xresnet18_deep", n_out=5),
    "fastai xse_resnext18": _fastai("xse_resnext18", n_out=5),
}
