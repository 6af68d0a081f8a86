"""The verdict names the fault of runs that are broken on purpose, and finds none in a sound one."""

import json
import shutil
import signal
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest

import minisimclr as ms
from minisimclr import run as runs
from minisimclr import simclr, train
from minisimclr.embed import control, open_data, probe_run
from minisimclr.errors import DivergedError, Interrupted
from minisimclr.nn import ResNet
from minisimclr.ops import loss as losses
from minisimclr.report import headline, judge, read, verdict
from minisimclr.report.verdict import FAULT, GOOD, WARNING, written_out
from minisimclr.tensor import Tensor
from minisimclr.train import pretrain


@pytest.fixture(scope="module")
def config(pictures):
    return ms.TrainConfig(
        data=str(pictures), width=8, image_size=16, batch_size=32, epochs=4, lr=0.1, threads=1,
        temperature=0.5, strength=0.5, crop_min=0.4,
    )  # fmt: skip


def faults(path):
    return {f.title: f"{f.evidence} {f.advice}" for f in judge(read(path)) if f.level == FAULT}


@pytest.fixture(scope="module")
def sound(config, tmp_path_factory):
    run = pretrain(config, tmp_path_factory.mktemp("runs") / "sound")
    (run.path / "probe.json").write_text(json.dumps(probe_run(run, open_data(run, None))))
    return run.path


def test_a_sound_run_has_no_fault(sound):
    assert faults(sound) == {}
    level, words = headline(found := judge(read(str(sound))))
    assert "The run stopped before its end" not in [finding.title for finding in found]
    assert level != FAULT
    assert words


def test_faults_come_before_warnings(monkeypatch):
    def rule(level):
        def finding(facts):
            """The run is as it is.

            Do this.
            """
            return verdict.Finding(level, "")

        return finding

    monkeypatch.setattr(verdict, "RULES", [rule(level) for level in (GOOD, WARNING, FAULT)])
    found = judge(None)
    assert [each.level for each in found] == [FAULT, WARNING, GOOD]
    assert [each.advice for each in found] == ["Do this.", "", ""]  # the fault's comes first
    assert headline(found)[0] == FAULT
    monkeypatch.setattr(verdict, "RULES", [rule(level) for level in (GOOD, WARNING)])
    assert [each.advice for each in judge(None)] == ["Do this.", ""]


def test_of_a_run_without_findings_nothing_can_be_said():
    assert headline([]) == (WARNING, "Look here: nothing can be said yet")


def no_rate(monkeypatch, config):
    monkeypatch.setattr(runs, "warmup_cosine", lambda *_: 0.0)
    return config, "weights do not move"


def tiny_rate(monkeypatch, config):
    return replace(config, lr=1e-7), "weights do not move"


def identical_views(monkeypatch, config):
    once = ms.augment.apply_views
    monkeypatch.setattr(ms.augment, "apply_views", lambda *a: (once(*a)[0],) * 2)
    return config, "views of a picture are identical"


def no_normalisation(monkeypatch, config):
    class Unnormalised(losses.NTXent):
        def forward(self, z):
            self.u = z
            ((_, self.partner, s),) = losses.similarities(z, self.temperature)
            log_p = losses.log_softmax(s)
            self.p = np.exp(log_p)
            return -log_p[self.partner].mean()

        def backward(self, gy):
            self.p[self.partner] -= 1
            g = self.p * (gy / (len(self.u) * self.temperature))
            return (g + g.T) @ self.u

    monkeypatch.setattr(losses, "NTXent", Unnormalised)
    return replace(config, lr=0.001), "not normalised"


def no_mask(monkeypatch, config):
    class Unmasked(losses.NTXent):
        def forward(self, z):
            self.u, self.length = losses.normalize(z)
            log_p = losses.log_softmax(self.u @ self.u.T / self.temperature)
            self.p = np.exp(log_p)
            return -log_p[np.arange(len(z)), losses.partners(len(z), np)].mean()

        def backward(self, gy):
            self.p[np.arange(len(self.u)), losses.partners(len(self.u), np)] -= 1
            g = self.p * (gy / (len(self.u) * self.temperature))
            du = (g + g.T) @ self.u
            return (du - self.u * (self.u * du).sum(axis=1, keepdims=True)) / self.length

    monkeypatch.setattr(losses, "NTXent", Unmasked)
    return config, "self-similarity is not masked"


def cold(monkeypatch, config):
    return replace(config, temperature=0.005), "temperature is far too low"


def constant_encoder(monkeypatch, config):
    forward = ResNet.forward
    monkeypatch.setattr(ResNet, "forward", lambda self, x: forward(self, x) * 0.0 + 1.0)
    return config, "collapsed"


