"""minisimclr doctor: is this installation sound?"""

import click

from .options import JSON, say, write_json


@click.command()
@JSON
def doctor(json_file) -> int:
    """Tell whether this installation is sound.

    Looks at versions, devices, caches and disk, then tries gradients and training for some seconds.
    The exit code is 3 if something is wrong.
    """
    from ..doctor import examine

    checks = examine()
    wrong = [check.name for check in checks if not check.ok]
    verdict = f"not sound: see {', '.join(wrong)}" if wrong else "all is well"
    values = {"verdict": verdict, "checks": [check._asdict() for check in checks]}
    if not write_json(json_file, values):
        for check in checks:
            say(f"{'ok' if check.ok else 'WRONG':>5}  {check.name:<10} {check.found}")
        say(verdict)
    return 3 if wrong else 0
