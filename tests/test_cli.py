"""The command line as a user meets it: a real process, its output, its exit code."""

import errno
import inspect
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import warnings
from contextlib import nullcontext, suppress
from dataclasses import fields
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock, patch

import click
import numpy as np
import pytest
from PIL import Image

import minisimclr
import minisimclr as ms
from minisimclr import cli, profile, tensor
from minisimclr.cli import COMMANDS, REFUSED, group, main
from minisimclr.cli.display import Display, unless_gone
from minisimclr.cli.options import Duration, Named
from minisimclr.compare import Comparison
from minisimclr.config import TrainConfig
from minisimclr.errors import DataError, typed
from minisimclr.profile import table
from minisimclr.run import new_run, open_run

SMALL = [
    *("--width", "4", "--image-size", "16", "--batch-size", "16"),
    *("--epochs", "2", "--threads", "1"),
]

FEW_LETTERS = pytest.mark.skipif(
    sys.getfilesystemencoding() != "utf-8", reason="this locale spells no such names"
)


def command_line(*arguments):
    return [sys.executable, "-m", "minisimclr", *map(str, arguments)]


def run(*arguments, env=None, **options):
    return subprocess.run(
        command_line(*arguments),
        capture_output=True, text=True, env=os.environ | (env or {}), timeout=120, **options,
    )  # fmt: skip


