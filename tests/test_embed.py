"""An encoder used on one's own pictures, and the doctor; as commands, where a user meets them."""

import errno
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import minisimclr as ms
from minisimclr import baseline, compare, cores, doctor, embed, finetune, kernels, report
from minisimclr.augment import center_view
from minisimclr.cli import group
from minisimclr.cli.display import Display
from minisimclr.data import cache_folder
from minisimclr.errors import ConfigError, DataError, OutputError
from minisimclr.nn.resnet import BasicBlock
from minisimclr.report import facts
from minisimclr.run import moved, new_run
from minisimclr.train import pretrain, quiet, resume
from minisimclr.weights import Preprocessing


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    config = ms.TrainConfig(
        data=str(pictures), width=8, image_size=16, batch_size=32, epochs=1, threads=1
    )
    return pretrain(config, tmp_path_factory.mktemp("runs") / "run")


def call(*arguments):
    return CliRunner().invoke(group, list(map(str, arguments)), catch_exceptions=False)


def test_nearest_is_by_cosine():
    h = np.array([[1.0, 0], [0, 3], [2, 2], [-1, 0]])
    order, cosines = embed.nearest(np.array([[5.0, 1]]), h, 3)
    assert order.tolist() == [[0, 2, 1]]
    np.testing.assert_allclose(cosines[0], np.array([5, 6 / 2**0.5, 1]) / 26**0.5)


def test_no_neighbours_are_no_question():
    with pytest.raises(ConfigError, match="k must be at least 1, not 0"):
        embed.nearest(np.eye(2), np.eye(2), 0)


def test_no_cosine_of_neighbours_is_above_one():
    h = np.random.default_rng(0).standard_normal((60, 128)).astype(np.float32)
    _, cosines = embed.nearest(h, h, 1)
    assert 1 - 1e-6 < cosines.min() <= cosines.max() <= 1


def test_embed_writes_the_encoder_s_features(run, pictures, tmp_path):
    said = call("embed", run.path, "--out", tmp_path / "h.npy").stdout
    assert said == f"{tmp_path / 'h.npy'}: features (120, 32) of {pictures.name}\n"
    assert call("embed", run.path, pictures, "--out", tmp_path / "h.h5").exit_code == 0
    dataset = ms.data.open_dataset(pictures, 20)
    expected = run.model.encode(center_view(np.asarray(dataset.images), 16))
    np.testing.assert_allclose(np.load(tmp_path / "h.npy"), expected, rtol=1e-4, atol=1e-5)
    with h5py.File(tmp_path / "h.h5") as file:
        np.testing.assert_allclose(file["features"][:], expected, rtol=1e-4, atol=1e-5)
        assert file["labels"][:].tolist() == dataset.labels.tolist()
        assert file["file_names"][7].decode() == dataset.file_names[7]
        assert file["class_names"][:].tolist() == [b"blob", b"check", b"stripe"]
        about = json.loads(bytes(file["state"][:]))
    assert about["class_names"] == ["blob", "check", "stripe"]
    assert (about["data"], about["run"], about["step"]) == (dataset.fingerprint, "run", run.step)
    with pytest.raises(DataError, match="it holds features, not weights"):
        ms.weights.read(tmp_path / "h.h5")


def test_what_takes_long_tells_how_far_it_is(run, pictures):
    dataset, told = ms.data.open_dataset(pictures, 20), []

    def note(event, values):
        told.append((event, values["done"], values["total"], values["label"]))

    n = len(dataset.images)
    embed.extractor(run, run.model, dataset, notify=note)(np.arange(n))
    assert told == [("progress", 64, n, "features"), ("progress", n, n, "features")]
    told.clear()
    few = replace(run, config=replace(run.config, batch_size=2))  # no more than fit into a step
    embed.probe_run(few, dataset, notify=note)
    train, test = (len(dataset.split(name)) for name in ("labelled", "test"))
    expected = [(min(i + 4, n), n) for n in (train, test) for i in range(0, n, 4)]
    penalty = [(k + 1, 55) for k in range(55)]
    assert [(done, total) for _, done, total, _ in told] == 2 * (expected + penalty) + penalty


