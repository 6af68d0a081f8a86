"""minisimclr train: settings from flags, environment and files; a bar; the probe's table."""

import os
import signal
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ..config import TrainConfig, check_keys
from ..errors import ConfigError, DataError, Interrupted, typed
from .options import FILE, Duration, say, setting_option
from .probe import show_probe

PRESETS = Path(__file__).parent.parent / "presets"
SETTINGS = {f.name: f for f in fields(TrainConfig)}
ORIGINS = {ParameterSource.COMMANDLINE: "flag", ParameterSource.ENVIRONMENT: "environment"}
# One for each setting, and two that are not for training.
VARIABLES = {name: f"MINISIMCLR_{name.upper()}" for name in (*SETTINGS, "kernels", "test_data")}


def setting_options(function: Any) -> Any:
    """An option for every field of TrainConfig."""
    for f in reversed(SETTINGS.values()):
        said, choices = f.metadata["help"], f.metadata["choices"]
        kind = click.Choice(choices) if choices else f.type
        words = f"{said[0].upper()}{said[1:]}."
        function = setting_option(f.name, type=kind, default=f.default, help=words)(function)
    return function


def given(ctx: click.Context) -> dict[str, str]:
    """Which settings came with the command, and whether as a flag or from the environment."""
    ours = [name for name in os.environ if name.startswith("MINISIMCLR_")]
    check_keys(ours, VARIABLES.values(), "environment")
    return {n: ORIGINS[s] for n in SETTINGS if (s := ctx.get_parameter_source(n)) in ORIGINS}


def settle(ctx: click.Context, preset: str | None, config: Path | None) -> tuple[TrainConfig, dict]:
    """The configuration and each value's origin: flag > environment > file > preset > default."""
    import tomllib

    values: dict[str, Any] = {}
    origins = dict.fromkeys(SETTINGS, "default")
    files = [(f"preset {preset}", PRESETS / f"{preset}.toml")] if preset else []
    files += [(str(config), config)] if config else []
    for origin, path in files:
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError) as error:  # not TOML, not UTF-8, thousands of digits
            raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        check_keys(table, SETTINGS, str(path))
        values |= table
        origins |= dict.fromkeys(table, origin)
    values |= {name: ctx.params[name] for name in given(ctx)}
    return TrainConfig(**values), origins | given(ctx)


@click.command(epilog="Settings come from flags, then MINISIMCLR_* variables, --config, --preset.")
@setting_options
@click.option("--out", type=FILE, help="Run folder to make.  [default: runs/TIME-ENCODER]")
@click.option("--resume", type=FILE, help="Run folder to continue.")
@click.option("--config", type=FILE, help="TOML file of settings.")
@click.option(
    "--preset", type=click.Choice(sorted(p.stem for p in PRESETS.glob("*.toml"))), help="A recipe."
)
@click.option("--time-limit", type=Duration(), help="Save, stop training after, say, 10m, 1h30m.")
@click.option("--dry-run", is_flag=True, help="Show settings, sizes and an estimate; write no run.")
@click.pass_context
def train(ctx, out, resume, config, preset, time_limit, dry_run, **_) -> int:
    """Pre-train an encoder without labels and show what it learned.

    To show it, a linear probe scores its features, beside controls that have learned nothing.
    """
    from .. import train as training
    from .display import Display, unless_gone

    came = given(ctx)
    device = ctx.params["device"] if came.pop("device", None) else None
    if resume and ("flag" in came.values() or out or config or preset or dry_run):
        raise ConfigError("a run keeps its settings: --resume takes --time-limit and --device only")
    with Display() as display:
        how: Any = {"time_limit": time_limit, "notify": display.notify}
        try:
            if resume:
                if unused := ", ".join(VARIABLES[name] for name in came):
                    display.say(f"note: a run keeps its settings; not used: {unused}")
                run = training.resume(resume, device=device, **how)
            else:
                settings, origins = settle(ctx, preset, config)
                if dry_run:
                    plan = training.dry_run(settings, display.notify, out)
                    limit = {"time limit, s": f"{time_limit:g}"} if time_limit is not None else {}
                    return show_plan(plan | limit, origins)
                run = training.pretrain(settings, out, origins=origins, **how)
        except Interrupted as stop:
            run = stop.run
    name = str(run.path)
    path = typed(f"./{name}" if name.startswith("-") else name)  # else it would be an option
    if run.stopped:
        said = f"stopped at step {run.step} ({run.stopped}), state saved; go on with:"
        with unless_gone():
            say(said, f"  minisimclr train --resume {path}", err=True)
    if run.stopped.startswith("SIG"):
        return 128 + signal.Signals[run.stopped]
    try:
        show_probe(run)
    except DataError as error:  # training without labels is what this is for
        say(f"note: {error}", err=True)
    except KeyboardInterrupt:
        done = "saved" if run.stopped else "done and saved"
        say(f"training is {done}; to see its worth: minisimclr probe {path}", err=True)
        raise
    install = "" if find_spec("matplotlib") else " (after pip install matplotlib)"
    with unless_gone():
        say(f"to see more: minisimclr report {path}{install}", err=True)
    return 0


def show_plan(plan: dict[str, Any], origins: dict[str, str]) -> int:
    """Print what --dry-run found out."""
    for name, value in plan.pop("settings").items():
        say(f"{name:>16}  {value!s:<16} {origins[name]}")
    for name, value in plan.items():
        say(f"{name:>16}  {value}")
    return 0
