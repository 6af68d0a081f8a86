"""Use a trained encoder, from a run or published: features of any pictures, how well they do
beside their controls, and which pictures are most alike.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from os.path import isdir
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import checkpoint
from .augment import center_view
from .backend import Array, choose_device, to_device, to_host, xp_of
from .cores import set_threads
from .data import BUILT_IN, Dataset, cache_folder, open_dataset
from .errors import ConfigError, DataError
from .files import sha256, write_bytes
from .nn import InceptionV3, Module, ResNet
from .nn.inception import BLOCKS
from .probe import Extract, probe, unit
from .probe.logistic import finite
from .run import Run, new_run, open_run
from .simclr import Model, calibrate
from .tensor import Tensor, no_grad
from .train import MONITORED, Notify, calibrate_run, preparing, quiet
from .weights import Preprocessing, load, network, read, safetensors

See = Callable[[np.ndarray], Array]  # pictures (n, S, S, 3) uint8 -> features (n, D) float32
KEPT = 2  # version of what is kept: raise it when the same key would mean other features
SEEN = "Weights trained on ImageNet have seen the test photos of Stanford Dogs."
BATCH = 32  # images that a network with published weights sees at once


def open_trained(path: str | Path, device: str | None = None) -> Run:
    """The run at `path`, to be used on its own device or another. Raises DataError unless it has a
    checkpoint.
    """
    run, _ = open_run(path)
    run.config = replace(run.config, device=device or run.config.device)
    set_threads(run.config.threads)
    if not run.step:
        raise DataError(f"{path} has no checkpoint yet: train it first")
    return run


def open_data(run: Run, data: str | None, notify: Notify = quiet) -> Dataset:
    """The run's own data set, or another (a name or a folder), with pictures of the same side.

    Raises DataError if its own has changed since the training.
    """
    name, side = run.config.data if data is None else data, run.config.image_size * 5 // 4
    dataset = open_dataset(name, side, preparing(notify))
    if data is None:
        seen = "though the run may have been trained on some that are for testing now"
        run.check_data(dataset, f"to use them all the same, name them in the command, {seen}")
    return dataset


def extractor(
    run: Run, model: Model, dataset: Dataset, view: int | None = None, notify: Notify = quiet
) -> Extract:
    """Features h (n, D) of rows of a data set by a model of `run`, each image in its centre view.

    view: the side of that view in px (None: as in training). Random crops show things larger than
    a centre view of the same side does, and a somewhat larger one makes up for that (Touvron et al.
    2019, arXiv:1906.06423).
    """
    return batched(centre_sight(run, model, view), dataset, run.config.at_once, notify)


def centre_sight(run: Run, model: Model, view: int | None = None) -> See:
    """Features of pictures in their centre views by a model of `run`."""
    device, _ = choose_device(run.config.device)
    model.encoder.to(device)
    size = view or run.config.image_size
    return lambda images: model.encode(to_device(center_view(images, size), device))


def batched(see: See, dataset: Dataset, batch_size: int, notify: Notify) -> Extract:
    """Features of rows of a data set, seen `batch_size` at a time."""

    def extract(rows: np.ndarray) -> Array:
        parts = []
        for i in range(0, max(1, len(rows)), batch_size):
            parts.append(see(dataset.images[rows[i : i + batch_size]]))
            done = {"done": min(i + batch_size, len(rows)), "total": len(rows)}
            notify("progress", done | {"label": "features"})
        return finite(xp_of(parts[0]).concatenate(parts))

    return extract


def control(run: Run, dataset: Dataset) -> Model:
    """The run's network as it was before step 0, calibrated as the trained one is."""
    device, _ = choose_device(run.config.device)
    fresh = new_run(run.path, run.config, device)
    calibrate_run(fresh, dataset, device)
    return fresh.model