def no_negatives(monkeypatch, config):
    def pull(z1, z2, temperature):
        gap = z1 - z2
        return (gap * gap).mean()

    monkeypatch.setattr(simclr, "nt_xent", pull)
    monkeypatch.setattr(simclr.ProjectionHead, "forward", lambda self, h: h * 1.0)
    return replace(config, epochs=30, lr=1.0), "collapsed"


def hot(monkeypatch, config):
    return replace(config, temperature=5.0), "temperature is far too high"


def no_temperature(monkeypatch, config):
    right = losses.nt_xent
    monkeypatch.setattr(simclr, "nt_xent", lambda z1, z2, _: right(z1, z2, 1.0))
    return config, "the temperature is left out"


def halves_added(monkeypatch, config):
    right = losses.nt_xent
    monkeypatch.setattr(simclr, "nt_xent", lambda z1, z2, t: right(z1, z2, t) * 2.0)
    return replace(config, lr=0.05), "the means of both halves are added"


def temperature_twice(monkeypatch, config):
    right = losses.nt_xent
    monkeypatch.setattr(simclr, "nt_xent", lambda z1, z2, t: right(z1, z2, t * t))
    return config, "the temperature is applied twice"


def neighbours(monkeypatch, config):
    monkeypatch.setattr(losses, "partners", lambda views, xp: xp.arange(views) ^ 1)
    return config, "neighbouring rows, not rows i and i + n, are taken for partners"


def batch_of_4(monkeypatch, config):
    return replace(config, batch_size=4, epochs=1), "batch is too small"


BREAKS = (no_rate, tiny_rate, identical_views, no_normalisation, no_mask, cold, constant_encoder,
          no_negatives, batch_of_4, hot, no_temperature, halves_added, temperature_twice,
          neighbours)  # fmt: skip


