"""Layers, ResNets and the projection head."""

from ..tensor import Parameter
from .heads import ProjectionHead
from .layers import BatchNorm, Conv2d, Dropout, Linear
from .module import Module, Sequential
from .resnet import ENCODERS, ResNet, resnet10, resnet18, resnet34, resnet50, resnet_small

__all__ = [
    "ENCODERS",
    "BatchNorm",
    "Conv2d",
    "Dropout",
    "Linear",
    "Module",
    "Parameter",
    "ProjectionHead",
    "ResNet",
    "Sequential",
    "resnet10",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet_small",
]