def probe_run(
    run: Run, dataset: Dataset, labels: int | None = None, view: int | None = None,
    notify: Notify = quiet,
) -> dict[str, Any]:  # fmt: skip
    """What a run's encoder has learned, compared with its controls (see extractor, probe.probe)."""
    how = dataset, view, notify
    systems = extractor(run, run.model, *how), lambda: extractor(run, control(run, dataset), *how)
    about = {"step": run.step, "truth": sha256(dataset.labels.tobytes())}
    return probe(dataset, "SimCLR", *systems, labels, notify=notify) | about


def sight(net: Module, preprocessing: Preprocessing, block: str | None, device: str) -> See:
    """Features of pictures by a network with published weights.

    block: of InceptionV3; its output is averaged over the pixels.
    """
    device, _ = choose_device(device)
    net.to(device).eval()

    def see(images: np.ndarray) -> np.ndarray:
        x = Tensor(to_device(preprocessing(images), device))
        with no_grad():
            if isinstance(net, InceptionV3) and block:
                return to_host(net.features(x, block).data.mean((1, 2)))
            return to_host(net(x).data)

    return see


def published(
    net: Module, preprocessing: Preprocessing, dataset: Dataset, block: str | None, device: str,
    notify: Notify,
) -> Extract:  # fmt: skip
    """Features of rows of a data set by a network with published weights, or its random control.

    They are kept in the cache folder, since they take much longer to make than to read; but not
    those of your own networks, whose code may change under the same name.
    """
    kind = KEPT, type(net).__name__, getattr(net, "stem", ""), net.shapes(), block, preprocessing
    state = hashlib.sha256(f"{dataset.fingerprint} {kind}".encode())
    for array in net.state_dict().values():
        state.update(array.tobytes())
    make = batched(sight(net, preprocessing, block, device), dataset, BATCH, notify)

    def extract(rows: np.ndarray) -> np.ndarray:
        key = state.copy()
        key.update(np.arange(len(dataset.images))[rows].tobytes())  # of one type
        path = cache_folder() / f"features-{key.hexdigest()[:16]}.safetensors"
        with suppress(DataError):  # not there, or damaged
            return read(path).fetch("features")
        features = make(rows)
        try:
            safetensors.write(path, {"features": features}, {})
        except OSError as error:  # they were long in the making
            warnings.warn(f"features are not kept: {path}: {error.strerror}", stacklevel=2)
        return features

    return extract if type(net) in (InceptionV3, ResNet) else make


def check_block(net: Module, block: str | None) -> None:
    """Raise ConfigError for a block that the network lacks."""
    if block and not (isinstance(net, InceptionV3) and block in BLOCKS):
        raise ConfigError(f"block {block!r}: InceptionV3 has {', '.join(BLOCKS)}, others none")


def open_weights(path: str | Path, block: str | None) -> tuple[Module, Preprocessing]:
    """The network with the weights in a file. Raises ConfigError for a block that it lacks."""
    stored = read(path)
    net = network(stored)
    check_block(net, block)
    try:
        return net, load(net, stored, block)
    except DataError as error:
        if block or not isinstance(net, InceptionV3):
            raise
        raise DataError(f"{error}; if it ends early, name its last --block, as mixed8") from error


def open_pictures(
    name: str, preprocessing: Preprocessing, image_size: int | None = None, notify: Notify = quiet
) -> Dataset:
    """A data set for a network with published weights, stored at `image_size`. None: what is built
    in has a usual one, others are stored as large as the network sees them. Raises ConfigError if
    it is a cache file with another.
    """
    own = None if name in BUILT_IN else preprocessing.stored
    dataset = open_dataset(name, own if image_size is None else image_size, preparing(notify))
    if image_size not in (None, side := dataset.images.shape[1]):
        raise ConfigError(f"{name} is a finished cache with {side} px: leave out --image-size")
    return dataset


def calibrated(net: Module, preprocessing: Preprocessing, dataset: Dataset) -> Module:
    """Give a network with random weights the batch norm statistics of some of the images."""
    calibrate(net, preprocessing(dataset.sample(MONITORED)), BATCH)
    return net.eval()


