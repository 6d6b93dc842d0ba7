"""torchvision's families, one small model of each, with the size of an image that it takes."""

import warnings

import pytest

# One model of every family of torchvision, with the smallest image that it takes.
FAMILIES = {
    "alexnet": 63,
    "convnext_tiny": 32,
    "densenet121": 64,  # at 32 its gradients explode
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 299,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 64,  # likewise
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 32,
    "vgg11_bn": 32,
    "vit_b_32": 32,
    "wide_resnet50_2": 32,
}


def torchvision_model(name, size, **others):
    models = pytest.importorskip("torchvision.models")
    options = {"image_size": size} if name.startswith("vit") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of initial weights
        return models.get_model(name, weights=None, **options, **others)