def test_the_random_control_has_batch_norm_statistics_of_the_data(pictures):
    dataset, preprocessing = ms.data.open_dataset(pictures, 20), Preprocessing(16, "imagenet")
    net = embed.calibrated(ms.nn.resnet10(width=4), preprocessing, dataset)
    images = preprocessing(dataset.sample(64))  # whole batches
    seen = ms.nn.resnet10(width=4).conv1(ms.Tensor(images)).data
    np.testing.assert_allclose(net.bn1.running_mean, seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
    assert not net.training


def test_control_and_trained_network_are_calibrated_alike(run, pictures):
    dataset = ms.data.open_dataset(pictures, 20)
    views = center_view(dataset.sample(64), run.config.image_size)  # one whole batch
    for model in (run.model, embed.control(run, dataset)):
        seen = model.encoder.conv1(ms.Tensor(views)).data
        np.testing.assert_allclose(model.encoder.bn1.running_mean, seen.mean((0, 1, 2)), atol=1e-5)
    fresh = facts.read(run.path).test_h[1]
    expected = embed.extractor(run, model, dataset)(dataset.split("test"))
    np.testing.assert_allclose(fresh, expected, rtol=1e-4, atol=1e-5)


def test_the_control_of_a_run_is_of_its_seed(pictures):
    config = ms.TrainConfig(data=str(pictures), width=4, image_size=16, batch_size=32, seed=1)
    new = new_run("", config)
    control = embed.control(new, ms.data.open_dataset(pictures, 20)).encoder
    weights = dict(control.named_parameters())
    for name, w in new.model.encoder.named_parameters():
        np.testing.assert_array_equal(w.data, weights[name].data)


def test_kept_features_are_of_this_network_alone(pictures):
    dataset, rows = ms.data.open_dataset(pictures, 20), np.arange(3)
    made = []
    for stem, seed in (("imagenet", 0), ("simclr", 0), ("imagenet", 1)):
        net = ms.nn.resnet10(stem, 4, seed)
        extract = embed.published(net, Preprocessing(32), dataset, None, "cpu", lambda *_: None)
        made.append(extract(rows))
        np.testing.assert_array_equal(extract(rows), made[-1])
        kept = max(cache_folder().glob("features-*"), key=lambda path: path.stat().st_mtime_ns)
        kept.write_bytes(kept.read_bytes()[:-1])  # damaged, it is made anew
        np.testing.assert_array_equal(extract(rows), made[-1])
    net.bn1.running_mean = net.bn1.running_mean + 1  # the same weights, calibrated otherwise
    made.append(embed.published(net, Preprocessing(32), dataset, None, "cpu", quiet)(rows))
    assert len({features.tobytes() for features in made}) == 4


def test_kept_features_are_read_and_not_made_again(pictures, monkeypatch):
    dataset, made = ms.data.open_dataset(pictures, 20), []
    sight = Mock(return_value=lambda x: made.append(len(x)) or np.ones((len(x), 4), np.float32))
    monkeypatch.setattr(embed, "sight", sight)
    for _ in range(2):
        net = ms.nn.resnet10("imagenet", 4, seed=77)
        extract = embed.published(net, Preprocessing(32), dataset, None, "cpu", quiet)
        for count in (3, 2, 3):
            assert extract(np.arange(count)).shape == (count, 4)
    assert made == [3, 2]
    monkeypatch.setattr(embed, "KEPT", embed.KEPT + 1)
    embed.published(net, Preprocessing(32), dataset, None, "cpu", quiet)(np.arange(3))
    assert made == [3, 2, 3]


def test_kept_features_are_of_these_pictures_rows_pixels_and_block(pictures):
    dataset, net, rows = ms.data.open_dataset(pictures, 20), ms.nn.inception_v3(), np.arange(3)
    negative = replace(dataset, images=255 - dataset.images, fingerprint="other")
    prep, other = Preprocessing(80, "symmetric"), Preprocessing(80, "imagenet")
    made = [
        embed.published(net, pixels, data, block, "cpu", quiet)(some).tobytes()
        for data, some, pixels, block in (
            (dataset, rows, prep, "mixed0"),
            (negative, rows, prep, "mixed0"),
            (dataset, rows + 1, prep, "mixed0"),
            (dataset, rows, other, "mixed0"),
            (dataset, rows, prep, "mixed1"),
            (dataset, rows, Preprocessing(96, "symmetric"), "mixed0"),
        )
    ]
    assert len(set(made)) == len(made)
    extract = embed.published(net, prep, dataset, "mixed0", "cpu", quiet)
    np.testing.assert_array_equal(extract(np.array([1, 0], np.int32)), extract([1, 0]))
    assert len(extract([1])) == 1  # of the same bytes, as int64
    with pytest.raises(DataError, match=r"\(0, 256\).* empty"):
        extract(rows[:0])


def test_features_of_a_network_of_your_own_are_made_anew(pictures):
    dataset, factor = ms.data.open_dataset(pictures, 20), 0

    class Own(ms.nn.Module):
        def forward(self, x):
            return x.mean(axis=(1, 2)) * factor

    class OwnResNet(ms.nn.ResNet):
        def forward(self, x):
            return super().forward(x) * factor

    likes = vars(ms.nn.resnet_small(width=4))
    for factor, kind in itertools.product((1, 0), (Own, OwnResNet)):
        vars(net := kind.__new__(kind)).update(likes)
        extract = embed.published(net, Preprocessing(16), dataset, None, "cpu", quiet)
        assert extract(np.arange(3)).any() == factor


def test_features_that_are_not_finite_are_refused_and_those_that_cannot_be_kept_used(
    pictures, monkeypatch
):
    dataset, net, rows = ms.data.open_dataset(pictures, 20), ms.nn.resnet10(width=4), np.arange(3)

    def features(see):
        monkeypatch.setattr(embed, "sight", lambda *_: see)
        return embed.published(net, Preprocessing(32), dataset, None, "cpu", quiet)(rows)

    with pytest.raises(DataError, match="not finite"):
        features(lambda images: np.full((len(images), 4), np.nan, np.float32))
    full = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(embed.safetensors, "write", full)
    with pytest.warns(UserWarning, match=r"are not kept: .*features-.*: No space left on device"):
        found = features(lambda images: np.ones((len(images), 4), np.float32))
    assert (found == 1).all() and found.shape == (3, 4)


ROW = {"top1": 0.5, "top5": 0.5, "ci95": [0.4, 0.6], "warning": ""}
FOUND = {"labels": 1, "test": 1, "classes": 2, "controls": {"chance": 0.5}, "rows": {"a": ROW}}


@pytest.mark.parametrize(
    "tuned, epochs", [((), ()), (("--finetune", "--epochs", 3), (3,)), (("--finetune",), (60,))]
)
def test_options_of_a_probe_arrive_and_only_one_without_them_is_kept(
    tuned, epochs, run, tmp_path, monkeypatch
):
    def probe_run(run, dataset, labels, view, notify):
        asked.append((labels, view))
        return FOUND

    def finetuned(run, dataset, labels, epochs, view, notify):
        asked.append((labels, view, epochs))
        return FOUND

    monkeypatch.setattr(embed, "probe_run", probe_run)
    monkeypatch.setattr(finetune, "finetune", finetuned)
    path, asked = shutil.copytree(run.path, tmp_path / "run"), []
    kept = path / ("finetune.json" if tuned else "probe.json")
    kept.write_text("{}")
    for options in (("--labels", 7), ("--view", 18), ("--data", run.config.data)):
        assert call("probe", path, *tuned, *options).exit_code == 0
        assert kept.read_text() == "{}"
    assert call("probe", path, *tuned).exit_code == 0
    assert json.loads(kept.read_text()) == FOUND
    given = (7, None), (None, 18), (None, None), (None, None)
    assert asked == [(*each, *epochs) for each in given]


def test_options_of_a_probe_of_weights_arrive(run, pictures, tmp_path, monkeypatch):
    def probe_weights(path, dataset, block, labels, device, notify):
        asked.append((path, dataset.images.shape[1], block, labels, device))
        return FOUND

    file, asked = tmp_path / "w.safetensors", []
    ms.weights.save(run.model.encoder, file, Preprocessing(16))
    monkeypatch.setattr(embed, "probe_weights", probe_weights)
    options = "--image-size=20", "--block=mixed3", "--labels=7", "--device=cuda:1"
    assert call("probe", file, "--data", pictures, *options).exit_code == 0
    assert asked == [(file, 20, "mixed3", 7, "cuda:1")]
    assert call("probe", file, "--data", pictures).exit_code == 0
    assert asked[1:] == [(file, 18, None, None, "auto")]  # 16 in the centre view


def test_one_picture_is_too_few_to_probe_before_it_is_for_statistics(run, tmp_path):
    file = tmp_path / "w.safetensors"
    ms.weights.save(run.model.encoder, file, Preprocessing(16))
    (one := tmp_path / "pictures" / "one").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(one / "picture.png")
    for path in run.path, file:
        with pytest.raises(DataError, match="two classes and test images are needed; labelled: 0"):
            call("probe", path, "--data", one.parent)


def test_a_picture_alone_in_pretrain_is_too_few_for_statistics(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (13, 20, 20, 3), np.uint8)
    labels, testing = [0] * 4 + [1] * 3 + [0] * 3 + [1] * 3, np.arange(13) >= 7
    given = tmp_path / "a.h5", images, labels, ["a", "b"], testing
    dataset = ms.data.from_arrays(*given, labels_per_class=3)
    assert [len(dataset.split(name)) for name in ("pretrain", "labelled", "test")] == [1, 6, 6]
    assert len(dataset.sample(256)) == 6
    assert embed.probe_run(run, dataset)["test"] == 6


PREPARING, FEATURES, PENALTY = "preparing data", "features", "choosing the penalty"
TUNING = "SimCLR, fine-tuned, rate x 1"


@pytest.mark.parametrize(
    "command, shown",
    [
        ("data prepare {data}", {PREPARING}),
        ("embed {run} {data} --out {out}/h.npy", {PREPARING, FEATURES}),
        ("neighbors {run} {query} --data {data}", {PREPARING, FEATURES}),
        ("probe {run} --data {data}", {PREPARING, FEATURES, PENALTY}),
        ("probe {run} --finetune --epochs 1", {PREPARING, TUNING}),
        ("embed {weights} {data} --out {out}/h.npy", {PREPARING, FEATURES}),
        ("probe {weights} --data {data}", {PREPARING, FEATURES, PENALTY}),
        ("baseline --random --trials 1 --epochs 1 --data {data}", {PREPARING, FEATURES, "trials"}),
        ("walkthrough --data {data} --out {out}/w.html", {PREPARING}),
        ("report {run} --out {out}/r.html", {PREPARING, FEATURES}),
        ("profile --steps 1 --batch-size 2 --width 4", {"profiling"}),
        ("train --data {data} --out {out}/run --width 4 --image-size 16 --batch-size 16"
         " --time-limit 0", {PREPARING, FEATURES, PENALTY, "training"}),
        ("train --dry-run --data {data} --image-size 16 --batch-size 16", {PREPARING}),
        ("compare {run} --data {data} --epochs 1 --out {out}",
         {PREPARING, FEATURES, PENALTY, TUNING, "label-efficiency curve"}),
    ],
)  # fmt: skip
def test_what_takes_long_is_shown_by_every_command(
    command, shown, run, pictures, tmp_path, monkeypatch
):
    def inception(dataset, file, block, device, notify):
        notify("progress", {"done": 1, "total": 1, "label": FEATURES})
        return lambda rows: dataset.images[rows].mean((1, 2)).astype("f4")

    if command.startswith(("report", "walkthrough")):
        pytest.importorskip("matplotlib")
    roof, told = {"flops_per_second": 1.0, "bytes_per_second": 1.0}, set()
    for target, name, value in (
        (Display, "on_progress", lambda self, done, total, label, item="": told.add(label)),
        (baseline, "inception", inception),
        (doctor.profile, "roofline", lambda *_: roof),
        (finetune, "FACTORS", (1, 2, 4)),
        (compare, "BUDGETS", (1,)),
    ):
        monkeypatch.setattr(target, name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing is made yet
    ms.weights.save(run.model.encoder, tmp_path / "w.safetensors", Preprocessing(16))
    places = {"run": run.path, "data": pictures, "out": tmp_path}
    places |= {"query": pictures / "blob" / "00.png", "weights": tmp_path / "w.safetensors"}
    assert call(*(word.format(**places) for word in command.split())).exit_code == 0
    assert shown <= told


def test_a_run_is_used_with_its_own_threads(run):
    cores.set_threads(2)
    embed.open_trained(run.path)
    assert cores.threads() == run.config.threads == 1


def test_a_run_finds_its_pictures_from_anywhere_and_takes_no_others(
    pictures, tmp_path, monkeypatch
):
    shutil.copytree(pictures, tmp_path / "here" / "photos")
    shutil.copytree(pictures, tmp_path / "there" / "photos")
    (tmp_path / "there" / "photos" / "blob" / "00.png").unlink()
    monkeypatch.chdir(tmp_path / "here")
    config = ms.TrainConfig(data="photos", width=4, image_size=16, batch_size=16)
    made = pretrain(config, tmp_path / "run", time_limit=0, notify=quiet)
    assert made.config.data == str(tmp_path / "here" / "photos")
    monkeypatch.chdir(tmp_path / "there")
    assert call("probe", made.path).exit_code == 0
    before = (made.path / "probe.json").read_bytes()
    shutil.rmtree(tmp_path / "here" / "photos" / "blob")
    out = ["--out", tmp_path / "h.npy"]
    for command in (["probe"], ["embed", *out], ["compare", "--epochs", 1, *out]):
        with pytest.raises(
            DataError, match=r"other pictures or splits .* name them in the command, .* for testing"
        ):
            call(*command, made.path)
    assert call("probe", made.path, "--data", tmp_path / "here" / "photos").exit_code == 0
    assert (made.path / "probe.json").read_bytes() == before


def test_a_run_and_its_pictures_may_move_together(pictures, tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(pictures, project / "photos")
    config = ms.TrainConfig(data=str(project / "photos"), width=4, image_size=16, batch_size=16)
    pretrain(config, project / "runs" / "a", time_limit=0, notify=quiet)
    project.rename(tmp_path / "elsewhere")
    run = embed.open_trained(tmp_path / "elsewhere" / "runs" / "a")
    assert run.config.data == str(tmp_path / "elsewhere" / "photos")
    monkeypatch.chdir(run.path.parent)
    assert embed.open_trained(Path("a")).config.data == run.config.data
    alone = shutil.copytree(run.path, tmp_path / "alone")
    monkeypatch.chdir(tmp_path / "elsewhere")  # where the pictures are
    assert embed.open_trained(alone).config.data == run.config.data
    run.path.with_name("toydogs").mkdir()
    assert moved(run.path, "toydogs") == "toydogs"
    assert resume(run.path, time_limit=0, notify=quiet).step == 2
    shutil.rmtree(tmp_path / "elsewhere" / "photos")
    stat, theirs = Path.stat, project / "photos"  # now in a folder that nobody else may enter

    def shut(path, **how):
        if path == theirs:
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", shut)
        assert moved(run.path, str(theirs)) == str(theirs)
    with pytest.raises(DataError, match=re.escape(f"{project / 'photos'}: no such folder")):
        resume(run.path)
    namesake = run.path.rename(run.path.with_name("photos"))
    with pytest.raises(DataError, match=re.escape(f"{project / 'photos'}: no such folder")):
        resume(namesake)


def test_a_file_that_is_not_to_be_written_is_refused_before_work(tmp_path):
    done = CliRunner().invoke(group, ["embed", "no run", "--out", str(tmp_path / "h.csv")])
    assert done.exit_code == 2
    assert "value for '--out': " in done.output and "must end in .npy or .h5" in done.output
    for name in ("mine.h5", "mine.npy", "MINE.H5"):  # a data set, a checkpoint, hours of work
        (taken := tmp_path / name).write_bytes(b"precious")
        done = CliRunner().invoke(group, ["embed", "no run", "--out", str(taken)])
        assert done.exit_code == 2 and f"{name}' exists: choose another name" in done.output
        assert taken.read_bytes() == b"precious"
    for command in (["report", "no run"], ["walkthrough"]):
        done = CliRunner().invoke(group, [*command, "--out", str(tmp_path / "metrics.jsonl")])
        assert done.exit_code == 2 and "must end in .html" in done.output
    with pytest.raises(ConfigError, match=r"\.h5"):
        embed.save(tmp_path / "h.csv", np.zeros((1, 2)), SimpleNamespace(images=[0]), {})


def test_features_of_other_pictures_are_not_saved_beside_these_labels(pictures, tmp_path):
    dataset = ms.data.open_dataset(pictures, 20)
    with pytest.raises(ConfigError, match="3 rows of features for the 120 of Dataset"):
        embed.save(tmp_path / "h.h5", np.zeros((3, 2)), dataset, {})
    assert not list(tmp_path.iterdir())


def test_published_weights_are_used_like_a_run(pictures, tmp_path):
    file, net = tmp_path / "w.safetensors", ms.nn.resnet10(width=8, seed=3)
    ms.weights.save(net, file, Preprocessing(28))
    said = call("embed", file, pictures, "--out", tmp_path / "h.h5").stdout
    assert said == f"{tmp_path / 'h.h5'}: features (120, 64) of {pictures.name}\n"
    images = ms.data.open_dataset(pictures, 32).images  # of which the centre view shows 28
    expected = net.eval()(ms.Tensor(center_view(np.asarray(images), 28))).data
    with h5py.File(tmp_path / "h.h5") as made:
        np.testing.assert_allclose(made["features"][:], expected, rtol=1e-4, atol=1e-5)
        assert json.loads(bytes(made["state"][:]))["weights"] == "w.safetensors"
    made = embed.open_encoder(str(file), str(pictures))
    embed.save(tmp_path / "again.h5", made.embed(), made.dataset, made.about)
    assert made.about == {"weights": "w.safetensors"}
    query = pictures / "stripe" / "21.png"
    found = json.loads(call("neighbors", file, query, "--data", pictures, "--json").stdout)
    _, cosines = embed.nearest(expected[[80 + 21]], expected, 5)
    assert found[str(query)][0]["file"] == "stripe/21.png"
    assert [row["cosine"] for row in found[str(query)]] == pytest.approx(cosines[0].tolist())


def test_published_weights_are_used_on_the_device_that_is_named(pictures, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(embed, "sight", lambda *given: asked.append(given[3]))
    ms.weights.save(ms.nn.resnet10(width=4), path := tmp_path / "w.safetensors", Preprocessing(16))
    for device in ("cuda:1", None):
        embed.open_encoder(path, str(pictures), device=device)
    assert asked == ["cuda:1"] * 2 + ["auto"] * 2


def test_queries_are_seen_through_the_block_that_is_named(pictures, monkeypatch):
    asked = []
    monkeypatch.setattr(embed, "open_weights", lambda *_: (None, Preprocessing(16)))
    monkeypatch.setattr(embed, "published", lambda *given: asked.append(given[3]))
    monkeypatch.setattr(embed, "sight", lambda *given: asked.append(given[2]))
    embed.open_encoder("w", str(pictures), "mixed0")
    assert asked == ["mixed0"] * 2


def test_pictures_for_weights_are_as_large_as_they_see_unless_built_in(pictures, monkeypatch):
    simclr, inception = Preprocessing(28), Preprocessing(31, "symmetric")
    assert embed.open_pictures(str(pictures), simclr).images.shape[1] == 32  # 28 in the centre
    assert embed.open_pictures(str(pictures), inception).images.shape[1] == 31
    assert embed.open_pictures(str(pictures), inception, 20).images.shape[1] == 20
    path = str(embed.open_pictures(str(pictures), inception, 20).path)
    assert str(embed.open_pictures(path, inception, 20).path) == path
    with pytest.raises(ConfigError, match="a finished cache with 20 px: leave out --image-size"):
        embed.open_pictures(path, inception, 24)
    asked = MagicMock()
    monkeypatch.setattr(embed, "open_dataset", asked)
    embed.open_pictures("stanford-dogs", simclr)
    assert asked.call_args.args[:2] == ("stanford-dogs", None)  # as prepared


def test_a_block_of_inception_is_pooled_in_its_own_range(pictures, tmp_path):
    few, file = tmp_path / "few", tmp_path / "w.safetensors"
    few.mkdir()
    for name in ("00.png", "01.png"):
        shutil.copy(pictures / "blob" / name, few)
    net, prep = ms.nn.inception_v3(), Preprocessing(299, "symmetric")
    ms.weights.save(net, file, prep, until="mixed0")
    given = "embed", file, few, "--block=mixed0", "--out", tmp_path / "h.npy"
    assert call(*given).exit_code == 0
    with pytest.raises(DataError, match=r"missing .*; if it ends early, name its last --block"):
        call("embed", file, few, "--out", tmp_path / "whole.npy")
    x = prep(ms.data.open_dataset(few, 299).images)
    expected = net.eval().features(ms.Tensor(x), "mixed0").data.mean((1, 2))
    np.testing.assert_allclose(np.load(tmp_path / "h.npy"), expected, rtol=1e-4, atol=1e-5)


def test_what_weights_and_runs_do_not_have_is_said(run, tmp_path):
    ms.weights.save(run.model.encoder, tmp_path / "w.safetensors", Preprocessing(16))
    with pytest.raises(ConfigError, match=r"which pictures\? .*w.safetensors has none"):
        call("embed", tmp_path / "w.safetensors", "--out", tmp_path / "h.npy")
    with pytest.raises(ConfigError, match=r"block 'layer3': InceptionV3 has .* others none"):
        call("embed", tmp_path / "w.safetensors", tmp_path, "--block=layer3", "--out=h.npy")
    with pytest.raises(ConfigError, match="--block goes with a file of weights"):
        call("neighbors", run.path, tmp_path / "a.png", "--block=mixed8")


def test_neighbors_finds_the_picture_itself_first(run, pictures, tmp_path):
    query, sheet = pictures / "check" / "03.png", tmp_path / "sheet.png"
    done = call("neighbors", run.path, query, "--count", 3, "--sheet", sheet, "--json")
    found = json.loads(done.stdout)[str(query)]
    assert len(found) == 3
    assert found[0]["file"] == "check/03.png"
    assert found[0]["class"] == "check"
    assert found[0]["cosine"] == pytest.approx(1, abs=1e-4)
    assert found[0]["cosine"] >= found[1]["cosine"] >= found[2]["cosine"]
    assert sheet.read_bytes().startswith(b"\x89PNG")
    assert "check/03.png" in call("neighbors", run.path, query).stdout


def test_many_images_are_seen_a_few_at_a_time(run, pictures, monkeypatch):
    images = sorted((pictures / "check").glob("*.png"))[:5]
    whole = call("neighbors", run.path, *images, "--json").stdout
    seen, sight = [], embed.centre_sight

    def counting(*given):
        see = sight(*given)
        return lambda images: seen.append(len(images)) or see(images)

    monkeypatch.setattr(embed, "BATCH", 2)
    monkeypatch.setattr(embed, "centre_sight", counting)
    parts = call("neighbors", run.path, *images, "--json").stdout
    assert seen[:3] == [2, 2, 1]
    for each, other in zip(*(json.loads(s).values() for s in (whole, parts)), strict=True):
        assert [row["file"] for row in each] == [row["file"] for row in other]


def test_neighbors_are_of_the_data_that_is_named(run, pictures, tmp_path):
    shutil.copytree(pictures / "blob", tmp_path / "flat")
    query, sheet = pictures / "check" / "03.png", tmp_path / "sheet.png"
    done = call(
        "neighbors", run.path, query, "--data", tmp_path / "flat", "--sheet", sheet, "--json"
    )
    found = json.loads(done.stdout)[str(query)]
    assert all((tmp_path / "flat" / row["file"]).exists() for row in found)
    assert {row["class"] for row in found} == {""}  # that of no label, and not the last of some
    with Image.open(sheet) as image, Image.open(query) as first:
        np.testing.assert_array_equal(np.asarray(image)[:80:4, 150:230:4], np.asarray(first))
    images, file = ms.data.open_dataset(pictures, 20).images[:3], tmp_path / "some.h5"
    ms.data.from_arrays(file, images, [1, -1, 0], ["a", "b"])  # labels of some
    found = json.loads(call("neighbors", run.path, query, "--data", file, "--json").stdout)
    classes = {row["file"]: row["class"] for row in found[str(query)]}
    assert classes == {"picture 0": "b", "picture 1": "", "picture 2": "a"}


def test_a_sheet_has_each_image_before_what_is_near_it(run, pictures, tmp_path, monkeypatch):
    drawn, data = [], ms.data.open_dataset(pictures, 20)
    sheet, images = "minisimclr.data.images.contact_sheet", sorted(pictures.glob("check/*"))[:2]
    monkeypatch.setattr(sheet, lambda rows: drawn.extend(rows) or b"")
    done = call("neighbors", run.path, *images, "--sheet", tmp_path / "sheet.png", "--json")
    found = json.loads(done.stdout)
    for path, (caption, shown) in zip(images, drawn, strict=True):
        near = [row["file"] for row in found[str(path)]]
        assert caption == path.name and near[0] == f"check/{path.name}"
        rows = [data.file_names.index(name) for name in (near[0], *near)]
        np.testing.assert_array_equal(shown, data.images[rows])


def test_figures_that_cannot_be_written_are_shown(run, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device", "x.json")
    monkeypatch.setattr("minisimclr.cli.options.write_bytes", Mock(side_effect=full))
    done = CliRunner().invoke(group, ["probe", str(run.path), "--labels", "9", "--json", "x.json"])
    assert done.exception is full and json.loads(done.stdout)["labels"] == 9


def test_a_picture_is_not_where_json_goes(run, pictures, tmp_path):
    picture = tmp_path / "a.png"
    picture.write_bytes((pictures / "check" / "03.png").read_bytes())
    done = CliRunner().invoke(group, ["neighbors", str(run.path), "--json", str(picture), "b.png"])
    assert done.exit_code == 2
    assert "must end in .json" in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_run_of_a_gpu_is_used_on_a_cpu(run, pictures, tmp_path):
    moved = shutil.copytree(run.path, tmp_path / "moved")
    settings = json.loads((moved / "config.json").read_text())
    settings["device"]["value"] = "cuda:0"
    (moved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="use --device cpu"):
        call("embed", moved, "--out", tmp_path / "h.npy")
    new = tmp_path / "new" / "folder" / "h.npy"
    assert call("embed", moved, "--device", "cpu", "--out", new).exit_code == 0
    assert len(np.load(new)) == len(ms.data.open_dataset(pictures, 20).images)
    query = pictures / "check" / "03.png"
    assert "check/03.png" in call("neighbors", moved, query, "--device", "cpu").stdout
    assert call("probe", moved, "--device", "cpu").exit_code == 0
    assert len(facts.read(moved).test_h[0])


def test_epochs_without_finetuning_are_refused(run):
    for path in (run.path, "weights.pth"):
        with pytest.raises(ConfigError, match="--epochs"):
            call("probe", path, "--epochs", 5)


def test_pictures_in_the_current_folder_come_before_those_beside_the_run(tmp_path, monkeypatch):
    for folder in ("here/photos", "runs/photos", "runs/run"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert moved(tmp_path / "runs/run", "/gone/photos") == str(tmp_path / "here/photos")
    monkeypatch.chdir(tmp_path)
    assert moved(tmp_path / "runs/run", "/gone/photos") == str(tmp_path / "runs/photos")


def test_an_empty_name_stands_for_no_data_set(run, tmp_path):
    """As of a variable that is not set: what it stands for would be another data set."""
    ms.weights.save(run.model.encoder, file := tmp_path / "w", Preprocessing(16))
    for path in (run.path, file):
        with pytest.raises(ConfigError, match="a name or a path, and this is empty"):
            call("probe", path, "--data", "")


def test_neighbors_of_no_picture_or_no_run(run, pictures, tmp_path):
    (tmp_path / "note.txt").write_text("not a picture")
    with pytest.raises(DataError, match=r"note\.txt"):
        call("neighbors", run.path, pictures / "check" / "03.png", tmp_path / "note.txt")
    with pytest.raises(DataError, match="not a run folder"):
        call("neighbors", tmp_path, pictures / "check" / "03.png")


def test_the_doctor_finds_a_sound_installation():
    done = call("doctor", "--json")
    values = json.loads(done.stdout)
    assert values["verdict"] == "all is well", values
    found = {check["name"]: check["found"] for check in values["checks"]}
    names = "versions optional blas device gpu disk speed gradients learning"
    assert [*found] == names.split() and "(chance 4.84)" in found["learning"]  # of 64 pictures


def test_the_doctor_finds_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert doctor.disk()[0]
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    ok, said = doctor.disk()
    assert not ok and f"{tmp_path} cannot be written: name another in XDG_CACHE_HOME" in said


def test_the_doctor_finds_a_disk_that_is_almost_full(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "cache_folder", lambda: tmp_path)
    (tmp_path / "a.h5").write_bytes(bytes(3_000_000))
    usage = namedtuple("usage", "free")
    for free, sound in ((900_000_000, False), (1_100_000_000, True)):
        monkeypatch.setattr(shutil, "disk_usage", {tmp_path: usage(free)}.__getitem__)
        ok, said = doctor.disk()
        assert ok == sound and f"data sets: 1, 3 MB; {free / 1e9:.1f} GB free" in said


def test_the_doctor_counts_data_sets_alone_and_needs_no_folder(monkeypatch, tmp_path):
    for name in ("a.h5", "features-0.safetensors", ".a.h5.lock"):
        (tmp_path / name).write_bytes(bytes(1_000_000))
    monkeypatch.setattr(doctor, "cache_folder", lambda: tmp_path)
    assert "data sets: 1, 1 MB;" in doctor.disk()[1]
    monkeypatch.setattr(doctor, "cache_folder", lambda: tmp_path / "not" / "yet" / "there")
    assert doctor.disk()[0]


def test_a_check_that_fails_in_its_own_way_costs_no_other(monkeypatch):
    names = (
        "versions",
        "optional",
        "blas",
        "device",
        "gpu",
        "disk",
        "speed",
        "gradients",
        "learning",
    )
    for name in names:
        check = Mock(__name__=name, return_value=(True, ""))
        monkeypatch.setattr(doctor, name, check)
    check = Mock(__name__="device", side_effect=OSError("odd"))
    monkeypatch.setattr(doctor, "device", check)
    checks = doctor.examine()
    assert [found.name for found in checks] == [*names]
    assert checks[3] == ("device", False, "OSError: odd") and sum(c.ok for c in checks) == 8


def test_the_doctor_s_views_are_two_of_each_picture(monkeypatch):
    clock = itertools.count(0.0, 1.0)
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(doctor, "training_step", lambda *_: Mock(figures={"loss": 4.0}))
    rate, (ok, said) = doctor.STEPS * 2 * 64, doctor.learning()
    assert not ok and said.endswith(f" {rate:,} views/s")  # its loss did not fall


def test_the_doctor_misses_what_is_needed(monkeypatch):
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert {*doctor.NEEDED} == {re.match(r"\w+", each)[0] for each in project["dependencies"]}
    extras = (project["optional-dependencies"][name] for name in ("cuda12", "cuda13", "report"))
    optional = {re.match(r"[\w-]+", each)[0] for extra in extras for each in extra}
    assert {*doctor.OPTIONAL} == optional
    monkeypatch.setattr(doctor, "NEEDED", ("no-such-library",))
    ok, said = doctor.versions()
    assert not ok and "no-such-library is not installed" in said


def test_the_doctor_s_rates_are_in_their_units(monkeypatch):
    rates, asked = {"flops_per_second": 12e9, "bytes_per_second": 3.4e9}, []
    monkeypatch.setattr(doctor.profile, "roofline", lambda *given: asked.append(given) or rates)
    monkeypatch.setattr(doctor, "choose_device", lambda name: (f"{name}: cuda:0", "a card"))
    said = doctor.speed()[1]
    assert asked[0][0] == "auto: cuda:0"
    assert "12 GFLOP/s in matrix products" in said and "3.4 GB/s" in said


def test_the_doctor_tells_how_many_threads_blas_has(monkeypatch):
    for reached, said in (True, str(cores.threads())), (False, "as many as it likes"):
        monkeypatch.setattr(doctor, "sets_blas_threads", lambda reached=reached: reached)
        assert f", threads: {said}" in doctor.blas()[1]


@pytest.mark.parametrize("found, said", [({}, "none"), ({"name": "mkl"}, "mkl")])
def test_the_doctor_takes_any_blas(found, said, monkeypatch):
    config = {"Build Dependencies": {"blas": found}}  # NumPy leaves out what it does not know
    monkeypatch.setattr(np, "show_config", lambda mode: config)
    ok, words = doctor.blas()
    assert ok and words.startswith((f"{said}, products for", f"{said}, threads: "))


def test_the_doctor_finds_a_cache_that_is_no_folder(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(doctor, "cache_folder", lambda: tmp_path / "file" / "minisimclr")
    sound, said = doctor.disk()
    assert not sound and "cannot be written" in said


def test_a_run_that_cannot_be_written_is_probed_all_the_same(run, monkeypatch):
    def refuse(path):
        raise OutputError(f"cannot write to {path}")

    monkeypatch.setattr("minisimclr.cli.probe.require_writable", refuse)
    before = (run.path / "probe.json").exists()
    done = CliRunner().invoke(group, ["probe", str(run.path)])
    assert done.exit_code == 0 and "labelled images" in done.stdout
    assert "note: the figures are not kept: cannot write to" in done.stderr
    assert (run.path / "probe.json").exists() == before


def test_the_doctor_finds_a_wrong_gradient_of_weights(monkeypatch):
    backward = ms.ops.conv.Conv2d.backward

    def larger(self, gy):
        gx, gw = backward(self, gy)
        return gx, 1.001 * gw

    monkeypatch.setattr(ms.ops.conv.Conv2d, "backward", larger)
    with pytest.raises(AssertionError, match="gradcheck: input 1 of shape"):
        doctor.gradients()


def without_relu(head, i, h):
    return getattr(head, f"bn{i}")(getattr(head, f"linear{i}")(h))


def with_bias(c, o, bias, rng):
    return ms.nn.Linear(c, o, rng=rng)


def from_zero(block, *given, init=BasicBlock.__init__):
    init(block, *given)
    block.bn2.weight.data[:] = 0  # as the authors'


@pytest.mark.parametrize("place, change", [
    ("heads.ProjectionHead.layer", without_relu),
    ("heads.Linear", with_bias),
    ("resnet.BasicBlock.__init__", from_zero),
])  # fmt: skip
def test_the_doctor_takes_parameters_that_change_nothing(place, change, monkeypatch):
    """Batch norm undoes them: their gradient is 0 but for rounding."""
    monkeypatch.setattr(f"minisimclr.nn.{place}", change)
    assert doctor.gradients()[0]


@pytest.mark.skipif(kernels.chosen != "fast", reason="MINISIMCLR_KERNELS is set")
@pytest.mark.parametrize("place, name, wrong, said", [
    ("winograd", "gradients", lambda gx, gw: (gx, gw * 1.02), r"conv\d\.weight: .* is 2\.0% off"),
    ("pool", "sum_windows", lambda *gx: np.stack(gx) * 1.5, r"conv1\.weight: .* is 50\.0% off"),
])  # fmt: skip
def test_the_doctor_finds_a_wrong_gradient_of_a_faster_pass(place, name, wrong, said, monkeypatch):
    right = getattr(place := getattr(kernels, place), name)
    monkeypatch.setattr(place, name, lambda *given: wrong(*right(*given)))
    with pytest.raises(AssertionError, match=said):
        doctor.gradients()


def test_the_doctor_finds_a_wrong_gradient(monkeypatch):
    backward = ms.ops.loss.NTXent.backward
    monkeypatch.setattr(ms.ops.loss.NTXent, "backward", lambda self, gy: -backward(self, gy))
    wrong = {check.name: check for check in doctor.examine() if not check.ok}
    assert wrong.keys() == {"gradients", "learning"}
    assert "finite" in wrong["gradients"].found or "backward" in wrong["gradients"].found
    checks = [doctor.Check("disk", True, "10 GB"), *wrong.values()]
    monkeypatch.setattr(doctor, "examine", lambda: checks)
    done = CliRunner().invoke(group, ["doctor"], standalone_mode=False)
    assert done.return_value == 3
    assert "not sound: see gradients, learning" in done.stdout
    assert "   ok  disk       10 GB" in done.stdout and "WRONG  gradients " in done.stdout
    done = CliRunner().invoke(group, ["doctor", "--json"], standalone_mode=False)
    assert done.return_value == 3 and json.loads(done.stdout)["verdict"].startswith("not sound")


def test_a_report_from_the_command_line(run, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "page.html"
    done = call("report", run.path, "--out", out, "--json")
    values = json.loads(done.stdout)[str(run.path)]
    assert {"verdict", "findings"} <= values.keys()
    assert out.read_text("utf-8").startswith("<!doctype html>")
    verdict, page = call("report", run.path).stdout.splitlines()
    assert verdict == f"{run.path}: {values['verdict']}"
    size = (run.path / "report.html").stat().st_size / 1e6
    assert page == f"{run.path / 'report.html'} ({size:.1f} MB)"
    assert len(values["findings"]) == len(report.judge(report.read(run.path)))
    bare = tmp_path / "bare"
    shutil.copytree(run.path, bare, ignore=shutil.ignore_patterns("env.json"))
    told = CliRunner().invoke(group, ["report", str(bare)]).stderr
    assert f"note: {bare}: This run has no complete env.\n" in told
    assert (run.path / "report.html").exists()
    assert call("walkthrough", "--data", run.config.data, "--out", out).exit_code == 0
    assert "One step of SimCLR" in out.read_text("utf-8")


def test_where_a_page_cannot_be_written_none_is_made(run, tmp_path, monkeypatch):
    there = shutil.copytree(run.path, tmp_path / "run")
    (there / "report.html").unlink(missing_ok=True)
    (there / "report.html").mkdir()
    monkeypatch.setattr(report, "build_report", Mock(side_effect=AssertionError))
    with pytest.raises(OutputError, match=r"report\.html"):
        call("report", there)


def test_several_runs_are_compared_on_one_page(run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    other = shutil.copytree(run.path, tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    assert call("report", run.path, other).exit_code == 0
    assert "2 runs compared" in Path("comparison.html").read_text("utf-8")
    assert call("report", run.path, other, "--out", "both.html").exit_code == 0
    assert Path("both.html").read_bytes() == Path("comparison.html").read_bytes()
    monkeypatch.setattr(report, "judge", lambda found: [report.Finding("ok", "", found.path.name)])
    monkeypatch.setattr(report, "headline", lambda findings: ("ok", f"{findings[0].title}: sound"))
    (other / "env.json").unlink()
    done = call("report", run.path, other, "--json")
    for path, value in json.loads(done.stdout).items():
        assert value["verdict"] == f"{Path(path).name}: sound"
        assert value["findings"][0]["title"] == Path(path).name
    said = [line for line in done.stderr.splitlines() if line.endswith("no complete env.")]
    assert said == [f"note: {other}: This run has no complete env."]


def test_options_of_the_walkthrough_arrive(pictures, tmp_path, monkeypatch):
    asked = []

    def build(data, *given):
        asked.append((data.name, data.images.shape[1], *given))
        return b""

    monkeypatch.setattr(report, "build_walkthrough", build)
    options = "--images", 3, "--seed", 5, "--out", tmp_path / "w.html"
    assert call("walkthrough", "--data", pictures, *options).exit_code == 0
    assert call("walkthrough", "--data", pictures, *options[4:]).exit_code == 0
    assert asked == [(pictures.name, 40, 3, 5), (pictures.name, 40, 4, 1)]


def test_without_matplotlib_the_error_has_the_line_to_type(run, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match="pip install matplotlib"):
        call("report", run.path, "--out", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="has no such limit")
def test_a_file_s_name_of_any_bytes_is_saved(tmp_path):
    parts = {"labels": np.zeros(1), "file_names": ("caf\udce9.png",), "class_names": ("\udce9",)}
    dataset = SimpleNamespace(images=[0], fingerprint="", **parts)
    embed.save(tmp_path / "h.h5", np.zeros((1, 2)), dataset, {})
    with h5py.File(tmp_path / "h.h5") as file:
        assert file["file_names"][0] == b"caf\xe9.png" and file["class_names"][0] == b"\xe9"
    parts["class_names"] = ()  # of pictures without classes
    dataset = SimpleNamespace(images=[0], fingerprint="", **parts)
    embed.save(tmp_path / "h.h5", np.zeros((1, 2)), dataset, {})
    with h5py.File(tmp_path / "h.h5") as file:
        assert file["class_names"].shape == (0,) and file["class_names"].dtype.kind == "S"


def test_features_that_do_not_fit_on_the_disk_are_an_error(tmp_path):
    """NumPy writes an array past Python's buffers, and overlooks that the last of it got lost."""
    code = f"""if True:
        import pathlib, resource, types, numpy as np
        from minisimclr import embed
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        h = np.zeros((400, 1), np.float32)
        dataset = types.SimpleNamespace(images=h)
        embed.save(pathlib.Path({str(tmp_path / "h.npy")!r}), h, dataset, {{}})
    """
    done = subprocess.run([sys.executable, "-Bc", code], capture_output=True, text=True)
    assert done.returncode == 1 and f"File too large: '{tmp_path / 'h.npy'}'" in done.stderr
    assert not list(tmp_path.iterdir())