def probe_weights(
    path: str | Path, dataset: Dataset, block: str | None, labels: int | None, device: str,
    notify: Notify,
) -> dict[str, Any]:  # fmt: skip
    """How well published weights do on a data set, beside random ones of the same network."""
    net, preprocessing = open_weights(path, block)

    def by(net: Module) -> Extract:
        return published(net, preprocessing, dataset, block, device, notify)

    systems = by(net), lambda: by(calibrated(network(read(path)), preprocessing, dataset))
    return probe(dataset, Path(path).name, *systems, labels, notify=notify)


class Encoder(NamedTuple):
    """A trained encoder, from a run or published, and pictures to use it on."""

    dataset: Dataset
    extract: Extract  # their features (n, D), by rows
    see: See  # those of other pictures
    about: dict[str, Any]  # where it is from

    def embed(self) -> np.ndarray:
        """Features h (N, D) float32 of all pictures: of centre views or, by networks that are not
        SimCLR's, of the whole.
        """
        return to_host(self.extract(np.arange(len(self.dataset.images))))


def open_encoder(
    path: str | Path, data: str | None = None, block: str | None = None, device: str | None = None,
    notify: Notify = quiet,
) -> Encoder:  # fmt: skip
    """The encoder of the run, or in the file of weights, at `path`, for pictures with this name.

    data: a name or a folder; a run has its own. Raises ConfigError, DataError.
    """
    path = Path(path)
    if isdir(path):  # noqa: PTH112 - False without permission
        if block:
            raise ConfigError("--block goes with a file of weights")
        run = open_trained(path, device)
        dataset = open_data(run, data, notify)
        extract = extractor(run, run.model, dataset, notify=notify)
        about = {"run": path.name, "step": run.step}
        return Encoder(dataset, extract, centre_sight(run, run.model), about)
    net, preprocessing = open_weights(path, block)
    if data is None:
        raise ConfigError(f"which pictures? {path} has none of its own, as a run does")
    dataset, device = open_pictures(data, preprocessing, None, notify), device or "auto"
    extract = published(net, preprocessing, dataset, block, device, notify)
    see = sight(net, preprocessing, block, device)
    return Encoder(dataset, extract, see, {"weights": path.name})


def nearest(queries: Array, h: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of the queries (Q, D) the k most similar rows of h (n, D), the nearest first.

    Returns indices and cosines, (Q, k) each, or (Q, n) if n is smaller. Raises ConfigError for k
    below 1.
    """
    if k < 1:
        raise ConfigError(f"k must be at least 1, not {k}")
    s = unit(to_host(queries)) @ unit(h).T  # (Q, D) @ (D, n)
    order = np.argsort(-s, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(s, order, axis=1).clip(-1, 1)  # rounding may exceed 1


def save(path: str | Path, h: np.ndarray, dataset: Dataset, about: dict[str, Any]) -> None:
    """Publish features as .npy, or as .h5 with the labels and file names that belong to the rows,
    the names of the classes, and what is said `about` their encoder.

    Raises ConfigError for another suffix or number of rows, OSError if it cannot be written.
    """
    if len(h) != len(dataset.images):
        raise ConfigError(f"{len(h)} rows of features for the {len(dataset.images)} of {dataset}")
    suffix = (path := Path(path)).suffix.lower()
    if suffix == ".npy":
        np.save(memory := io.BytesIO(), h)  # writing to a file, it would not notice a full disk
        write_bytes(path, memory.getbuffer())
    elif suffix == ".h5":
        arrays = {"features": h, "labels": dataset.labels}
        for names in ("file_names", "class_names"):
            encoded = [name.encode(errors="surrogateescape") for name in getattr(dataset, names)]
            arrays[names] = np.array(encoded, "S")
        about = about | {"data": dataset.fingerprint, "class_names": dataset.class_names}
        checkpoint.save(path, arrays, about)
    else:
        raise ConfigError(f"{path}: name a file that ends in .npy or .h5")
