"""Layers, ResNets, InceptionV3 and the projection head."""

from ..tensor import Parameter
from .heads import ProjectionHead
from .inception import InceptionV3, inception_v3
from .layers import BatchNorm, Conv2d, Dropout, Linear
from .module import Module, Sequential, evaluating
from .resnet import ENCODERS, ResNet, resnet10, resnet18, resnet34, resnet50, resnet_small

__all__ = [
    "ENCODERS", "BatchNorm", "Conv2d", "Dropout", "InceptionV3", "Linear", "Module", "Parameter",
    "ProjectionHead", "ResNet", "Sequential", "evaluating", "inception_v3", "resnet10", "resnet18",
    "resnet34", "resnet50", "resnet_small",
]  # fmt: skip
