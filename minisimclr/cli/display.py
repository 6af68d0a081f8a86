"""What long work says meanwhile: a bar on a terminal; elsewhere lines, for epochs or rare ones."""

import errno
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from .options import say, shown

# What is of no interest once it is done.
PASSING = ("listing files", "preparing data", "features", "choosing the penalty", "profiling")
FIRST, NEXT = 10.0, 60.0  # seconds of work before its first line off a terminal, and between others


@contextmanager
def unless_gone() -> Iterator[None]:
    """Within the block, it is no error if the terminal is gone, or the disk of a log full, or a log
    as large as it may be: training still has to be saved.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise


class Display:
    """A context manager around long work, which is given `notify`. Writes to stderr."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.bar: Any = None
        self.due = time.monotonic() + FIRST

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *exception: Any) -> None:
        if isinstance(exception[1], BrokenPipeError):  # nobody listens: work was cut short
            raise click.exceptions.Exit(1) from exception[1]
        with unless_gone():
            self.close_bar()

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.render_finish()
            if self.bar.label in PASSING:
                click.echo("\033[A\033[K", err=True, nl=False)
            self.bar = None

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.bar is not None:
            click.echo("\r\033[K", err=True, nl=False)
        say(text, err=True)

    def on_progress(self, done: int, total: int, label: str, item: str = "") -> None:
        """Move the bar to `done`; a new one for a new label. A total of 0 is unknown."""
        if not self.terminal:
            if 0 < total <= done and label not in (*PASSING, "training"):
                self.say(f"{label}: {total:,} done")
            elif label != "training" and time.monotonic() >= self.due:
                self.due = time.monotonic() + NEXT
                of = f" ({item})" if item else ""
                self.say(f"{label}{of}: {done / total:.0%}" if total else f"{label}: {done:,}")
            return
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0: unknown
        except (OSError, ValueError):  # Windows calls NUL a terminal
            columns = 0
        width = 24 if columns >= 100 else 10
        if self.bar is not None and self.bar.label == label:  # in a terminal perhaps narrower now
            width, self.bar.max_width = self.bar.width, min(self.bar.max_width or 0, columns - 1)
        room = columns - len(label) - width - 26
        if room < 0:  # too narrow for a bar: print lines
            self.close_bar()
            self.terminal = False
            return
        if self.bar is None or self.bar.label != label:
            self.close_bar()
            unknown = iter(int, 1)  # which has no length, and from which nothing is taken
            look: Any = {"item_show_func": lambda x: x, "file": sys.stderr, "width": width}
            self.bar = click.progressbar(unknown, total or None, label, **look)
            self.began, self.first = time.monotonic(), done
        item = shown(item)
        while len(item) > room:  # a bar wider than the terminal takes a new line at each step
            item = item.rpartition("  ")[0]
        # Its time left is reckoned from `start` as if all had been done since then, but what was
        # done before a resumption was not.
        spent = time.monotonic() - self.began  # not by the clock, which a sleep moves on
        self.bar.start = time.time() - spent * done / max(1, done - self.first)
        self.bar.update(done - self.bar.pos, item)
        if 0 < total <= done:
            self.close_bar()

    def notify(self, event: str, values: dict[str, Any]) -> None:
        with unless_gone():
            getattr(self, f"on_{event}")(**values)

    def on_prepare(self, done: int, total: int) -> None:
        label, item = ("preparing data", "") if total else ("listing files", f"{done:,}")
        try:
            with unless_gone():
                self.on_progress(done, total, label, item)
        except BrokenPipeError as error:  # which might be taken for a fault of disk or network
            raise click.exceptions.Exit(1) from error

    def on_start(self, run: Any, device: str, reason: str, dataset: Any, steps: int) -> None:
        pool, config = len(dataset.split("pretrain")), run.config
        parameters = sum(p.data.size for _, p in run.model.named_parameters())
        ignored = dataset.notes.get("ignored_files", 0)
        others = f" (other files, left out: {ignored:,})" if ignored else ""
        self.say(
            f"{config.encoder} with {parameters / 1e6:.2f} M parameters on {device} ({reason}); "
            f"{pool:,} unlabelled images of {dataset.name}{others}; run folder {run.path}"
        )
        if run.step == steps:
            self.say(f"already at its last step, {steps}: nothing left to train")
        elif run.step:
            self.say(f"going on from step {run.step} of {steps}")

    def on_step(self, step: int, steps: int, **v: Any) -> None:
        said = f"loss {v['loss']:.3f} (chance {v['chance']:.3f})  "
        said += f"contrastive accuracy {v['accuracy']:4.0%}  {v['views_per_second']:,.0f} views/s"
        self.on_progress(step, steps, "training", said)

    def on_epoch(self, **values: Any) -> None:
        from ..train import epoch_line

        if not self.terminal:
            self.say(epoch_line(**values))

    def on_warning(self, text: str) -> None:
        self.say(f"warning: {text}")