@pytest.mark.parametrize("broken", BREAKS)
def test_a_broken_run_is_named(broken, config, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        settings, words = broken(patch, config)
        run = pretrain(settings, tmp_path / "run")
    level, said = headline(judge(read(run.path)))
    assert level == FAULT and words in said.lower()


@pytest.mark.parametrize("broken", [no_normalisation, no_mask, temperature_twice])
def test_a_broken_library_is_no_alibi(broken, config, tmp_path, monkeypatch):
    """A student's own mistake is still in the code when the report is made. Its gradient need not
    fit it, but the loss tells more.
    """
    settings, words = broken(monkeypatch, config)
    monkeypatch.setattr(verdict, "gradients", Mock(side_effect=AssertionError("gradcheck")))
    level, title = headline(judge(read(pretrain(settings, tmp_path / "run").path)))
    assert level == FAULT and words in title.lower()


def test_a_gradient_that_is_not_the_loss_s_is_named(sound, monkeypatch):
    """Its loss is right, and may even fall."""
    backward = losses.NTXent.backward
    monkeypatch.setattr(losses.NTXent, "backward", lambda self, gy: 0.9 * backward(self, gy))
    findings = judge(read(sound))
    assert headline(findings) == (FAULT, "Broken: the gradient is not that of the loss")
    assert findings[0].evidence.startswith("In the code that is installed now: gradcheck: input 0")
    monkeypatch.setattr(losses.NTXent, "backward", lambda self, gy: self.v)
    (found,) = (f for f in judge(read(sound)) if f.level == FAULT)
    assert "now: AttributeError: 'NTXent' object has no attribute 'v'." in found.evidence


@pytest.mark.parametrize(
    "epoch, warmup, accuracy, above, level, words",
    [
        (2, 1.0, 0.02, 0.0, WARNING, "The loss is not yet clearly below its chance line"),
        (3, 1.0, 0.02, 0.0, FAULT, "The loss stays on the chance line"),
        (3, 2.0, 0.02, 0.0, WARNING, "The loss is not yet clearly below its chance line"),
        (3, 1.0, 0.5, 0.0, WARNING, "The loss stays on the chance line"),
        (2, 1.0, 0.02, 0.2, WARNING, "The loss is above its chance line"),
        (9, 1.0, 0.02, 0.2, FAULT, "The loss is above its chance line"),
    ],
)
def test_the_chance_line_is_no_fault_while_a_run_begins(
    epoch, warmup, accuracy, above, level, words, sound, config
):
    facts = replace(read(sound), config=replace(config, warmup_epochs=warmup))
    last = facts.epochs[-1] | {"epoch": epoch, "accuracy": accuracy}
    facts.__dict__["epochs"] = [last | {"loss": last["chance"] + above}]
    (found,) = (f for f in judge(facts) if "chance line" in f.title)
    assert (found.level, found.title) == (level, words)


def test_what_would_help_a_sound_run_is_not_advised_to_a_broken_one(config, tmp_path):
    run = pretrain(replace(config, lr=1e-7, epochs=2), tmp_path / "run")
    findings = judge(read(run.path))
    assert findings[0].title == "The weights do not move" and findings[0].advice
    assert not [f for f in findings if f.level != FAULT and f.advice]
    assert "More training would help" not in [f.title for f in findings]


def test_few_steps_of_a_warm_up_are_not_called_frozen(config, tmp_path):
    short = replace(config, optimizer="lars", lr=0.01, warmup_epochs=9.0, epochs=9)

    def stop(event, values):
        if event == "step" and values["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        pretrain(short, tmp_path / "run", notify=stop)
    run = stopped.value.run
    assert run.step == 3 and read(run.path).movement < 1e-3
    assert "The weights do not move" not in faults(run.path)


@pytest.mark.parametrize("s, seen", [(0.0, True), (0.19, True), (0.2, False), (1.0, False)])
def test_colours_that_hardly_change_are_a_warning(s, seen, sound, config):
    found = verdict.colours(replace(read(sound), config=replace(config, strength=s)))
    assert bool(found) == seen and (not found or found.level == WARNING)


@pytest.mark.parametrize("figure", ["loss", "effective_rank"])
def test_a_log_with_what_is_no_number_is_not_called_healthy(figure, sound, tmp_path):
    shutil.copytree(sound, tmp_path / "run")
    lines = (log := tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {figure: float("nan")})
    log.write_text("\n".join(lines) + "\n")
    facts = read(tmp_path / "run")
    assert len(facts.epochs) == facts.config.epochs - 1
    assert (figure == "effective_rank") == (len(facts.files["metrics"]) == len(lines))


@pytest.mark.parametrize("last_step, seen", [
    (1, "step 2: loss nan, gradient norm nan"),
    (3, "step 4: loss nan, gradient norm nan"),
    (4, "step 4: the network's outputs are not finite"),  # the last one of an epoch
])  # fmt: skip
def test_a_run_that_diverged_is_named(last_step, seen, config, tmp_path, monkeypatch):
    rates = [0.1] * (last_step - 1) + [1e30] * 9
    monkeypatch.setattr(runs, "warmup_cosine", lambda step, *_: rates[step])
    for attempt in (pretrain, lambda _, path: train.resume(path)):
        with pytest.raises(DivergedError, match=seen), np.errstate(all="ignore"):
            attempt(config, tmp_path / "run")
        level, words = headline(findings := judge(read(tmp_path / "run")))
        assert (level, words) == (FAULT, "Broken: training diverged")
        assert findings[0].evidence == f"It ended at {seen}."
        assert "The run stopped before its end" not in [finding.title for finding in findings]


def test_shuffled_labels_are_named(sound, config, tmp_path, monkeypatch):
    run = pretrain(config, tmp_path / "run")
    dataset = open_data(run, None)
    shuffled = np.random.default_rng(3).permutation(dataset.labels)
    result = probe_run(run, replace(dataset, labels=shuffled))
    result["truth"] = read(sound).files["probe"]["truth"]  # as if they were mixed up inside
    (run.path / "probe.json").write_text(json.dumps(result))
    title = "The probe's labels do not belong to its pictures"
    assert title not in faults(run.path)  # so few pictures may be at chance for other reasons
    assert any("labels of other pictures" in finding.title for finding in judge(read(run.path)))
    enough = result["test"], result["labels"], result["labels"] / result["classes"]
    monkeypatch.setattr(verdict, "ENOUGH", enough)
    assert title in faults(run.path) and title not in faults(sound)
    for i in range(3):
        more = [n + (i == k) for k, n in enumerate(enough)]
        monkeypatch.setattr(verdict, "ENOUGH", more)
        assert title not in faults(run.path)
    monkeypatch.setattr(verdict, "ENOUGH", enough)
    unequal = json.loads((run.path / "probe.json").read_text())
    for chance, named in ((0.49, True), (0.51, False)):  # of three classes
        unequal["controls"]["chance"] = chance  # to beat the commonest is hard
        (run.path / "probe.json").write_text(json.dumps(unequal))
        assert (title in faults(run.path)) == named


def test_a_run_whose_log_was_cut_short_is_not_told_to_go_on(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "run")
    log = path / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    facts = read(path)
    (found,) = (f for f in judge(facts) if f.level == WARNING and f.evidence.startswith("It is at"))
    assert facts.run.step == facts.total == facts.done + 1
    assert found.title == "The log lacks the last steps" and "--resume" not in found.advice


def test_a_first_step_whose_rate_is_0_is_not_called_frozen(config, tmp_path):
    run = pretrain(config, tmp_path / "run", time_limit=0)
    assert run.step == 1
    assert "The weights do not move" not in faults(run.path)
    facts = read(run.path)
    assert verdict.unfinished(facts).evidence == "It is at step 1 of 8."
    facts.total, facts.going = 0, True  # as for a data set that has changed
    assert verdict.unfinished(facts).evidence == "It is at step 1."
    (told,) = (f for f in judge(facts) if f.title == "Still training")
    assert told.advice == "Look again later."  # and not to resume it


def test_what_a_frozen_run_is_told(sound, tmp_path):
    still = edited(sound, tmp_path / "still", lr=0.0)
    steps, moved = len(still.files["metrics"]), f"{still.movement:.2g}"
    said = f"The highest rate of {steps} steps was 0. They moved by {moved} of their length."
    assert verdict.frozen(still).evidence == said
    still.run = None
    assert verdict.frozen(still).evidence == f"The highest rate of {steps} steps was 0."


@pytest.mark.parametrize("figure, value", [("effective_rank", 1.3), ("uniformity", -0.1)])
def test_either_sign_of_collapse_is_enough(figure, value, sound, tmp_path):
    shutil.copytree(sound, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {figure: value})
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join(lines))
    assert [title for title in faults(tmp_path / "run") if "collapsed" in title]


def test_identical_views_are_seen_even_where_the_log_does_not_show_them(sound, monkeypatch):
    identical_views(monkeypatch, None)
    assert "Both views of a picture are identical, or nearly so" in faults(sound)
    found = verdict.identical_views(read(sound))
    assert found.evidence == "In step 1 no pixel of theirs differs by more than 0 of 1."


def test_the_loss_written_out_is_the_library_s():
    rng = np.random.default_rng(0)
    z1, z2 = rng.standard_normal((2, 6, 5))
    values = written_out(z1, z2, 0.3)
    assert values["right"] == pytest.approx(float(ms.nt_xent(Tensor(z1), Tensor(z2), 0.3)))
    assert len({round(v, 6) for v in values.values()}) == len(values)
    z, i = np.concatenate([z1, z2]), np.arange(12)
    s = z @ z.T / 0.3
    both = np.log(np.exp(s).sum(axis=1)) - s[i, (i + 6) % 12]
    name = "embeddings are not normalised, self-similarity is not masked"
    assert values[name] == pytest.approx(both.mean())


@pytest.mark.parametrize(
    "nearer, seen",
    [(1.0, "is not masked"), (0.99, "is not masked"), (0.7, ""), (0.5, ""), (0.0, "")],
)
def test_a_mistake_that_hardly_changes_the_loss_is_seen_if_it_fits_clearly(
    nearer, seen, sound, tmp_path, monkeypatch
):
    """In a large batch the diagonal adds less than SAME; half way between, nobody can tell."""
    facts = read(sound)
    logged = facts.files["metrics"][0]["loss"]
    values = {"right": logged - 0.001 * nearer, "self-similarity is not masked": logged + 0.001}
    values["self-similarity is not masked"] -= 0.001 * nearer
    monkeypatch.setattr(verdict, "written_out", lambda *_: values)
    found = verdict.another_loss(facts)
    assert seen in found.title.lower() if seen else found is None


def test_a_loss_that_no_mistake_explains_is_no_fault(sound):
    facts = read(sound)
    facts.files["metrics"][0]["loss"] = 9.0
    found = verdict.another_loss(facts)
    assert (found.level, found.title) == (WARNING, "Step 1 cannot be repeated")
    right = written_out(*facts.first_z, facts.config.temperature)["right"]
    assert f"has the loss {right:.4f}; the log says 9.0000." in found.evidence


@pytest.mark.parametrize("t, high", [(0.029, False), (0.03, None), (2, None), (2.1, True)])
def test_temperatures_that_are_far_off_are_named(t, high, sound, config):
    found = verdict.temperature(replace(read(sound), config=replace(config, temperature=t)))
    assert (found and found.level) == (None if high is None else FAULT)
    assert high is None or found.title.endswith("high" if high else "low")


def test_partners_found_by_luck_are_no_identical_views(sound, config, tmp_path):
    facts = edited(sound, tmp_path / "run", accuracy=1.0)
    for size, level in ((8, FAULT), (4, None)):
        found = verdict.identical_views(replace(facts, config=replace(config, batch_size=size)))
        assert (found and found.level) == level


def test_an_epoch_is_the_mean_of_its_own_steps(sound):
    facts = read(sound)
    assert len(facts.epochs) == facts.config.epochs
    speed = {row["step"]: row["views_per_second"] for row in facts.files["timings"]}
    for end in facts.epochs:
        steps = [row for row in facts.files["metrics"] if row["epoch"] == end["epoch"]]
        for figure in ("loss", "accuracy"):
            assert end[figure] == pytest.approx(np.mean([row[figure] for row in steps]))
        rates = [speed[row["step"]] for row in steps]
        assert end["views/s"] == pytest.approx(np.median(rates))
    files = facts.files | {
        "metrics": [facts.files["metrics"][-1] | {"step": k, "epoch": 1} for k in (1, 2, 3)],
        "timings": [{"step": k, "views_per_second": v} for k, v in ((1, 9.0), (2, 300), (3, 320))],
    }
    (end,) = replace(facts, files=files).epochs
    assert end["views/s"] == 300  # the first step, a slow one, does not count


def test_of_many_test_pictures_some_of_each_class_are_shown(sound, monkeypatch):
    monkeypatch.setattr("minisimclr.report.facts.MOST", 6)
    facts = read(sound)
    assert np.bincount(facts.dataset.labels[facts.test_rows]).tolist() == [2, 2, 2]
    labels = facts.dataset.labels.copy()
    labels[facts.test_rows[::2]] = -1
    some = replace(facts, dataset=replace(facts.dataset, labels=labels))
    assert np.bincount(labels[some.test_rows]).tolist() == [2, 2, 2]  # those without are left out
    monkeypatch.setattr("minisimclr.report.facts.CLASSES", 2)  # of many, whole classes go
    some = replace(facts, files=facts.files)
    labels = facts.dataset.labels
    assert np.bincount(labels[some.test_rows]).tolist() == [3, 0, 3]


def test_pictures_that_changed_since_the_training_are_left_out(sound, monkeypatch):
    changed = replace(read(sound).dataset, fingerprint="0" * 64)
    monkeypatch.setattr("minisimclr.report.facts.open_training_data", lambda *_: changed)
    facts = read(sound)
    assert facts.run is facts.dataset is None and not facts.total
    assert any("has changed since this run" in words for words in facts.missing)
    few = replace(changed, splits=np.ones_like(changed.splits))
    monkeypatch.setattr("minisimclr.report.facts.open_training_data", lambda *_: few)
    facts = read(sound)
    assert facts.run is facts.dataset is None and "unlabelled images" in facts.missing[-1]


def test_a_damaged_checkpoint_is_told(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "run")
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1])
    facts = read(tmp_path / "run")
    assert facts.run and any("trying the one before" in words for words in facts.missing)


