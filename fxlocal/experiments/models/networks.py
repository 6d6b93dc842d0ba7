"""The networks of the papers, for small images.

Each can be traced by torch.fx and takes images of any channel count. The classifiers take 32
pixels as in the papers, and any size from 8 on: poolings round up, and the last one is adaptive.
``in_channels`` are those of the images, ``num_classes`` the logits, and ``width`` is the channel
count of the first stage; the later ones keep their ratio to it.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import MobileNetV2, VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import Conv2dNormActivation, StochasticDepth

__all__ = ["UNet", "alexnet", "cnn2", "mobilenetv2", "resnet", "unet", "vgg", "vit"]

# Expansion, channels, blocks and stride of each stage. Of the five halvings meant for 224 pixels
# the first two, in the stem and in the second stage, are left out: 32 pixels become 4.
_MOBILENET_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def resnet(
    in_channels: int,
    num_classes: int,
    width: int,
    *,
    blocks: Sequence[int],
    block: type[BasicBlock | Bottleneck] = BasicBlock,
) -> nn.Module:
    """Build a residual network with a 3x3 stem and no pooling after it.

    Each stage after the first halves the resolution and doubles the channels; there the shortcut is
    a 1x1 convolution with batch norm, also in the networks of 6n+2 layers, which were published
    with zero padding instead. Module names are those of torchvision's ResNet. A ``block`` has two
    convolutions, or three with four times the channels.
    """
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv1"], parts["bn1"], parts["relu"] = Conv2dNormActivation(in_channels, width)
    channels = width
    for stage, count in enumerate(blocks):
        inner, stride = width << stage, 2 if stage else 1
        before, channels = channels, inner * block.expansion
        shortcut: nn.Module | None = None
        if before != channels:
            changed = nn.Conv2d(before, channels, 1, stride, bias=False)
            shortcut = nn.Sequential(changed, nn.BatchNorm2d(channels))
        first = block(before, inner, stride=stride, downsample=shortcut)
        rest = (block(channels, inner) for _ in range(count - 1))
        parts[f"layer{stage + 1}"] = nn.Sequential(first, *rest)
    parts["avgpool"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["fc"] = nn.Linear(channels, num_classes)
    return _initialised(nn.Sequential(parts))


def vgg(
    in_channels: int, num_classes: int, width: int, *, convs: Sequence[int], linear: int = 1
) -> nn.Module:
    """Build a VGG with batch norm, of so many convolutions in each stage.

    Between the linear layers of its classifier are batch norm, ReLU and dropout; all but the last
    have as many outputs as the last convolution has channels.
    """
    features: list[nn.Module] = []
    channels = in_channels
    for stage, count in enumerate(convs):
        for _ in range(count):
            features += Conv2dNormActivation(channels, width * min(2**stage, 8))
            channels = width * min(2**stage, 8)
        features.append(nn.MaxPool2d(2, ceil_mode=True))
    last = nn.Linear(channels, num_classes)
    hidden = [
        part for _ in range(linear - 1) for part in (*_hidden(channels, channels), nn.Dropout())
    ]
    return _stack(features, 1, nn.Sequential(*hidden, last) if hidden else last)


def alexnet(in_channels: int, num_classes: int, width: int) -> nn.Module:
    """Build AlexNet as BackLink adapts it: 3x3 kernels, stride 1, batch norm before each ReLU."""
    features: list[nn.Module] = []
    channels = in_channels
    for quarters, pooled in ((4, True), (12, True), (24, False), (16, False), (16, True)):
        features += Conv2dNormActivation(channels, width * quarters // 4)
        channels = width * quarters // 4
        if pooled:
            features.append(nn.MaxPool2d(2, ceil_mode=True))
    hidden = 16 * width
    classifier = nn.Sequential(
        nn.Dropout(),
        *_hidden(channels * 4 * 4, hidden),
        nn.Dropout(),
        *_hidden(hidden, hidden),
        nn.Linear(hidden, num_classes),
    )
    return _stack(features, 4, classifier)


def cnn2(in_channels: int, num_classes: int, width: int) -> nn.Module:
    """Build the 2-layer CNN of the gradient approximation paper.

    Two 5x5 convolutions, with batch norm for the local response normalisation of TensorFlow's
    tutorial network that the paper starts from, and three linear layers.
    """
    features: list[nn.Module] = []
    for channels in (in_channels, width):
        features += Conv2dNormActivation(channels, width, kernel_size=5)
        features.append(nn.MaxPool2d(3, stride=2, padding=1))
    classifier = nn.Sequential(
        nn.Linear(width * 8 * 8, 6 * width),
        nn.ReLU(inplace=True),
        nn.Linear(6 * width, 3 * width),
        nn.ReLU(inplace=True),
        nn.Linear(3 * width, num_classes),
    )
    return _stack(features, 8, classifier)


def mobilenetv2(in_channels: int, num_classes: int, width: int) -> nn.Module:
    """Build torchvision's MobileNetV2 with two of its halvings left out, for 32 pixels.

    Its stem has ``width`` channels before rounding to a multiple of 8.
    """
    stages = [list(stage) for stage in _MOBILENET_STAGES]
    model = MobileNetV2(num_classes, width_mult=width / 32, inverted_residual_setting=stages)
    stem = model.features[0]
    stem[0] = nn.Conv2d(in_channels, stem[0].out_channels, 3, padding=1, bias=False)
    return _initialised(model)


def vit(in_channels: int, num_classes: int, width: int = 192, drop_path: float = 0.4) -> nn.Module:
    """Build a vision transformer of 12 blocks for 32 pixels, whose branches have a DropPath.

    A token has ``width`` features, a multiple of 3; those of ViT-Ti. Each branch leaves out a row
    by the probability ``drop_path``.
    """
    model = VisionTransformer(32, 4, 12, 3, width, 4 * width, num_classes=num_classes)
    model.conv_proj = nn.Conv2d(in_channels, width, 4, 4)
    for block in model.encoder.layers:
        block.dropout = block.mlp[-1] = StochasticDepth(drop_path, "row")
    return _initialised(model)


class UNet(nn.Module):
    """U-Net with four halvings, batch norm and padded convolutions; one skip per resolution.

    Height and width must be multiples of 16. Channels double at each halving.
    """

    def __init__(self, in_channels: int, num_classes: int, width: int) -> None:
        super().__init__()
        channels = [width << level for level in range(5)]
        self.encoder = nn.ModuleList(
            _double_conv(before, after)
            for before, after in zip([in_channels, *channels[:3]], channels[:4], strict=True)
        )
        self.pool = nn.MaxPool2d(2)
        self.bottom = _double_conv(channels[3], channels[4])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(2 * after, after, 2, stride=2) for after in channels[3::-1]
        )
        self.decoder = nn.ModuleList(_double_conv(2 * after, after) for after in channels[3::-1])
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits per pixel, shape (B, num_classes, H, W)."""
        for side in (2, 3):
            torch._assert(
                x.shape[side] % 16 == 0,
                "U-Net halves the image four times: make height and width multiples of 16",
            )
        skips = []
        for encode in self.encoder:
            x = encode(x)
            skips.append(x)
            x = self.pool(x)
        x = self.bottom(x)
        for up, decode, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = decode(torch.cat([skip, up(x)], dim=1))
        logits: Tensor = self.head(x)
        return logits


def unet(in_channels: int, num_classes: int, width: int) -> nn.Module:
    """Build a `UNet`."""
    return _initialised(UNet(in_channels, num_classes, width))


def _double_conv(before: int, after: int) -> nn.Module:
    return nn.Sequential(*Conv2dNormActivation(before, after), *Conv2dNormActivation(after, after))


def _hidden(before: int, after: int) -> tuple[nn.Module, ...]:
    return nn.Linear(before, after), nn.BatchNorm1d(after), nn.ReLU(inplace=True)


def _stack(features: list[nn.Module], pooled: int, classifier: nn.Module) -> nn.Module:
    """Put convolutions, a pooling to a fixed size and linear layers in a row."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["features"] = nn.Sequential(*features)
    parts["avgpool"] = nn.AdaptiveAvgPool2d(pooled)
    parts["flatten"] = nn.Flatten()
    parts["classifier"] = classifier
    return _initialised(nn.Sequential(parts))


def _initialised(model: nn.Module) -> nn.Module:
    """Draw convolution weights as torchvision's ResNet does; the rest keeps PyTorch's start."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