def fails(code, said, *arguments, **options):
    """The command exits with `code`, nothing on stdout, one line on stderr that says it."""
    done = run(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert re.search(said, done.stderr), done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    done = run("train", "--data", pictures, "--out", out, *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done


def test_train_says_what_it_does_and_ends_with_the_table(trained):
    out, done = trained
    assert "epoch 2/2" in done.stderr
    assert "\r" not in done.stderr  # no bar off a terminal
    assert "going on from" not in done.stderr  # it is new
    parameters = sum(p.data.size for _, p in open_run(out)[0].model.named_parameters())
    assert f"resnet_small with {parameters / 1e6:.2f} M parameters on cpu" in done.stderr
    assert done.stderr.splitlines()[-1] == f"to see more: minisimclr report {out}"
    for row in ("SimCLR", "random encoder", "raw pixels", "chance"):
        assert row in done.stdout
    result = json.loads((out / "probe.json").read_text())
    assert {"top1", "top5", "ci95", "C", "labels", "test", "classes", "controls"} <= result.keys()
    assert {"chance", "pixels", "random_encoder"} <= result["controls"].keys()
    low, high = result["ci95"]
    assert 0 <= low <= result["top1"] <= high <= 1


def test_parameters_are_those_of_encoder_and_head(capsys):
    run, dataset = new_run(Path("run"), TrainConfig()), Mock(notes={}, **{"split.return_value": []})
    Display().on_start(run, "cpu", "asked for", dataset, 9)
    both = sum(p.data.size for _, p in run.model.named_parameters()) / 1e6
    assert f"resnet_small with {both:.2f} M" in capsys.readouterr().err


def test_a_run_whose_name_begins_like_an_option_can_be_typed(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "-x")
    done = run("train", "--resume", "-x", cwd=tmp_path)
    assert done.stderr.splitlines()[-1] == "to see more: minisimclr report ./-x"


def test_probe_of_a_run_repeats_the_table(trained, tmp_path):
    out, done = trained
    again = run("probe", out)
    assert again.returncode == 0, again.stderr
    assert again.stdout == done.stdout
    copy = shutil.copytree(out, tmp_path / "run", ignore=shutil.ignore_patterns("probe.json"))
    values = json.loads(run("probe", copy, "--json").stdout)
    assert values == json.loads((copy / "probe.json").read_text())
    assert values == json.loads((out / "probe.json").read_text())


def test_resume_of_a_finished_run_says_so(trained):
    out, _ = trained
    done = run("train", "--resume", out)
    assert done.returncode == 0
    assert "already" in done.stderr


def test_a_damaged_checkpoint_is_a_line_of_warning(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    done = run("probe", tmp_path / "run")
    assert done.returncode == 0
    said = f"{newest}: damaged checkpoint (its SHA-256 differs); trying the one before"
    assert lasting(done.stderr) == [f"warning: {said}"]


def lasting(stderr):
    """Its lines, but for those that say how far it is, on a slow machine."""
    passing = ("features", "choosing")
    return [line for line in stderr.splitlines() if not line.startswith(passing)]


def in_the_foreground():
    """Unlike a job of a script, and behind nohup, which ignore these."""
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_DFL)


@pytest.mark.skipif(os.name == "nt", reason="one process cannot press Ctrl-C in another")
@pytest.mark.parametrize("sent, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_says_how_to_go_on(sent, code, pictures, tmp_path):
    out = tmp_path / "my run"
    command = command_line("train", "--data", pictures, "--out", out, *SMALL, "--epochs", 5000)
    child = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=in_the_foreground
    )
    while not (out / "timings.jsonl").exists() or not (out / "timings.jsonl").read_text():
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.Signals[sent])
    _, said = child.communicate(timeout=60)
    assert child.returncode == code, said
    assert f"minisimclr train --resume '{out}'" in said  # to be copied, blanks and all
    assert "Traceback" not in said and "stopping after this step, saving its state" in said
    assert list((out / "checkpoints").glob("step-*.h5"))


@pytest.mark.skipif(os.name == "nt", reason="one process cannot press Ctrl-C in another")
@pytest.mark.parametrize("sent", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_half_written_file(sent, tmp_path):
    child = subprocess.Popen(
        command_line("data", "prepare", "toydogs", "--image-size", 160),
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        stderr=subprocess.PIPE, text=True, preexec_fn=in_the_foreground,
    )  # fmt: skip
    while not list(tmp_path.rglob("*.tmp")):
        assert child.poll() is None
        time.sleep(0.01)
    child.send_signal(signal.Signals[sent])
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (-signal.Signals[sent], "")
    assert [path.suffix for path in (tmp_path / "minisimclr").iterdir()] == [".lock"]


@pytest.mark.skipif(os.name == "nt", reason="has no such terminals")
def test_a_terminal_that_closes_loses_nothing(pictures, tmp_path):
    import fcntl
    import pty
    import termios

    def begin():
        in_the_foreground()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    mine, theirs = pty.openpty()
    out = tmp_path / "run"
    child = subprocess.Popen(
        command_line("train", "--data", pictures, "--out", out, *SMALL, "--epochs", 5000),
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, preexec_fn=begin,
    )  # fmt: skip
    os.close(theirs)
    while not (out / "timings.jsonl").exists() or not (out / "timings.jsonl").read_text():
        os.read(mine, 1 << 16)
    os.close(mine)
    assert child.wait(timeout=60) == 129
    assert list((out / "checkpoints").glob("step-*.h5"))


def test_the_machines_variables_count_for_every_command(monkeypatch):
    found = [
        (command, option.name, option.envvar)
        for command in COMMANDS
        for option in group.get_command(None, command).params
        if option.name in ("device", "threads")
    ]
    assert [variable for *_, variable in found] == [f"MINISIMCLR_{n.upper()}" for _, n, _ in found]
    assert {command for command, *_ in found} >= {"train", "profile", "baseline", "probe", "embed"}
    monkeypatch.setenv("MINISIMCLR_DEVICE", "tpu")
    fails(2, "unknown device 'tpu'", "profile")
    monkeypatch.setenv("MINISIMCLR_THREADS", "many")
    fails(2, "'MINISIMCLR_THREADS': 'many'", "profile")


def test_a_resumed_run_says_where_it_goes_on_and_may_be_limited(
    pictures, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("minisimclr.cli.train.show_probe", lambda run: None)
    arguments = ["train", "--data", pictures, "--out", tmp_path / "run", *SMALL]
    for how in (arguments, ["train", "--resume", tmp_path / "run"]):
        with pytest.raises(SystemExit) as exit:
            main([*map(str, how), "--time-limit", "0"])
        assert not exit.value.code
    said = capsys.readouterr().err
    assert "going on from step 1 of 8" in said
    assert "stopped at step 2 (time limit), state saved" in said


@pytest.mark.skipif(sys.platform != "linux", reason="there is no full device")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_figures_that_find_no_room_are_no_success(unbuffered, pictures):
    run("data", "prepare", pictures)
    how = {"stderr": subprocess.PIPE, "text": True}
    how["env"] = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command_line("data", "info", pictures, "--json"), stdout=full, **how)
    assert done.returncode == 4 and done.stderr == "error: output: No space left on device\n"


def test_help_tells_of_every_command_in_a_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for above in ((), ("data",), ("weights",)):
        lines = run(*above, "--help").stdout.splitlines()[1:]
        assert max(map(len, lines)) <= 80 and not any(line.endswith("...") for line in lines)


def test_a_narrow_terminal_gets_no_bar_that_would_not_fit(monkeypatch, capfd):
    display = Display()
    display.terminal = True
    for columns, shown in ((100, True), (40, False)):
        monkeypatch.setattr(os, "get_terminal_size", lambda _, c=columns: os.terminal_size((c, 9)))
        with display:
            display.on_prepare(1, 9)
        assert ("preparing data" in capfd.readouterr().err) == display.terminal == shown


def test_the_time_left_does_not_follow_the_clock(monkeypatch):
    """A laptop that slept, or a clock that is set, moves `time`; the work has not become slower."""
    clock, passed = [1000.0], [50.0]
    monkeypatch.setattr("time.time", lambda: clock[0])
    monkeypatch.setattr("time.monotonic", lambda: passed[0])
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((100, 9)))
    display = Display()
    display.terminal = True
    for done in range(1, 20):
        display.on_progress(done, 100, "training")
        clock[0] += 7200 if done == 9 else 2
        passed[0] += 2
    assert display.bar.eta == pytest.approx(2 * 81, rel=0.2)


def test_ctrl_c_in_the_probe_says_that_training_is_done(trained, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minisimclr.cli.train.show_probe", interrupted)
    with pytest.raises(SystemExit) as exit:
        main(["train", "--resume", str(trained[0])])
    said = capsys.readouterr().err
    assert (
        exit.value.code == 130 and "is done and saved; to see its worth: minisimclr probe" in said
    )


def test_figures_of_a_training_that_find_no_room_are_no_success(trained, monkeypatch, capsys):
    full = OSError(errno.ENOSPC, "No space left on device", "probe.json")
    monkeypatch.setattr("minisimclr.cli.train.show_probe", Mock(side_effect=full))
    with pytest.raises(SystemExit) as exit:
        main(["train", "--resume", str(trained[0])])
    assert exit.value.code == 4
    assert capsys.readouterr().err.endswith("error: probe.json: No space left on device\n")


def test_ctrl_c_in_the_probe_of_a_stopped_run_does_not_say_done(
    pictures, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("minisimclr.cli.train.show_probe", Mock(side_effect=KeyboardInterrupt))
    words = "train", "--data", pictures, *SMALL, "--time-limit", 0, "--out", tmp_path / "run"
    with pytest.raises(SystemExit) as exit:
        main([str(word) for word in words])
    assert exit.value.code == 130
    assert "training is saved; to see its worth: minisimclr probe" in capsys.readouterr().err


def test_a_terminal_gets_a_bar(pictures, tmp_path):
    pty = pytest.importorskip("pty")
    out = tmp_path / "run"
    chunks = []

    def read(descriptor):
        chunks.append(os.read(descriptor, 4096))
        return chunks[-1]

    code = pty.spawn(command_line("train", "--data", pictures, "--out", out, *SMALL), read)
    screen = b"".join(chunks).decode()
    assert code == 0
    assert re.search(r"\r.*training  \[.*loss .*\(chance", screen)


@pytest.mark.skipif(os.name == "nt", reason="has no such shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_stream_stops_nothing(trained, closed):
    command = ["bash", "-c", f'"$@" {closed}', "-", *command_line("probe", trained[0], "--json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert lasting(done.stderr) == []
    assert bool(done.stdout) == (closed == "2>&-")
    command[-2:] = [os.fsdecode(b"no\xff")]
    assert subprocess.run(command, capture_output=True).returncode == 3


def test_files_that_are_no_pictures_are_counted(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "photos")
    for i in range(2):
        (tmp_path / "photos" / "blob" / f"{i}.mp4").touch()
    out = tmp_path / "run"
    done = run("train", "--data", tmp_path / "photos", *SMALL, "--out", out, "--time-limit", "0")
    assert "72 unlabelled images of photos (other files, left out: 2); run folder" in done.stderr


def test_settings_come_from_flag_environment_file_preset_default_in_this_order(pictures, tmp_path):
    toml = tmp_path / "recipe.toml"
    toml.write_text(
        f"\ufeffdata = '{pictures}'\nlr = 0.01\ntemperature = 0.3\nseed = 5\nwidth = 4\n", "utf-8"
    )
    out = tmp_path / "run"
    flags = f"--out {out} --config {toml} --seed 7 --image-size 16 --time-limit 0".split()
    flags += ["--preset", "dogs-cpu"]
    environment = {
        "MINISIMCLR_TEMPERATURE": "0.4",
        "MINISIMCLR_SEED": "6",
        "MINISIMCLR_BATCH_SIZE": "16",
    }
    done = run("train", *flags, env=environment)
    assert done.returncode == 0, done.stderr
    settings = json.loads((out / "config.json").read_text())
    assert settings["seed"] == {"value": 7, "origin": "flag"}
    assert settings["temperature"] == {"value": 0.4, "origin": "environment"}
    assert settings["lr"] == {"value": 0.01, "origin": str(toml)}
    assert settings["epochs"] == {"value": 40, "origin": "preset dogs-cpu"}
    assert settings["width"] == {"value": 4, "origin": str(toml)}
    assert settings["weight_decay"]["origin"] == "default"


def test_a_bad_value_in_the_environment_is_named():
    done = run("train", env={"MINISIMCLR_EPOCHS": "abc"})
    assert done.returncode == 2 and "value for 'MINISIMCLR_EPOCHS': 'abc'" in done.stderr
    fails(2, "'MINISIMCLR_EPOCH' .did you mean", "train", env={"MINISIMCLR_EPOCH": "3"})
    assert "MINISIMCLR" not in run("train", "--epochs", "abc").stderr
    fails(2, "MINISIMCLR_KERNELS is 'best'", "doctor", env={"MINISIMCLR_KERNELS": "best"})


def test_what_a_resumed_run_makes_of_the_environment(trained):
    out, _ = trained
    done = run("train", "--resume", out, env={"MINISIMCLR_LR": "3", "MINISIMCLR_DEVICE": "cpu"})
    assert done.returncode == 0
    assert done.stderr.startswith("note: a run keeps its settings; not used: MINISIMCLR_LR\n")
    fails(2, "unknown device 'tpu'", "train", "--resume", out, env={"MINISIMCLR_DEVICE": "tpu"})
    fails(2, "unknown device 'tpu'", "train", "--resume", out, "--device", "tpu")
    fails(2, "'MINISIMCLR_LRR' .did you", "train", "--resume", out, env={"MINISIMCLR_LRR": "3"})


def test_a_resumed_run_stays_on_its_device_unless_told(monkeypatch):
    asked, done = [], Mock(path=Path("run"), stopped="")
    monkeypatch.setattr("minisimclr.cli.train.show_probe", lambda run: None)
    monkeypatch.setattr(
        "minisimclr.train.resume", lambda *_, device, **__: asked.append(device) or done
    )
    for how in ([], ["--device", "cuda:1"]):
        with pytest.raises(SystemExit):
            main(["train", "--resume", "run", *how])
    assert asked == [None, "cuda:1"]


def test_only_a_run_can_be_gone_on_with(trained, tmp_path):
    out, _ = trained
    assert f"go on with --resume {out}" in run("train", "--out", out).stderr
    assert "--resume" not in run("train", "--out", tmp_path).stderr
    odd = shutil.copytree(out, tmp_path / "my first run")
    assert f"go on with {typed('--resume', str(odd))}\n" in run("train", "--out", odd).stderr


@pytest.mark.parametrize(
    "said, seconds", [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1h30m", 5400),
                      ("1m5s", 65), ("1h1s", 3601), ("100m", 6000), ("0", 0)],
)  # fmt: skip
def test_durations(said, seconds):
    assert Duration().convert(said, None, None) == seconds


@pytest.mark.parametrize("said", ["1h30", "1m30", "", "s", "90x", "m", "9999999999"])
def test_what_is_no_clear_duration_is_refused(said):
    with pytest.raises(click.BadParameter, match=f"'{said}' is not a duration"):
        Duration().convert(said, None, None)


def test_time_ends_when_the_device_has_done_what_it_was_asked(monkeypatch):
    order = []
    monkeypatch.setattr(profile, "synchronize", order.append)
    profile.timed(lambda: order.append("run"), "cuda:0")
    assert order == ["cuda:0", "run", "cuda:0"]


def test_nobody_observes_after_a_profile():
    for work in (lambda: None, lambda: 1 / 0):
        with suppress(ZeroDivisionError):
            profile.Recorder("cpu").record(work)
        assert tensor.observer is None


def test_an_error_is_one_line_and_names_its_file(capsys):
    assert cli.explain(DataError("a\nb")) == 3
    assert cli.explain(OSError(28, "No space left", "x.npy")) == 4
    assert capsys.readouterr().err == "error: a b\nerror: x.npy: No space left\n"


def test_a_suffix_may_be_in_capitals(tmp_path):
    assert Named(".json").convert(str(tmp_path / "A.JSON"), None, None)


def test_an_option_is_named_as_it_is_typed():
    fails(2, "'--batch-size'", "train", "--batch-size", "many")


@pytest.mark.parametrize("name, library", [("profile", profile.profile), ("compare", Comparison)])
def test_commands_and_functions_have_the_same_defaults(name, library):
    options = {option.name: option.default for option in group.get_command(None, name).params}
    same = inspect.signature(library).parameters.keys() & options.keys() - {"run", "view", "data"}
    assert len(same) > 3
    for each in same - {"inception", "simclrv2"}:
        assert options[each] == inspect.signature(library).parameters[each].default


def test_dry_run_shows_the_plan_and_writes_nothing(pictures, tmp_path):
    how = ("--out", tmp_path / "here", "--time-limit", "2m")
    done = run("train", "--data", pictures, *SMALL, "--dry-run", *how, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in ("batch_size", "flag", "default", "steps", "minutes", "parameters", how[1]):
        assert str(word) in done.stdout
    assert "time limit, s  120\n" in done.stdout and str(pictures) in done.stdout
    names = [line.strip().split("  ")[0] for line in done.stdout.splitlines()]
    assert len(set(names)) == len(names)
    at_once = run("train", "--data", pictures, *SMALL, "--dry-run", "--time-limit", 0)
    assert "time limit, s  0\n" in at_once.stdout
    assert not list(tmp_path.iterdir())
    fails(2, "exists already", "train", "--dry-run", "--out", tmp_path)
    (tmp_path / "file").touch()
    fails(4, "cannot write to", "train", "--dry-run", "--out", tmp_path / "file" / "run")


@pytest.mark.parametrize(
    "arguments, code, said",
    [
        (["--data", "nonexistent"], 3, "nonexistent"),
        (["--data", "{empty}"], 3, "empty"),
        (["--data", "{broken}"], 3, "bad.png"),
        (["--batch-size", "5000"], 2, "5000"),
        (["--encoder", "resnet19"], 2, "resnet19"),
        (["--temperature", "-1"], 2, "temperature"),
        (["--temperature", "nan"], 2, "temperature"),
        (["--lr", "fast"], 2, "fast"),
        (["--seed", "9223372036854775808"], 2, "less than 2"),
        (["--colour", "red"], 2, "--colour"),
        (["--config", "nonexistent.toml"], 2, "nonexistent.toml"),
        (["--config", "{typo}"], 2, r"typo\.toml: unknown key .*did you mean 'temperature'"),
        (["--config", "{torn}"], 2, "torn.toml"),
        (["--config", "{huge}"], 2, r"lr must be less than 2\*\*63 in size, not 1000"),
        (["--config", "{endless}"], 2, r"endless\.toml: .*digits"),
        (["--out", "{exists}"], 2, "exists already"),
        (["--out", "{torn}/run"], 4, r"cannot write to .*torn\.toml.run"),
        (["--resume", "nonexistent"], 3, r"nonexistent: not a run folder \(config.json: No such"),
        (["--resume", "{empty}", "--lr", "1"], 2, "--resume"),
        (["--resume", "{empty}", "--out", "new"], 2, "--resume takes"),
        (["--resume", "{empty}", "--config", "{typo}"], 2, "--resume takes"),
        (["--resume", "{empty}", "--preset", "dogs-cpu"], 2, "--resume takes"),
        (["--resume", "{empty}", "--dry-run"], 2, "--resume takes"),
        (["--time-limit", "soon"], 2, "soon"),
        (["--image-size", "900"], 2, "1125"),
        (["--device", "gpu"], 2, "gpu"),
        pytest.param(["--device", "cuda:²"], 2, "unknown device", marks=FEW_LETTERS),
        (["--device", "cuda:0"], 2, "CuPy|CUDA"),
    ],
)
def test_bad_input_gets_one_line_and_its_code(arguments, code, said, pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken" / "a").mkdir(parents=True)
    (tmp_path / "broken" / "a" / "bad.png").write_bytes(b"not a picture")
    (tmp_path / "typo.toml").write_text("temprature = 0.5\n")
    (tmp_path / "torn.toml").write_text("lr = [")
    (tmp_path / "huge.toml").write_text(f"lr = 1{'0' * 400}")
    (tmp_path / "endless.toml").write_text(f"lr = 1{'0' * 5000}")
    (tmp_path / "exists").mkdir()
    places = {
        "empty": tmp_path / "empty", "broken": tmp_path / "broken", "typo": tmp_path / "typo.toml",
        "torn": tmp_path / "torn.toml", "huge": tmp_path / "huge.toml",
        "endless": tmp_path / "endless.toml", "exists": tmp_path / "exists",
    }  # fmt: skip
    arguments = [a.format(**places) for a in arguments]
    data = [] if "--data" in arguments or "--resume" in arguments else ["--data", pictures]
    batch = [] if "--resume" in arguments else ["--batch-size", 16]
    fails(code, said, "train", *data, *batch, *arguments, cwd=tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="may write anywhere")
def test_a_read_only_output_folder_is_code_4(pictures, tmp_path):
    tmp_path.chmod(0o555)
    fails(4, "Permission", "train", "--data", pictures, *SMALL, "--out", tmp_path / "run")


def test_what_cannot_be_read_is_code_3(tmp_path, monkeypatch):
    (tmp_path / "weights").touch()
    monkeypatch.setattr(os, "access", lambda *_: False)  # whom click would ask first
    for command in (["weights", "inspect"], ["probe"], ["train", "--resume"], ["report"]):
        with pytest.raises(SystemExit) as exit:
            main([*command, str(tmp_path / "weights")])
        assert exit.value.code == 3, command


def test_no_labels_train_and_say_why_there_is_no_probe(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "flat").mkdir()
    for i in range(40):
        picture = rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "flat" / f"{i}.png")
    done = run("train", "--data", tmp_path / "flat", "--out", tmp_path / "run", *SMALL)
    assert done.returncode == 0, done.stderr
    assert re.search("^note: .*label", done.stderr, re.MULTILINE)
    assert not (tmp_path / "run" / "probe.json").exists()
    done = run("report", tmp_path / "run", "--out", tmp_path / "a" / "report.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "a" / "report.html").read_text("utf-8")
    assert "if there are none, training pictures" in page


@FEW_LETTERS
def test_what_the_output_cannot_spell_is_an_escape(tmp_path):
    """As on Windows, where what is piped has few letters."""
    (tmp_path / "\u00e9t\u00e9 \u72ac").mkdir()
    for i in range(5):
        Image.new("RGB", (20, 20), (i, 0, 0)).save(tmp_path / f"\u00e9t\u00e9 \u72ac/{i}.png")
    for command in ("prepare", "info"):
        done = run("data", command, tmp_path, env={"PYTHONIOENCODING": "cp1252"}, encoding="cp1252")
        assert done.returncode == 0, done.stderr
    assert "\u00e9t\u00e9 \\u72ac  pretrain     5" in done.stdout


@FEW_LETTERS
@pytest.mark.skipif(os.name == "nt", reason="has no such names")
def test_no_name_is_obeyed_by_the_terminal_or_takes_two_lines(tmp_path, capsys, pictures):
    photos = tmp_path / "photos"
    for odd in ("a\x1b[2Jb", "c\nd", "e\u202ef"):
        (photos / odd).mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (20, 20)).save(photos / odd / f"{odd}{k}.png")

    def said(*words):
        with pytest.raises(SystemExit):
            main([*map(str, words)])
        seen = capsys.readouterr()
        assert all(line.isprintable() for line in (seen.out + seen.err).split("\n"))
        return seen.out + seen.err

    assert "  a\\x1b[2Jb/a\\x1b[2Jb" in said("data", "prepare", photos)  # twice, in two splits
    assert "  c\\nd  pretrain     3" in said("data", "info", photos)
    (photos / "c\nd" / "c\nd9.png").write_bytes(b"")
    assert "'c\\nd/c\\nd9.png' cannot be decoded" in said("data", "prepare", photos)
    (photos / "c\nd" / "c\nd9.png").unlink()
    file = tmp_path / "w\x1b[2Jx.safetensors"
    ms.weights.save(ms.nn.resnet10(width=2), file, ms.weights.Preprocessing(16))
    assert "w\\x1b[2Jx.safetensors: safetensors, " in said("weights", "inspect", file)
    assert "\nw\\x1b[2Jx.safetensors  " in said("probe", file, "--data", pictures)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no full device")
def test_a_log_without_room_ends_no_training(pictures, tmp_path):
    out = tmp_path / "run"
    with Path("/dev/full").open("w") as full:
        words = command_line("train", "--data", pictures, "--out", out, *SMALL)
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=full)
    assert done.returncode == 0 and b"random encoder" in done.stdout


def test_the_command_line_leaves_warnings_to_their_program(capsys):
    before = warnings.showwarning
    with pytest.raises(SystemExit):
        main(["weights", "info", "nowhere"])
    capsys.readouterr()
    assert warnings.showwarning is before


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def fileno(self):
        return 2

    def lines(self, start=0):
        """What was written since, without control sequences."""
        text = self.getvalue()[start:]
        return re.split(r"[\r\n]", re.sub(r"\x1b\[[^A-Za-z]*[A-Za-z]", "", text))


@pytest.fixture
def terminal(monkeypatch):
    """A function that puts a terminal of so many columns in the place of stderr."""

    def wide(columns):
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(os, "get_terminal_size", lambda _: size)
        monkeypatch.setattr(sys, "stderr", Terminal())
        return sys.stderr

    return wide


@pytest.mark.parametrize("columns", [60, *range(80, 141, 4)])
def test_a_bar_fits_its_terminal(columns, terminal, monkeypatch):
    terminal(columns)
    clock = itertools.count(0, 1800)
    monkeypatch.setattr("time.time", lambda: next(clock))  # weeks to go, which the bar says
    display = Display()
    for step in range(1, 4):
        figures = {"loss": 5.0, "chance": 5.541, "accuracy": 0.3, "views_per_second": 1234.0}
        display.on_step(step=step, steps=620, **figures)
    assert re.search(r" \d\dd \d\d:", sys.stderr.getvalue())
    said = "loss 5.000 (chance 5.541)  contrastive accuracy  30%  1,234 views/s"
    assert columns < 140 or said in sys.stderr.getvalue()
    lines = sys.stderr.lines()
    assert max(map(len, lines)) <= columns
    assert ("loss 5.000" in lines[-1]) == (columns >= 80)
    display.terminal = True
    before = sys.stderr.getvalue()
    display.on_epoch(step=3, **figures)  # whose figures the bar has shown
    assert sys.stderr.getvalue() == before


def test_a_bar_leaves_room_for_its_label_and_what_it_is_of(terminal, monkeypatch):
    clock = itertools.count(1e9, 1800)
    monkeypatch.setattr("time.time", lambda: next(clock))
    screen, display = terminal(80), Display()
    for step in range(1, 4):
        item = "x" * 24 + "  " + "y" * 5
        display.on_progress(step, 620, "choosing the penalty", item)
    assert max(map(len, screen.lines())) <= 80 and "xxx" in screen.getvalue()
    (bar,) = set(map(len, re.findall(r"\[([#-]+)\]", screen.getvalue())))
    assert bar == 10
    for columns, wide in (99, 10), (100, 24):
        screen = terminal(columns)
        Display().on_progress(1, 3, "trials")
        assert {len(each) for each in re.findall(r"\[([#-]+)\]", screen.getvalue())} == {wide}


def test_a_bar_fits_a_terminal_that_becomes_narrower(terminal, monkeypatch):
    clock = itertools.count(1e9, 1800)
    monkeypatch.setattr("time.time", lambda: next(clock))
    figures = {"loss": 5.0, "chance": 5.541, "accuracy": 0.3, "views_per_second": 1234.0}
    screen, display = terminal(110), Display()
    for step, columns in enumerate((110, 110, 85, 85, 85), 1):
        size = os.terminal_size((columns, 24))
        monkeypatch.setattr(os, "get_terminal_size", lambda _, size=size: size)
        before = screen.tell()
        display.on_step(step=step, steps=620, **figures)
        assert max(map(len, screen.lines(before))) <= columns
    assert len(screen.lines()[-1]) > 70 and screen.getvalue().count("\n") == 0
    display.on_progress(1, 3, "features")  # a new bar, of the new width
    assert len(re.findall(r"\[([#-]+)\]", screen.getvalue())[-1]) == 10
    display.on_step(step=5, steps=620, **figures)
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((30, 24)))
    display.on_step(step=6, steps=620, **figures)
    assert display.bar is None and screen.getvalue().endswith("\n")


def test_one_bar_at_a_time_and_lines_above_it(terminal):
    screen, display = terminal(80), Display()
    display.on_progress(1, 3, "trials")
    display.say("one line")
    assert screen.getvalue().endswith("\r\033[Kone line\n")
    before = screen.getvalue().count("\n")
    display.on_progress(1, 3, "features")
    assert screen.getvalue().count("\n") == before + 1
    display.on_progress(2, 3, "features", "of a\x1b[2Jb")
    assert "of a\\x1b[2Jb" in screen.getvalue()
    display.on_progress(3, 3, "features")
    ended = screen.getvalue()
    display.close_bar()
    assert screen.getvalue() == ended


def test_no_file_takes_the_place_of_a_closed_stream():
    script = "import os; from minisimclr.cli import run; os.close(0); os.close(2); "
    script += "run(['--version']); os.fstat(0); os.fstat(2)"
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_nobody_has_to_read_what_is_said(code):
    with unless_gone():
        raise OSError(code, "of a terminal or log")


def test_the_time_left_is_right_from_the_second_step(terminal, monkeypatch):
    now = 1e9
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr("time.monotonic", lambda: now)
    screen, display = terminal(100), Display()
    for label in ("features", "trials"):  # of each bar from its own beginning
        for done in (1, 2):
            now += 60
            display.on_progress(done, 20, label)
    assert re.findall(r"\d\d:\d\d:\d\d", screen.getvalue()) == 2 * ["00:18:00"]


@pytest.mark.parametrize("first, left", [(0, "02:"), (500, "01:1")])
def test_the_time_left_is_that_of_what_is_done_now(first, left, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((100, 24)))
    now = 1e9
    monkeypatch.setattr("time.time", lambda: now)
    monkeypatch.setattr("time.monotonic", lambda: now)
    display = Display()
    for done in range(1, 41):  # in ten seconds each
        now += 10
        display.on_progress(first + done, 1000, "trials")
    assert re.findall(r"\d\d:\d\d:\d\d", sys.stderr.getvalue())[-1].startswith(left)


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "dumb")
    Display().on_progress(2, 2, "trials")
    assert sys.stderr.getvalue() == "trials: 2 done\n"


@pytest.mark.parametrize("error", [OSError(6, "The handle is invalid"), ValueError("descriptor")])
def test_what_only_says_it_is_a_terminal_gets_lines(error, monkeypatch):
    """Like NUL on Windows."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", Mock(side_effect=error))
    display = Display()
    for done in (1, 2, 2):
        display.on_progress(done, 2, "trials")
    assert sys.stderr.getvalue() == 2 * "trials: 2 done\n"


def test_wildcards_are_expanded_where_shells_do_not(tmp_path, monkeypatch):
    for name in ("b.jpg", "a.jpg", "[1].png", "1.png"):
        (tmp_path / name).touch()
    words = ["neighbors", "--debug", "RUN", "*.jpg", "*.gif", "[1].png"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minisimclr", *words])
    monkeypatch.setattr(cli.group, "main", lambda given, **_: given)
    with patch.object(os, "name", "posix"):
        there = cli.run(None)
    with patch.object(os, "name", "nt"):
        here, not_typed = cli.run(None), cli.run(["*.jpg"])
    assert there == ["neighbors", "RUN", "*.jpg", "*.gif", "[1].png"]
    assert here == ["neighbors", "RUN", "a.jpg", "b.jpg", "*.gif", "[1].png"]
    assert not_typed == ["*.jpg"]


def test_commands_are_shown_as_one_types_them():
    words = "minisimclr", "train", "--data", r"C:\my photos\dogs", "it's"
    with patch.object(os, "name", "posix"):
        shown = typed(*words)
    assert shown == r"""minisimclr train --data 'C:\my photos\dogs' 'it'"'"'s'"""
    with patch.object(os, "name", "nt"):
        shown, plain = typed(*words), typed(r"C:\photos")
    assert shown == r"""minisimclr train --data "C:\my photos\dogs" it's"""
    assert plain == r"C:\photos"


def test_the_word_of_windows_for_a_reader_that_left(monkeypatch):
    error = OSError(errno.EINVAL, "Invalid argument")
    errors = error, OSError(errno.EINVAL, "of a file", "x"), OSError(errno.ENOSPC, "No space left")
    monkeypatch.setattr(cli, "close_output", Mock())
    codes = []
    for system in ("posix", "nt"):
        with patch.object(os, "name", system):
            codes += map(cli.explain, errors)
    assert codes == [4, 4, 4, 0, 4, 4]


BRIEF = "listing files", "preparing data", "features", "choosing the penalty", "profiling"


@pytest.mark.parametrize("label, ends, line", [
    *((label, "\n\033[A\033[K", "") for label in BRIEF),
    ("trials", "\n", "trials: 2 done\n"), ("training", "\n", ""),
])  # fmt: skip
def test_a_bar_goes_when_it_is_of_no_more_interest(label, ends, line, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    display = Display()
    display.on_progress(1, 2, label)
    assert label in sys.stderr.getvalue()
    display.on_progress(2, 2, label)
    last = "100%" if os.name == "nt" else "\033[?25h"  # the cursor is shown again
    assert sys.stderr.getvalue().rpartition(last)[2] == ends
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    Display().on_progress(2, 2, label)
    assert sys.stderr.getvalue() == line


def test_off_a_terminal_long_work_says_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    display = Display()
    for now in range(100):
        display.on_progress(now, 5_000, "training")  # whose epochs get lines
        display.on_prepare(1000 * now, 0)
    for now in range(100, 200):
        display.on_prepare(now, 5_600)
    for now in (1000, 1001, 1002):  # after something that took long by itself
        display.on_prepare(now, 2_000)
    now = 2000
    display.on_progress(1, 4, "choosing the penalty", "raw pixels")
    said = ["listing files: 10,000", "listing files: 70,000", "preparing data: 2%"]
    said += ["preparing data: 3%", "preparing data: 50%", "choosing the penalty (raw pixels): 25%"]
    assert sys.stderr.getvalue().splitlines() == said


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EPIPE])
def test_data_are_prepared_though_nobody_can_be_told(code, monkeypatch):
    monkeypatch.setattr("minisimclr.cli.display.FIRST", 0.0)
    display = Display()
    monkeypatch.setattr(display, "say", Mock(side_effect=OSError(code, "cannot be written")))
    # Where a reader has gone the work ends, by what is no fault of the disk or the network.
    ends = pytest.raises(click.exceptions.Exit) if code == errno.EPIPE else nullcontext()
    with ends:
        display.on_prepare(1, 10)


def test_a_warning_that_nobody_can_be_told_is_no_error(monkeypatch):
    monkeypatch.setattr(click, "echo", Mock(side_effect=OSError(errno.ENOSPC, "No space left")))
    cli.tell("warning", "there are equal pictures")


def test_a_terminal_shows_how_many_files_are_listed_and_then_forgets_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    with Display() as display:
        for listed in (1000, 2000):
            display.on_prepare(listed, 0)
    shown = sys.stderr.getvalue()
    assert re.findall(r"listing files  \[-*\]  [^ \r\n\x1b]+", shown)[-1].endswith("  2,000")
    assert shown.endswith("\n\033[A\033[K") and shown.count("\n") == 1 and "%" not in shown


def test_a_bar_ends_with_its_command(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    with pytest.raises(DataError), Display() as display:
        display.on_progress(1, 2, "features")
        raise DataError("what is said next needs a line of its own")
    assert sys.stderr.getvalue().endswith("\n\033[A\033[K")


def test_divergence_is_said_once(pictures, tmp_path):
    out, settings = tmp_path / "run", [*SMALL[:-1], "2"]
    done = run("train", "--data", pictures, "--out", out, *settings, "--lr", 1e12)
    assert done.returncode == 5
    assert "diverged at step" in done.stderr
    assert done.stderr.count("diverged") == 1 and "warning" not in done.stderr


def test_no_command_shows_them_all():
    done = run()
    assert done.returncode == 2 and done.stderr.startswith("Usage: minisimclr")
    assert "walkthrough  " in done.stderr and done.stderr.count("\n") > 20


@pytest.mark.parametrize("name, said", [("trian", "did you mean 'train'"), ("xyz", "'xyz'")])
def test_a_command_that_is_none_is_one_line(name, said):
    fails(2, said, name)


@pytest.mark.parametrize(
    "command",
    [
        "probe run --view 7", "compare run --view 7", "probe run --finetune --epochs 0",
        "compare run --trials 0", "compare run --epochs 0", "baseline --random --trials 0",
        "baseline --random --epochs 0", "baseline --random --seed -1", "walkthrough --seed -1",
        "walkthrough --images 1", "walkthrough --images 13", "neighbors run a.png --count 0",
    ],
)  # fmt: skip
def test_numbers_beyond_their_range_are_refused(command, capsys):
    with pytest.raises(SystemExit) as exit:
        main(command.split())
    assert exit.value.code == 2 and "is not in the range" in capsys.readouterr().err


def test_memory_that_runs_out_is_one_line():
    fails(2, "out of memory: lower --batch-size", "profile", "--batch-size", 10**9)


def test_errors_of_cupy_s_libraries_are_one_line(monkeypatch, capsys):
    error = type("CUBLASError", (RuntimeError,), {"__module__": "cupy_backends.cuda.libs.cublas"})

    def failing(*_, **__):
        raise error("CUBLAS_STATUS_ALLOC_FAILED")

    monkeypatch.setattr("minisimclr.profile.profile", failing)
    with pytest.raises(SystemExit) as exit:
        main(["profile"])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.startswith("error: the GPU failed") and "ALLOC" in said
    with pytest.raises(error):
        main(["profile", "--debug"])
    error.__module__ = "builtins"  # ours would be a fault to see whole
    with pytest.raises(RuntimeError):
        main(["profile"])


@pytest.mark.parametrize("name", ["can't start new thread", "Could not determine home directory."])
def test_what_the_system_refuses_is_one_line(name, monkeypatch, capsys):
    monkeypatch.setattr("minisimclr.profile.profile", Mock(side_effect=RuntimeError(name)))
    with pytest.raises(SystemExit) as exit:
        main(["profile"])
    assert exit.value.code == 2
    assert capsys.readouterr().err == f"error: {REFUSED[name]}: {name}\n"


def test_debug_shows_where_an_error_comes_from():
    done = run("train", "--data", "nonexistent", "--debug")
    assert "Traceback" in done.stderr


def test_every_setting_has_its_option():
    shown = "".join(run("train", "--help").stdout.split())
    for f in fields(TrainConfig):
        flag, choices = f"--{f.name.replace('_', '-')}", f.metadata["choices"]
        assert (f"{flag}[{'|'.join(choices)}]" if choices else flag) in shown
        assert f"[default:{f.default}]" in shown[shown.index(flag) :].partition(".--")[0], flag


@pytest.mark.parametrize("command", ["report", "probe", "embed --out x.npy", "weights inspect"])
def test_a_missing_run_is_one_line_for_every_command(command, tmp_path):
    fails(3, "nope", *command.split(), "nope", cwd=tmp_path)


def test_help_of_every_command():
    shown = run("--help").stdout
    commands = re.findall(r"^  (\w+)  ", shown.split("Commands:")[1], re.M)
    assert {"train", "probe", "data", "profile"} <= set(commands)
    for command in commands:
        done = run(command, "--help")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"Usage: minisimclr {command}")


@pytest.mark.parametrize(
    "flag, said",
    [("-h", "Usage: minisimclr "), ("--version", f"minisimclr, version {version('minisimclr')}")],
)
def test_short_questions_are_answered(flag, said, capsys):
    with pytest.raises(SystemExit) as exit:
        main([flag])
    assert exit.value.code == 0 and capsys.readouterr().out.startswith(said)


def test_presets_are_valid_recipes():
    presets = sorted(Path(minisimclr.__file__).parent.glob("presets/*.toml"))
    assert [path.stem for path in presets] == ["dogs-cpu", "dogs-gpu"]
    for path in presets:
        TrainConfig(**tomllib.loads(path.read_text()))
    settings = {"image_size": 64, "batch_size": 256, "epochs": 40, "crop_min": 0.15}
    measured = TrainConfig("stanford-dogs", "resnet18", strength=0.5, **settings)
    assert TrainConfig(**tomllib.loads(presets[0].read_text())) == measured  # docs/results.md


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no shell with pipes")
def test_a_reader_that_leaves_is_no_error(pictures):
    for arguments in ("train --help", f"data prepare '{pictures}'"):
        command = f"set -o pipefail; {sys.executable} -m minisimclr {arguments} | true"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no shell with pipes")
def test_training_that_is_cut_short_by_its_reader_is_no_success(pictures, tmp_path):
    small = " ".join(map(str, SMALL))
    command = f"set -o pipefail; {sys.executable} -m minisimclr train --data '{pictures}' {small}"
    command += f" --out '{tmp_path / 'run'}' 2>&1 | true"
    assert subprocess.run(["bash", "-c", command]).returncode == 1


def test_where_json_cannot_go_is_said_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    fails(
        4, "cannot write to", "probe", tmp_path / "no run", "--json", tmp_path / "file" / "a.json"
    )


@pytest.mark.parametrize(
    "command",
    [
        "embed {run} --out {file}/h.npy",
        "compare {run} --out {file}",
        "report {run} --out {file}/r.html",
        "walkthrough --out {file}/w.html",
    ],
)
def test_where_output_cannot_go_is_said_before_any_work(command, trained, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    names = "embed.open_dataset", "report.build_report", "data.open_dataset", "train.open_dataset"
    for name in names:
        monkeypatch.setattr(f"minisimclr.{name}", Mock(side_effect=AssertionError))
    words = command.split()
    with pytest.raises(SystemExit) as exit:
        main([word.format(run=trained[0], file=tmp_path / "file") for word in words])
    assert exit.value.code == 4


def test_profile_of_nothing_is_refused(tmp_path):
    fails(2, "width must be at least 0, not -1", "profile", "--width", -1)
    for flag in ("--image-size", "--batch-size", "--steps", "--threads"):
        fails(2, "must be (at least|a whole number from 0)", "profile", flag, -1)
    (tmp_path / "file").touch()  # seen before anything is measured
    with patch("minisimclr.profile.profile") as measured, pytest.raises(SystemExit) as exit:
        main(["profile", "--trace", str(tmp_path / "file" / "trace.json")])
    assert exit.value.code == 4 and not measured.called


def test_profile(tmp_path):
    trace, figures = tmp_path / "trace.json", tmp_path / "profile.json"
    options = "--encoder resnet10 --width 4 --image-size 16 --batch-size 4 --steps 2"
    done = run("profile", *options.split(), "--trace", trace, "--json", figures)
    assert done.returncode == 0, done.stderr
    assert "Conv2d 3x3/1" in done.stdout
    result = json.loads(figures.read_text())
    said = [result[name] for name in ("encoder", "image_size", "batch_size")]
    assert said == ["resnet10", 16, 4] and result["threads"] > 0
    assert result["ops"] == sorted(result["ops"], key=lambda row: -row["seconds"])
    assert result["step_seconds"] > 0
    assert result["views_per_second"] == pytest.approx(8 / result["step_seconds"])
    rows = {(r["name"], r["direction"]): r for r in result["ops"]}
    first = rows["Conv2d 3x3/1 3>4", "forward"]
    assert first["calls"] == 1
    assert first["flops"] == 2 * (8 * 16 * 16) * (3 * 3 * 3) * 4
    assert first["bytes"] == 4 * (8 * 16 * 16 * 3 + 3 * 3 * 3 * 4 + 8 * 16 * 16 * 4)
    # The stem needs no gradient of the images: one product back, not two.
    assert rows["Conv2d 3x3/1 3>4", "backward"]["flops"] == first["flops"]
    deep = rows["Conv2d 3x3/1 32>32", "forward"]["flops"]
    assert rows["Conv2d 3x3/1 32>32", "backward"]["flops"] == 2 * deep
    # It reads the images again, and the gradient of what it made.
    both = 4 * (8 * 16 * 16 * 3 + 8 * 16 * 16 * 4)
    assert rows["Conv2d 3x3/1 3>4", "backward"]["bytes"] >= both
    # Of 2 x 2 pixels: gy, gx and x, which the batch norm before it keeps; w and gw.
    some = 4 * (3 * 8 * 2 * 2 * 32 + 2 * 3 * 3 * 32 * 32)
    assert rows["Conv2d 3x3/1 32>32", "backward"]["bytes"] == some
    assert rows["Linear", "forward"]["flops"] == 2 * 8 * 32 * (32 + 128)  # both of the head
    assert rows["NTXent", "forward"]["flops"] == 2 * 8 * 8 * 128
    assert min(result["roofline"].values()) > 1e7  # in flop and byte a second, of any machine
    events = json.loads(trace.read_text())["traceEvents"]
    assert {e["ph"] for e in events} == {"X"}
    assert {(e["name"], e["cat"]) for e in events} == rows.keys()
    assert len(events) == sum(r["calls"] for r in result["ops"])
    for figure in ("flops", "bytes"):
        assert sum(e["args"][figure] for e in events) == sum(r[figure] for r in result["ops"])
    spent = 1e6 * sum(r["seconds"] for r in result["ops"])  # microseconds
    assert sum(e["dur"] for e in events) == pytest.approx(spent)
    for before, after in pairwise(events):
        assert before["ts"] + before["dur"] <= after["ts"]


def test_the_median_of_whole_steps_is_told(monkeypatch):
    times, peaks = iter([3.0, 1.0, 8.0]), iter([7, 9])  # the second: with the roofline's vectors
    monkeypatch.setattr(profile, "peak_memory", lambda device: next(peaks))
    monkeypatch.setattr(profile, "roofline", lambda device: {"": next(peaks)})
    monkeypatch.setattr(profile, "timed", lambda work, device: (work(), next(times))[1])
    with patch.object(profile.SGD, "step") as moved:
        found = profile.profile("resnet10", "auto", 2, 49, 2, steps=3, device="cpu")
    assert (found["step_seconds"], found["stem"], moved.call_count) == (3, "imagenet", 6)
    assert found["peak_bytes"] == 7


def test_a_view_moves_no_memory_in_the_profile():
    recorder = profile.Recorder("cpu")
    x = ms.Tensor(np.zeros((8, 4), np.float32), requires_grad=True)
    recorder.record(lambda: (x[:4].reshape(2, 8).relu() * 1.0).sum().backward())
    bytes_of = {(row["name"], row["direction"]): row["bytes"] for row in recorder.rows()}
    assert bytes_of["GetItem", "forward"] == bytes_of["Reshape", "forward"] == 0
    assert bytes_of["Sum", "backward"] == 0  # one number, seen many times
    assert bytes_of["ReLU", "forward"] == 2 * 16 * 4
    (again := profile.Recorder("cpu")).record(lambda: x.mean(axis=0).sum().backward())
    moved = [e["bytes"] for e in again.events if e["direction"] == "backward"]
    assert moved == [0, 0]  # of a mean, too
    assert {row["flops"] for row in recorder.rows() if not row["bytes"]} == {0}


def test_memory_is_added_on_all_threads_for_the_roofline(monkeypatch):
    asked = []
    monkeypatch.setattr(profile, "parallel", lambda work, n: asked.append(n) or work(0, n))
    monkeypatch.setattr(profile, "timed", lambda work, device: (work(), 2.0)[1])
    assert profile.roofline("cpu", 8, 1000) == {
        "flops_per_second": 2 * 8**3 / 2, "bytes_per_second": 2 * 4 * 1000 / 2
    }  # fmt: skip
    assert asked == [1000] * 5


def test_the_table_of_the_profile_has_the_units_it_names():
    op = {"name": "Linear", "direction": "forward", "calls": 2, "seconds": 0.5}
    op |= {"flops": 4e9, "bytes": 2e8}
    ops = [op, op | {"direction": "backward", "seconds": 1.5}]
    result = {"ops": ops, "roofline": {"flops_per_second": 16e9, "bytes_per_second": 1e9}}
    result |= {"step_seconds": 0.25, "views_per_second": 512.0, "peak_bytes": 3e8}
    result |= {"device": "cpu", "threads": 2}
    head, line, _, last = table(result).splitlines()
    names = "calls ms share GFLOP MB GF/s GB/s of roof"
    figures = "2 500.00 25.0% 4.00 200.0 8.0 0.4 50%"
    assert re.sub(" +", " ", head).endswith(names) and line.split()[2:] == figures.split()
    for figure in ("250.0 ms", "512 views/s", "300 MB on cpu", "16 GF/s", "1.0 GB/s"):
        assert figure in last
    rest = table(result | {"ops": ops * 9}).splitlines()[-2]
    assert rest.split() == ["2", "more", "2000.00", "11.1%"]


def test_profile_has_the_network_that_is_trained():
    options = ("--image-size", 16, "--batch-size", 4, "--steps", 1, "--json")
    for encoder, stem in (("resnet_small", "small"), ("resnet10", "cifar")):
        done = run("profile", "--encoder", encoder, "--width", 4, *options)
        assert json.loads(done.stdout)["stem"] == stem