def test_a_probe_of_an_earlier_step_is_left_out(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "run")
    probe = json.loads((sound / "probe.json").read_text())
    assert probe["step"] == read(sound).done and read(sound).files["probe"]
    with (tmp_path / "run" / "metrics.jsonl").open("a") as log:  # killed after its checkpoint
        log.write(json.dumps(read(sound).files["metrics"][-1] | {"step": 999}) + "\n")
    assert read(tmp_path / "run").files["probe"]
    (tmp_path / "run" / "probe.json").write_text(json.dumps(probe | {"step": 3}))
    facts = read(tmp_path / "run")
    assert not facts.files["probe"] and any("of another step" in words for words in facts.missing)
    probe["rows"] = dict(list(probe["rows"].items())[:1])  # a figure without its controls
    (tmp_path / "run" / "probe.json").write_text(json.dumps(probe))
    assert not read(tmp_path / "run").files["probe"]


def edited(sound, folder, rows=None, **metrics):
    """A copy of a run with other figures in every line of its log, and other rows of its probe."""
    shutil.copytree(sound, folder)
    log = folder / "metrics.jsonl"
    lines = [json.loads(line) | metrics for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    probe = json.loads((folder / "probe.json").read_text())
    for name, top1 in (rows or {}).items():
        probe["rows"][name] |= {"top1": top1, "ci95": [top1 - 0.1, top1 + 0.1]}
    (folder / "probe.json").write_text(json.dumps(probe))
    return read(folder)


def level_of(finding):
    return finding and finding.level


@pytest.mark.parametrize("steps, level", [(2, None), (3, FAULT)])
def test_rates_of_two_steps_tell_nothing(steps, level, sound):
    facts = read(sound)
    facts.files["metrics"] = [row | {"lr": 0.0} for row in facts.files["metrics"][:steps]]
    assert level_of(verdict.frozen(facts)) == level


@pytest.mark.parametrize("steps, level", [(3, None), (5, FAULT)])
def test_weights_may_rest_while_the_rate_rises(steps, level, sound, config):
    facts = replace(read(sound), config=replace(config, warmup_epochs=2.0))  # 4 of 8 steps
    facts.files["metrics"] = [row | {"lr": 0.01} for row in facts.files["metrics"][:steps]]
    facts.__dict__["movement"] = 1e-4
    facts.files["metrics"][-1]["lr"] = 0.002  # it falls again at the end
    assert facts.total == 8 and level_of(found := verdict.frozen(facts)) == level
    assert not found or found.evidence.startswith("The highest rate of 5 steps was 0.01.")


@pytest.mark.parametrize("times, level", [(1.9, FAULT), (2.1, WARNING)])
def test_twice_as_many_partners_as_by_chance_are_no_luck(times, level, sound, tmp_path):
    facts = read(sound)
    chance, guess = facts.files["metrics"][0]["chance"], 1 / (2 * facts.config.batch_size - 1)
    found = verdict.chance_line(edited(sound, tmp_path / "on", loss=chance, accuracy=times * guess))
    assert found.level == level and f"{guess:.1%} by chance" in found.evidence


@pytest.mark.parametrize("above, title", [(0.05, ""), (0.15, "The loss is above its chance line")])
def test_a_tenth_above_the_chance_line_is_above_it(above, title, sound, tmp_path):
    loss = read(sound).files["metrics"][0]["chance"] + above
    found = verdict.chance_line(edited(sound, tmp_path / "on", loss=loss, accuracy=0.9))
    assert found.title == title


@pytest.mark.parametrize("gap, level", [(0.005, FAULT), (0.05, None)])
def test_views_that_differ_by_a_hundredth_are_the_same(gap, level, sound):
    facts, (x, other) = read(sound), np.full((2, 4, 8, 8, 3), 0.5, np.float32)
    other[0, 0, 0, 0] += gap  # as of pictures that are mostly black
    facts.__dict__["first_views"] = (None, None, (x, other))
    for row in facts.files["metrics"]:
        row["accuracy"] = 0.5
    assert level_of(verdict.identical_views(facts)) == level


def test_more_training_is_asked_for_while_the_loss_falls_and_pairs_are_missed(sound, tmp_path):
    facts = edited(sound, tmp_path / "run")
    for count, fall, asked in ((2, 0.5, True), (2, -0.5, False), (2, 0.005, False),
                               (6, 0.06, True), (6, 0.04, False), (8, 0.5, True),
                               (10, 0.5, False)):  # fmt: skip
        losses = np.repeat([3 + fall, 3], count // 2)
        facts.__dict__["epochs"] = [{"loss": loss, "accuracy": 0.9} for loss in losses]
        assert bool(found := verdict.too_short(facts)) == asked
        assert not asked or f"half of {count} epochs the loss fell {fall:.2f}" in found.evidence
    facts.__dict__["epochs"] = [{"loss": 3.5}, {"loss": 3, "accuracy": 0.995}]
    assert not verdict.too_short(facts)
    facts.__dict__["epochs"] = [{"loss": 3.5}, {"loss": 3, "accuracy": 0.9}]
    assert verdict.too_short(facts)
    facts.total += 1  # it is not at its end
    assert not verdict.too_short(facts)


@pytest.mark.parametrize("size, level", [(8, FAULT), (9, WARNING), (31, WARNING), (32, None)])
def test_small_batches_are_named(size, level, sound, config):
    found = verdict.negatives(replace(read(sound), config=replace(config, batch_size=size)))
    assert (found and found.level) == level
    assert not found or f"from only {2 * size - 2} others" in found.evidence


def test_a_loss_on_the_chance_line_is_a_fault_after_some_epochs(sound, tmp_path):
    chance = read(sound).files["metrics"][0]["chance"]
    guess = 1 / (2 * read(sound).config.batch_size - 1)
    on = edited(sound, tmp_path / "on", loss=chance, accuracy=1.5 * guess)
    assert verdict.chance_line(on).level == FAULT
    telling = verdict.chance_line(edited(sound, tmp_path / "telling", loss=chance, accuracy=0.9))
    assert telling.level == WARNING and "90.0% of the views found" in telling.evidence
    above = verdict.chance_line(edited(sound, tmp_path / "above", loss=chance + 1, accuracy=0.9))
    assert (above.level, above.title) == (WARNING, "The loss is above its chance line")
    told = f"The loss is {chance + 1:.3f}; by chance it would be ln(2N-1) = {chance:.3f}."
    assert above.evidence.startswith(told)
    assert not verdict.chance_line(on).title
    for row in on.files["metrics"]:
        row["epoch"] = 1
    early = replace(on)
    assert verdict.chance_line(early).level == WARNING


@pytest.mark.parametrize("own, other, level", [(0.9, 0.5, GOOD), (0.5, 0.9, WARNING),
                                               (0.55, 0.5, WARNING)])  # fmt: skip
def test_features_gain_if_they_clearly_beat_every_control(own, other, level, sound, tmp_path):
    rows = {"SimCLR": own, "random encoder": 0.1, "raw pixels": other}
    found = verdict.features_gain(edited(sound, tmp_path / "run", rows))
    assert found.level == level and "raw pixels" in found.evidence + found.title
    assert (
        f"Top-1 is {own:.1%}, {3 * own:.1f} times chance; raw pixels: {other:.1%}" in found.evidence
    )


def test_views_are_judged_by_the_first_steps_and_only_with_their_pictures(sound):
    facts = read(sound)
    for first, later, level in ((0.98, 1.0, None), (0.994, 0.5, FAULT)):
        for row in facts.files["metrics"]:
            row["accuracy"] = first if row["step"] <= 3 else later
        found = verdict.identical_views(facts)
        assert (found and found.level) == level
    assert found.evidence == "Before any learning 99% of the views found their partner."
    assert verdict.identical_views(replace(read(sound), dataset=None)) is None


@pytest.mark.parametrize("moved, level", [(0.0005, FAULT), (0.002, None)])
def test_weights_move_as_a_fraction_of_their_own_length(moved, level, sound):
    facts = read(sound)
    fresh = dict(facts.fresh.named_parameters())
    for name, p in facts.run.model.named_parameters():
        p.data[...] = (1 + moved) * fresh[name].data
    found = verdict.frozen(facts)
    assert facts.movement == pytest.approx(moved, rel=1e-3)
    assert (found and found.level) == level


@pytest.mark.parametrize(
    "rank, spread, level", [(1.9, -2.0, FAULT), (9.0, -0.2, FAULT), (2.1, -0.4, None)]
)
def test_features_that_are_merely_weak_have_not_collapsed(rank, spread, level, sound):
    facts = read(sound)
    facts.__dict__["epochs"] = [{"effective_rank": rank, "uniformity": spread}]
    found = verdict.collapse(facts)
    assert (found and found.level) == level
    told = f"rank of {rank:.2f} (1: all on one line); uniformity of the embeddings is {spread:.2f}"
    assert not found or told in found.evidence


def test_labels_are_cleared_by_one_system_that_is_clearly_above_chance(sound, tmp_path):
    rows = dict.fromkeys(("SimCLR", "random encoder", "raw pixels"), 0.4)  # 0.3 to 0.5
    facts = edited(sound, tmp_path / "a", rows)
    facts.files["probe"] |= {"test": 2300, "controls": {"chance": 0.35}}  # of unequal classes
    said = "No system is clearly above chance, 35.0%, on 2,300 tests: "  # some may be below it
    said += "SimCLR 40.0%, random encoder 40.0%, raw pixels 40.0%."
    assert verdict.labels(facts).evidence == said
    assert not verdict.labels(edited(sound, tmp_path / "b", rows | {"raw pixels": 0.45}))


@pytest.mark.parametrize("below, good", [(0.15, True), (0.05, False)])
@pytest.mark.parametrize("first", [0.0, 0.5])
def test_a_loss_is_good_from_a_tenth_below_both_chance_and_step_1(first, below, good, sound):
    facts = read(sound)
    last = facts.epochs[-1]
    facts.files["metrics"][0]["loss"] = last["chance"] - first
    facts.__dict__["epochs"] = [last | {"loss": last["chance"] - first - below}]
    found = verdict.chance_line(facts)
    assert (found.level == GOOD) == good
    if first and not good:  # by chance, random weights may do as well
        assert found.title == "The loss has hardly fallen"
        assert found.evidence.endswith(f"Step 1 had a loss of {last['chance'] - first:.3f}.")


def test_the_best_control_is_the_one_to_beat(sound, tmp_path):
    rows = {"SimCLR": 0.7, "random encoder": 0.8, "raw pixels": 0.1}
    found = verdict.features_gain(edited(sound, tmp_path / "run", rows))
    assert found.level == WARNING and "random encoder: 80.0%" in found.evidence
    assert found.title.endswith("the control, random encoder")


def test_chance_is_a_control_too(sound, tmp_path):
    rows = {"SimCLR": 0.5, "random encoder": 0.1, "raw pixels": 0.1}
    facts = edited(sound, tmp_path / "run", rows)
    facts.files["probe"]["controls"]["chance"] = 0.45
    found = verdict.features_gain(facts)
    assert found.title.endswith("the control, chance")
    assert "Top-1 is 50.0%, 1.1 times chance; chance: 45.0%" in found.evidence


def test_a_run_whose_pictures_are_gone_ended_with_its_last_epoch(sound, config, tmp_path):
    path = shutil.copytree(sound, tmp_path / "run")
    settings = json.loads((path / "config.json").read_text())
    settings["data"]["value"] = "/nowhere"
    for epochs in (config.epochs, config.epochs + 1):
        settings["epochs"]["value"] = epochs
        (path / "config.json").write_text(json.dumps(settings))
        found = {f.title for f in judge(read(path))}
        assert ("The run stopped before its end" in found) == (epochs > config.epochs)
        assert "More training would help" not in found or epochs == config.epochs


def test_a_probe_of_an_earlier_step_is_left_out_without_the_pictures_too(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "run")
    settings = json.loads((path / "config.json").read_text())
    settings["data"]["value"] = "/nowhere"
    (path / "config.json").write_text(json.dumps(settings))
    assert read(path).files["probe"]
    probe = json.loads((path / "probe.json").read_text())
    (path / "probe.json").write_text(json.dumps(probe | {"step": 3}))
    facts = read(path)
    assert not facts.files["probe"] and any("of another step" in words for words in facts.missing)


def test_more_training_is_asked_for_after_one_epoch_and_few(sound):
    facts = read(sound)
    facts.__dict__["epochs"] = [{"loss": 3, "accuracy": 0.9}]
    assert verdict.too_short(facts).evidence == "This was one epoch."
    facts.__dict__["epochs"] = [{"loss": x, "accuracy": 0.9} for x in (3.03, 3.03, 3, 3)]
    assert verdict.too_short(facts)


def test_what_a_perfect_model_would_reach_is_told(sound, config):
    perfect = written_out(np.eye(32), np.eye(32), 5.0)["right"]  # others at right angles
    found = verdict.temperature(replace(read(sound), config=replace(config, temperature=5.0)))
    said = f"a loss of {perfect:.2f}, chance is {simclr.chance_loss(32):.2f}."
    assert found.evidence.endswith(said)


def test_a_loss_that_is_off_by_more_than_rounding_is_told(sound):
    facts = read(sound)
    facts.files["metrics"][0]["loss"] *= 1.005
    assert verdict.another_loss(facts).title == "Step 1 cannot be repeated"
    for precision in ("tf32", "bf16"):  # whose rounding may do as much
        rounded = replace(facts, config=replace(facts.config, precision=precision))
        assert verdict.another_loss(rounded) is None


def test_features_are_the_trained_network_s_then_the_fresh_one_s(sound):
    facts = read(sound)
    h, fresh_h = facts.test_h
    views = ms.augment.center_view(facts.dataset.images[facts.test_rows], facts.config.image_size)
    np.testing.assert_allclose(h, facts.run.model.encode(views), rtol=1e-4, atol=1e-5)
    assert not np.allclose(fresh_h, h, rtol=1e-2)
    fresh = control(facts.run, facts.dataset)  # calibrated, as for the probe
    np.testing.assert_allclose(fresh_h, fresh.encode(views), rtol=1e-4, atol=1e-5)


def test_the_first_batch_is_that_of_the_run_s_seed(sound):
    facts = read(sound)
    facts.config = replace(facts.config, seed=5)
    rows = facts.dataset.split("pretrain")
    _, images, _ = next(ms.data.batches(facts.dataset.images, rows, 32, seed=5))
    np.testing.assert_array_equal(facts.first_views[0], images)


def test_a_folder_that_cannot_be_written_is_no_run_that_goes_on(sound, monkeypatch):
    monkeypatch.setattr("minisimclr.report.facts.locked", Mock(side_effect=PermissionError))
    assert not read(sound).going


def test_a_run_of_a_gpu_is_looked_at_on_the_cpu(sound, tmp_path):
    path = shutil.copytree(sound, tmp_path / "run")
    settings = json.loads((path / "config.json").read_text())
    settings["device"]["value"] = "cuda:0"
    (path / "config.json").write_text(json.dumps(settings))
    facts = read(path)
    assert facts.config.device == "cuda:0" and facts.run.config.device == "cpu"


def test_without_test_pictures_those_of_the_training_are_shown(sound):
    facts = read(sound)
    facts.dataset = replace(facts.dataset, splits=np.zeros_like(facts.dataset.splits))
    assert len(facts.test_rows) == len(facts.dataset.split("pretrain")) > 0


def test_an_epoch_whose_end_is_damaged_is_not_counted_to_the_next(sound):
    facts = read(sound)
    rows = facts.files["metrics"]
    ends = [row for row in rows if "alignment" in row]
    ends[1]["uniformity"] = float("nan")
    assert len(facts.epochs) == len(ends) - 1 > 0
    for end in facts.epochs:
        own = [row["loss"] for row in rows if row["epoch"] == end["epoch"]]
        assert end["loss"] == pytest.approx(np.mean(own))


def test_a_probe_of_labels_that_were_put_right_since_is_left_out(sound, tmp_path, monkeypatch):
    path = shutil.copytree(sound, tmp_path / "run")
    facts = read(path)
    assert facts.files["probe"]["truth"]
    mended = replace(facts.dataset, labels=np.roll(facts.dataset.labels, 1))
    assert mended.identity == facts.dataset.identity  # so training may go on
    monkeypatch.setattr("minisimclr.report.facts.open_training_data", lambda *_: mended)
    facts = read(path)
    assert facts.run and not facts.files["probe"]
    assert any("or other labels" in words for words in facts.missing)
    probe = json.loads((path / "probe.json").read_text())
    del probe["truth"]  # one of an earlier version
    (path / "probe.json").write_text(json.dumps(probe))
    assert read(path).files["probe"]


def test_a_probe_of_data_that_changed_is_still_shown(sound, monkeypatch):
    data = read(sound).dataset
    other = replace(data, fingerprint="0" * 64, labels=np.roll(data.labels, 1))
    monkeypatch.setattr("minisimclr.report.facts.open_training_data", lambda *_: other)
    facts = read(sound)
    assert facts.run is facts.dataset is None and facts.files["probe"]
    assert [words for words in facts.missing if "probe" in words] == []
