"""TrainConfig: every setting of a pre-training run, its default, its limits and what it means.

The command line makes its options from these fields, so the two cannot drift apart.
"""

import os
from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from .errors import ConfigError


def setting(default: Any, help: str, low: float | None = None, choices: tuple[str, ...] = ()):
    """A field with its help text and limits (`low` is excluded for floats, allowed for
    integers).
    """
    return field(default=default, metadata={"help": help, "low": low, "choices": choices})


ENCODERS = ("resnet_small", "resnet10", "resnet18", "resnet34", "resnet50")


def first_layers(stem: str, encoder: str, image_size: int) -> str:
    """The stem that "auto" stands for; any other unchanged."""
    if stem != "auto":
        return stem
    if encoder == "resnet_small":
        return "small"
    return "cifar" if image_size <= 48 else "imagenet"


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `pretrain`. Raises ConfigError that lists every bad value."""

    data: str = setting(
        "toydogs", "pictures: toydogs, stanford-dogs, or the path of a folder or cache"
    )
    encoder: str = setting("resnet_small", "network to train", choices=ENCODERS)
    stem: str = setting(
        "auto",
        "first layers: cifar for images up to 48 px, imagenet above, small for resnet_small",
        choices=("auto", "cifar", "imagenet", "small"),
    )
    width: int = setting(0, "channels of the first stage; 0: the encoder's own", 0)
    image_size: int = setting(32, "side of the training views, in px", 8)
    batch_size: int = setting(128, "images in a step (N; each has two views)", 2)
    epochs: int = setting(20, "passes over the unlabelled images", 1)
    lr: float = setting(0.3, "peak learning rate", 0)
    lr_scaling: str = setting(
        "none",
        "how the peak grows with the batch B: none, linear (lr B/256), sqrt (lr sqrt B)",
        choices=("none", "linear", "sqrt"),
    )
    warmup_epochs: float = setting(1.0, "epochs in which the rate rises from 0 to its peak")
    optimizer: str = setting("sgd", "optimizer", choices=("sgd", "lars"))
    weight_decay: float = setting(1e-4, "L2 pull on weights (never on biases and batch norm)")
    temperature: float = setting(0.2, "temperature of NT-Xent", 0)
    strength: float = setting(0.8, "strength s of the colour distortion")
    crop_min: float = setting(0.2, "smallest share of the picture a crop may show", 0)
    seed: int = setting(0, "seed of weights, order and views", 0)
    threads: int = setting(0, "CPU threads; 0: one for each core it may use", 0)
    device: str = setting("auto", "where to run: auto, cpu, cuda:0, cuda:1 and so on")
    precision: str = setting(
        "fp32",
        "rounding on a GPU: tf32 is for speed, bf16 also for half the memory",
        choices=("fp32", "tf32", "bf16"),
    )

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, os.PathLike):
                object.__setattr__(self, name, os.fspath(value))
            elif getattr(value, "ndim", 1) == 0:  # NumPy's number, as a sweep has
                object.__setattr__(self, name, value.item())
        problems = [said for f in fields(self) if (said := _problem(f, getattr(self, f.name)))]
        if type(self.crop_min) in (int, float) and self.crop_min > 1:
            problems.append(f"crop_min must be at most 1, not {self.crop_min}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def at_once(self) -> int:
        """How many views, without a graph, surely fit in memory if a step of 2N views does."""
        return min(256, 2 * self.batch_size)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _problem(f: Any, value: Any) -> str | None:
    """What is wrong with the value of a field, in words, or None."""
    low, choices = f.metadata["low"], f.metadata["choices"]
    if type(value) is int and abs(value) >= 2**63:
        return f"{f.name} must be less than 2**63 in size, not {value}"
    if f.type is float and type(value) is int:
        value = float(value)
    if type(value) is not f.type:
        return f"{f.name} must be of type {f.type.__name__}, not {value!r}"
    if value == "":
        return f"{f.name} must not be empty"
    if choices and value not in choices:
        return f"{f.name} must be one of {', '.join(choices)}, not {value!r}"
    if f.type is float and not abs(value) < 1e100:  # NaN neither
        return f"{f.name} must be a finite number below 1e100, not {value}"
    if f.type is float and low is not None and value <= low:
        return f"{f.name} must be greater than {low}, not {value}"
    if f.type in (int, float) and value < (low or 0):
        return f"{f.name} must be at least {low or 0}, not {value}"
    return None


def check_keys(keys: Any, known: Any, where: str) -> None:
    """Raise ConfigError for unknown keys, each with the most similar known one."""
    problems = []
    for key in keys:
        if key not in known:
            near = [f" (did you mean {name!r}?)" for name in get_close_matches(key, known, 1)]
            problems.append(f"unknown key {key!r}{''.join(near)}")
    if problems:
        raise ConfigError(f"{where}: {'; '.join(problems)}")
