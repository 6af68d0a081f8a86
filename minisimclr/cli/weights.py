"""minisimclr weights: look into files of weights, turn them into .safetensors, write a run's."""

import json
from pathlib import Path

import click

from .options import FILE, JSON, Named, say, write_json

NEW = Named(".safetensors", path_type=Path)
OUT = click.option("--out", type=NEW, required=True, help="The .safetensors file to make.")


@click.group()
def weights() -> None:
    """Read files of weights, convert them, write a run's.

    Reads those of PyTorch, Keras and TensorFlow and .safetensors; writes .safetensors.
    """


@weights.command()
@click.argument("file", type=FILE)
@JSON
def inspect(file, json_file) -> None:
    """Print the names, shapes and dtypes in FILE.

    FILE may be in any of the formats, or a run's folder; nothing in it is run.
    """
    from ..weights import read

    stored = read(file)
    arrays = {n: {"shape": list(s), "dtype": dtype} for n, (s, dtype) in stored.specs.items()}
    values = {"format": stored.format, "metadata": stored.metadata, "arrays": arrays}
    if not write_json(json_file, values):
        say(f"{stored.path}: {stored.format}, {len(arrays)} arrays")
        for key, text in stored.metadata.items():
            say(f"{key}: {text}")
        for name, (shape, dtype) in stored.specs.items():
            say(f"{dtype:<10} {'x'.join(map(str, shape)) or 'scalar':<18} {name}")


@weights.command("import")
@click.argument("file", type=FILE)
@OUT
@click.option("--until", help="Last part to import, such as mixed8 or layer3.")
def import_(file, out, until) -> None:
    """Write the encoder in FILE with torchvision's names.

    The network is the one that its shapes fit; --until takes a part, for files that stop early.
    """
    from ..weights import encoder, save

    module, preprocessing = encoder(file, until)
    save(module, out, preprocessing, until)
    say(f"{out}: {type(module).__name__}, input {preprocessing}")


@weights.command()
@click.argument("run", type=FILE)
@OUT
def export(run, out) -> None:
    """Write the encoder of RUN with torchvision's names.

    It comes from the newest checkpoint.
    """
    from ..embed import open_trained
    from ..weights import Preprocessing, save

    opened = open_trained(run)
    config = opened.config
    about = {"step": str(opened.step), "config": json.dumps(config.to_dict())}
    preprocessing = Preprocessing(config.image_size)
    save(opened.model.encoder, out, preprocessing, encoder=config.encoder, **about)
    say(f"{out}: {config.encoder} at step {opened.step}")
