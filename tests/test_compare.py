"""The comparison: rows with their controls, made once, never lost; the curve; fine-tuning."""

import json
import shlex
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import minisimclr as ms
from minisimclr import baseline, compare, embed, finetune, nn, weights
from minisimclr.augment import center_view, crop_resize, draw_views
from minisimclr.compare import Comparison, Part, markdown, some_of_each
from minisimclr.errors import DataError, DivergedError
from minisimclr.finetune import Classifier, Recipe, fit
from minisimclr.optim import LARS
from minisimclr.probe import holdout, labelled_and_test, wilson_interval
from minisimclr.run import new_run
from minisimclr.schedule import warmup_cosine
from minisimclr.simclr import Model
from minisimclr.tensor import Tensor
from minisimclr.train import pretrain


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    config = ms.TrainConfig(
        data=str(pictures), width=8, image_size=16, batch_size=32, epochs=1, threads=1
    )
    return pretrain(config, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def dataset(run):
    return embed.open_data(run, None)


class Colours:
    """Images whose class is their colour; the last 30 are to test with."""

    name, class_names = "colours", ("red", "green", "blue")

    def __init__(self):
        rng = np.random.default_rng(0)
        self.labels, self.duplicate_of = np.arange(90) % 3, np.arange(90)
        self.images = rng.integers(0, 120, (90, 20, 20, 3)).astype(np.uint8)
        self.images[np.arange(90), ..., self.labels] += 100

    def split(self, name):
        return {"labelled": np.arange(60), "test": np.arange(60, 90)}[name]


@pytest.fixture
def model():
    return Model.build("resnet_small", "small", 8, seed=0)


def nothing(*values):
    pass


def test_the_classifier_starts_undecided_and_lars_does_not_hold_it(model):
    classifier = Classifier(model, 3)
    x = Tensor(np.random.default_rng(0).random((4, 16, 16, 3), np.float32))
    assert (classifier.train()(x).data == 0).all()
    names = dict(classifier.named_parameters())
    optimizer = LARS(names.items(), 0.1)
    loss = classifier(x).sum()
    loss.backward()
    optimizer.step()
    assert "output.weight" not in optimizer.trust and "encoder.conv1.weight" in optimizer.trust
    assert names["output.weight"].grad is not None
    assert names["head.linear1.weight"].grad is not None
    assert names["head.linear2.weight"].grad is None  # the head ends with its first layer


def test_fit_learns_with_the_authors_rate_and_leaves_the_run_alone(model, monkeypatch):
    before = {name: p.data.copy() for name, p in model.named_parameters()}
    peaks, seen = [], []

    class Watched(LARS):
        def __init__(self, named, lr, **options):
            peaks.append(lr)
            assert options == {"weight_decay": 0.0}
            super().__init__(named, lr, **options)

        def zero_grad(self):
            seen.append("zero")
            super().zero_grad()

        def step(self, ok):
            seen.append(self.lr)
            super().step(ok)

    def crop(images, boxes, flipped, size):
        crops.append(boxes)
        flips.extend(flipped)
        return crop_resize(images, boxes, flipped, size)

    crops, flips = [], []
    monkeypatch.setattr(finetune, "crop_resize", crop)
    monkeypatch.setattr(finetune, "LARS", Watched)
    colours = Colours()
    train, test = labelled_and_test(colours)
    recipe = Recipe(40, 16, 16, "cpu", 16)
    classifier = fit(model, colours, train, recipe, 0, nothing)
    assert peaks == [pytest.approx(16 * 0.005 * 60**0.5)]
    rates = [warmup_cosine(step, peaks[0], 0, 40) for step in range(40)]
    assert seen == [each for rate in rates for each in ("zero", rate)]  # gradients of one batch
    boxes = np.concatenate(crops)  # (40 * 60, 4): random, and others each time
    assert len(boxes) == 2400 == len(np.unique(boxes, axis=0)) and len(set(flips)) == 2
    views = center_view(colours.images[train], 16)  # 60: fewer than a batch
    mean = classifier.encoder.conv1(Tensor(views)).data.mean((0, 1, 2))
    np.testing.assert_allclose(classifier.encoder.bn1.running_mean, mean, rtol=1e-4, atol=1e-6)
    ranked = finetune.ranked(classifier, colours, test, recipe)
    assert ranked.shape == (30, 3) and (ranked[:, 0] == colours.labels[test]).mean() > 0.9
    assert all((p.data == before[name]).all() for name, p in model.named_parameters())
    with np.errstate(all="ignore"):
        for batch in (64, 25):  # of 60: all, and two with some left over
            monkeypatch.setattr(finetune, "BATCH", batch)
            assert fit(model, colours, train, recipe._replace(factor=1e30), 0, nothing) is None


def test_fit_trains_and_returns_a_network_to_be_used_whatever_it_was_given(model):
    rows, recipe = np.arange(60), Recipe(2, 16, 16, "cpu")
    made = [fit(mode(), Colours(), rows, recipe, 0, nothing) for mode in (model.train, model.eval)]
    assert not any(each.encoder.training or each.encoder.bn1.training for each in made)
    one, other = (each.output.weight.data for each in made)
    np.testing.assert_array_equal(one, other)


def test_fit_gives_up_where_any_step_was_not_sound(model, monkeypatch):
    asked, square = [], LARS.gradient_square

    def first_is_infinite(self):
        asked.append(self)
        return square(self) + np.float64(np.inf if len(asked) == 1 else 0)

    monkeypatch.setattr(finetune, "BATCH", 25)
    monkeypatch.setattr(LARS, "gradient_square", first_is_infinite)
    recipe = Recipe(1, 16, 16, "cpu")
    assert fit(model, Colours(), np.arange(60), recipe, 0, nothing) is None
    assert len(asked) == 2


def test_every_draw_of_fine_tuning_is_of_its_seed_and_stream(model, monkeypatch):
    crops, asked = [], []

    def crop(images, boxes, flips, size):
        assert size == 16  # as in pre-training, whatever the test's
        crops.append(boxes)
        return crop_resize(images, boxes, flips, size)

    def fitted(model, dataset, rows, recipe, seed, progress):
        asked.append((rows, seed))
        return recipe.factor

    def ranked(classifier, dataset, rows, recipe):
        first = dataset.labels[rows]
        return np.stack([first, (first + 1) % 3, (first + 2) % 3], axis=1)

    monkeypatch.setattr(finetune, "crop_resize", crop)
    fit(model, Colours(), np.arange(60), Recipe(3, 16, 20, "cpu"), 7, nothing)
    for step in range(3):
        expected = draw_views(7, step, 60, 20, 20, stream=3).boxes[0]
        np.testing.assert_array_equal(crops[step], expected)
    monkeypatch.setattr(finetune, "fit", fitted)
    monkeypatch.setattr(finetune, "ranked", ranked)
    colours, train, test = Colours(), np.arange(30, 90), np.arange(30)
    finetune.tuned("name", None, colours, (train, test), Recipe(7, 16, 16, "cpu"), 5, nothing)
    np.testing.assert_array_equal(asked[0][0], train[holdout(colours.labels[train], 5)[0]])
    assert {seed for _, seed in asked} == {5}


def test_the_factor_is_chosen_without_a_look_at_the_test_images(model, monkeypatch):
    colours = Colours()
    train, test = split = labelled_and_test(colours)
    calls, told, diverging = [], [], {64}

    def fake(model, dataset, rows, recipe, seed, progress):
        calls.append((recipe.factor, recipe.epochs, rows))
        progress(1, 2)
        return None if recipe.factor in diverging else recipe.factor

    def ranked(classifier, dataset, rows, recipe):
        wrong = {4: 6, 16: 0}.get(classifier, 9)  # of the first rows
        first = dataset.labels[rows].copy()
        first[:wrong] = (first[:wrong] + 1) % 3
        return np.stack([first, (first + 1) % 3, (first + 2) % 3], axis=1)

    monkeypatch.setattr(finetune, "fit", fake)
    monkeypatch.setattr(finetune, "ranked", ranked)
    choose = lambda: finetune.tuned(  # noqa: E731
        "name", model, colours, split, Recipe(7, 16, 16, "cpu"), 0, lambda *v: told.append(v[1])
    )
    found = choose()
    assert [v["label"] for v in told] == [f"name, rate x {factor}" for factor, *_ in calls]
    tried = [(factor, 3) for factor in (1 / 16, 1 / 4, 1, 4, 16, 64)]
    assert [call[:2] for call in calls] == [*tried, (16, 7)]
    assert (found["factor"], found["top1"]) == (16, 1.0)
    assert found["warning"] == "the rate was chosen by few images: 12"
    assert found["trials"][-1] == {"factor": 64, "validation": 0.0}
    assert all(not np.isin(test, rows).any() for *_, rows in calls)
    assert [len(rows) for *_, rows in calls] == [48] * 6 + [len(train)]
    monkeypatch.setattr(finetune, "ENOUGH", 13)  # there are 12 to choose by, and 48 others
    assert choose()["warning"] == "the rate was chosen by few images: 12"
    monkeypatch.setattr(finetune, "ENOUGH", 12)
    assert choose()["warning"] == ""
    diverging.update((1 / 4, 16))
    assert choose()["factor"] == 4
    for end in (1 / 16, 64):
        diverging |= {*finetune.FACTORS}
        diverging.remove(end)
        assert choose()["warning"].startswith(f"the best factor, {end}, is at the edge of those")
    diverging.update(finetune.FACTORS)
    with pytest.raises(DivergedError, match="name: training diverged at 4 times"):
        choose()


def test_figures_of_a_run_that_goes_on_are_of_the_step_it_was_opened_at(run, dataset, tmp_path):
    opened = embed.open_trained(shutil.copytree(run.path, tmp_path / "run"))
    before = compare.Comparison(opened, dataset).depends
    later = embed.open_trained(opened.path)
    later.step += 1
    later.save()
    assert compare.Comparison(opened, dataset).depends == before
    assert compare.Comparison(later, dataset).depends != before


def test_controls_are_networks_that_have_learned_nothing(run, dataset, monkeypatch, tmp_path):
    tried, probed = {}, []

    def tuned(name, model, dataset, split, recipe, seed, notify):
        tried[name] = model.encoder.conv1.weight.data
        assert (recipe, seed) == (Recipe(7, 16, 19, "cuda:1"), 3)
        np.testing.assert_array_equal(split[0], labelled_and_test(dataset, 12, 3)[0])
        return {"top1": 0.5}

    monkeypatch.setattr(finetune, "tuned", tuned)
    monkeypatch.setattr(finetune, "choose_device", lambda name: (name, ""))
    there = replace(run, config=replace(run.config, device="cuda:1"))
    finetune.finetune(there, dataset, labels=12, epochs=7, view=19, seed=3)
    trained, fresh = (
        each.model.encoder.conv1.weight.data for each in (run, new_run("", run.config))
    )
    assert (trained != fresh).any() and (tried[finetune.TUNED] == trained).all()
    assert (tried[finetune.SCRATCH] == fresh).all()

    monkeypatch.setattr(embed, "probe", lambda *a, **_: probed.append(a) or {})
    weights.save(run.model.encoder, tmp_path / "w", weights.Preprocessing(16))
    embed.probe_weights(tmp_path / "w", dataset, None, None, "cpu", nothing)
    ((_, _, extract, fresh, _),) = probed
    control = fresh()
    rows = np.arange(5)
    own = embed.extractor(run, run.model, dataset)(rows)
    np.testing.assert_allclose(extract(rows), own, rtol=1e-4, atol=1e-6)
    assert np.abs(control(rows) - own).max() > 0.1 * np.abs(own).max()
    random, prep = weights.network(weights.read(tmp_path / "w")), weights.Preprocessing(16)
    expected = embed.calibrated(random, prep, dataset)(Tensor(prep(dataset.images[rows]))).data
    np.testing.assert_allclose(control(rows), expected, rtol=1e-4, atol=1e-6)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 8), st.integers(0, 9))
def test_some_of_each_takes_from_every_class(labels, count, seed):
    labels = np.array(labels)
    chosen = some_of_each(labels, count, seed)
    sizes = np.bincount(labels)
    assert (np.bincount(labels[chosen], minlength=len(sizes)) == np.minimum(sizes, count)).all()
    assert len(set(chosen)) == len(chosen)
    assert set(some_of_each(labels, max(1, count - 1), seed)) <= set(chosen)


def test_chance_is_that_of_the_test_pictures(run, dataset, tmp_path):
    splits = dataset.splits.copy()
    splits[dataset.split("test")[:4]] = 0  # of one class, which has 8
    other = Comparison(run, replace(dataset, splits=splits))
    made = other.keep(tmp_path / "results.json", [], {}, {})
    assert (made["classes"], made["chance"]) == (3, 8 / 20)


def test_draws_of_labels_differ():
    labels = np.repeat([0, 1], 20)
    assert len({tuple(some_of_each(labels, 2, seed)) for seed in range(5)}) > 3


def test_a_point_of_the_curve_is_of_several_draws(run, dataset, monkeypatch):
    labels, seen = dataset.labels[dataset.split("labelled")], []

    def measured(X, y, test_X, test_y):
        seen.append(tuple(X))
        return {"top1": len(seen)}

    monkeypatch.setattr(compare, "measure", measured)
    rows = np.arange(len(labels))
    point = Comparison(run, dataset).efficiency(rows, rows, 2)
    assert point == {"labels": 6, "top1": [1, 2, 3, 4, 5]} and len(set(seen)) > 3


def test_the_curve_names_no_more_labels_than_there_are(run, dataset, monkeypatch):
    most = np.bincount(dataset.labels[dataset.split("labelled")]).max()
    monkeypatch.setattr(compare, "BUDGETS", (1, most - 1, most, most + 1, None))
    shown = [row["per_class"] for row in Comparison(run, dataset).curve().rows]
    assert shown == [1, most - 1, "all"] * 2  # trained and random weights


def weights_file(path, number):
    weights.safetensors.write(path, {"a": np.full(3, number, "f4")}, {})
    return path


@pytest.fixture
def cheap(monkeypatch):
    """InceptionV3 features that take no time, and a count of what is made."""
    made = []

    def inception(dataset, file, block, device, notify):
        def extract(rows):
            made.append(file)
            return dataset.images[rows].mean((1, 2)).astype("f4")

        return extract

    monkeypatch.setattr(baseline, "inception", inception)
    monkeypatch.setattr(compare, "BUDGETS", (1, None))
    return made


def test_compare_makes_each_part_once_and_says_what_was_not_run(
    run, dataset, cheap, tmp_path, monkeypatch
):
    weights_file(tmp_path / "w.h5", 1)
    options = {"trials": 1, "epochs": 1}
    results = Comparison(run, dataset, tmp_path / "w.h5", **options).make(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = {(row["system"], row["method"]): row for row in results["rows"]}
    assert [method for _, method in rows] == [
        *("dense", "linear", "linear"),
        *("linear", "knn", "random", "pixels", "finetune", "supervised", "dense"),
    ]
    assert rows["SimCLRv2 ResNet-50", "linear"]["status"] == "not run"
    assert "top1" not in rows["SimCLRv2 ResNet-50", "linear"]
    for (system, _), row in rows.items():
        assert row["imagenet_weights"] == (system in ("InceptionV3 mixed8", "SimCLRv2 ResNet-50"))
        if row["status"] == "measured":
            assert row["ci95"][0] <= row["top1"] <= row["ci95"][1]
            assert (row["labels"], row["test"]) == tuple(map(len, labelled_and_test(dataset)))
    probed = embed.probe_run(run, dataset)
    assert rows["InceptionV3 mixed8", "dense"]["pretraining"] == "ImageNet"  # no dogs here
    simclr = rows["SimCLR resnet_small", "linear"]
    assert simclr["pretraining"].endswith(" without labels, 2 steps of 32")
    assert simclr["pixels"] == "16 px of 20"  # as in training
    assert simclr["top1"] == probed["top1"] and simclr["pretraining_seconds"] > 0
    assert simclr["C"] == probed["C"]  # what was chosen stays with what it led to
    took = compare.pretraining_seconds(run)["pretraining_seconds"]
    for method in "linear", "knn", "finetune":
        assert rows["SimCLR resnet_small", method]["pretraining_seconds"] == took
    tuned = rows["SimCLR resnet_small", "finetune"]
    assert [trial["factor"] for trial in tuned["trials"]] == [*finetune.FACTORS]
    assert tuned["factor"] in finetune.FACTORS
    assert "chosen by few images: 5" in tuned["warning"] and tuned["top5"] == 1
    assert "pretraining_seconds" not in rows["resnet_small from scratch", "supervised"]
    assert rows["InceptionV3 mixed8", "dense"]["best"]["lr"] > 0
    assert rows["SimCLR resnet_small", "knn"]["top1"] == probed["knn"]
    assert rows["raw pixels", "pixels"]["top1"] == probed["controls"]["pixels"]
    assert [(p["system"], p["per_class"], len(p["top1"])) for p in results["curve"]] == [
        (name, *point)
        for name in ("SimCLR resnet_small", "resnet_small, random weights", "InceptionV3 mixed8")
        for point in ((1, 5), ("all", 1))
    ]
    everything = [p for p in results["curve"] if p["per_class"] == "all"]
    controls = probed["controls"]
    assert [p["top1"] for p in everything[:2]] == [[probed["top1"]], [controls["random_encoder"]]]
    assert everything[0]["labels"] == len(dataset.split("labelled"))

    count = len(cheap)
    assert Comparison(run, dataset, tmp_path / "w.h5", **options).make(tmp_path) == results
    assert len(cheap) == count
    weights_file(tmp_path / "w.h5", 2)
    again = Comparison(run, dataset, tmp_path / "w.h5", **options).make(tmp_path)
    assert len(cheap) > count and again["rows"][2:] == results["rows"][2:]
    assert again["others"] == results["rows"][:2] + results["curve"]  # nothing is lost
    count = len(cheap)
    weights_file(tmp_path / "w.h5", 1)
    back = Comparison(run, dataset, tmp_path / "w.h5", **options).make(tmp_path)
    assert len(cheap) == count and back["rows"] == results["rows"]
    assert json.loads((tmp_path / "results.json").read_text()) == back

    made = Comparison(run, dataset, **options)
    keys = made.finetuned().key, made.probed().key
    monkeypatch.setattr(compare, "FACTORS", (1, 2))  # other rates give other figures
    assert made.finetuned().key != keys[0] and made.probed().key == keys[1]

    labelled = dataset.split("labelled")
    splits = dataset.splits.copy()
    splits[labelled[:3]] = 0  # the same pixels, other labels
    count = len(cheap)
    other = Comparison(run, replace(dataset, splits=splits), **options).make(tmp_path)
    measured = [row for row in other["rows"] if row["status"] == "measured"]
    assert measured and all(row["labels"] == len(labelled) - 3 for row in measured)
    (knn,) = (row for row in measured if row["method"] == "knn")
    assert knn["ci95"] == wilson_interval(knn["top1"], len(dataset.split("test")))
    assert len(cheap) == count and other["rows"][-1]["status"] == "not run"  # no system, no control


def test_the_command_of_each_row_can_be_typed(run, dataset, cheap, tmp_path):
    from minisimclr.cli import group

    odd = replace(dataset, name=str(tmp_path / "my photos"))
    file = weights_file(tmp_path / "the weights.h5", 1)
    made = Comparison(run, odd, file, epochs=7, view=24)
    parts = made.on_inception(), made.on_simclrv2(), made.probed(), made.on_random_inception()
    for row in [row for part in (*parts, made.finetuned()) for row in part.rows]:
        _, name, *words = shlex.split(row["command"])
        given = group.get_command(None, name).make_context(name, [*words]).params
        assert given["data"] == "my photos" and given["view" if "RUN" in words else "image_size"]
        assert {"the weights.h5", "FILE", "RUN", "--random"} & {*words}
        if row["method"] in ("finetune", "supervised"):
            assert given["finetune"] and given["epochs"] == 7
    cached = Comparison(run, replace(dataset, path=tmp_path / "a cache.h5"))
    assert "--data 'a cache.h5'" in cached.probed().rows[0]["command"]


def test_each_part_is_kept_under_all_that_it_depends_on(run, dataset, cheap, tmp_path):
    file = weights_file(tmp_path / "w", 0)

    def keys(run=run, dataset=dataset, **options):
        c = Comparison(run, dataset, file, **options)
        parts = {"inception": c.on_inception(), "random": c.on_random_inception()}
        parts |= {"probed": c.probed(), "finetuned": c.finetuned(), "curve": c.curve()}
        return {name: part.key for name, part in parts.items()}

    def differing(**options):
        now = keys(**options)
        return [name for name in whole if now[name] != whole[name]]

    whole = keys()
    assert differing() == []
    assert differing(trials=3) == ["inception", "random"]
    assert differing(epochs=3) == ["finetuned"]
    of_the_run = ["probed", "finetuned", "curve"]
    assert differing(view=19) == of_the_run
    for other in ({"labels": dataset.labels[::-1].copy()}, {"class_names": ("a", "b", "c")}):
        assert len(differing(dataset=replace(dataset, **other))) == 5
    path = shutil.copytree(run.path, tmp_path / "run")
    newest = max((path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes() + b"x")
    assert differing(run=replace(run, path=path)) == of_the_run
    weights_file(file, 1)
    assert differing() == ["inception", "curve"]


def test_views_have_the_side_that_was_asked_for(run, dataset, monkeypatch):
    sides, tested, once, view_of = [], [], finetune.features, embed.center_view

    def features(encode, images, rows, size):
        return tested.append(size) or once(encode, images, rows, size)

    def center_view(images, size):
        return sides.append(size) or view_of(images, size)

    monkeypatch.setattr(embed, "center_view", center_view)
    monkeypatch.setattr(finetune, "features", features)
    monkeypatch.setattr(finetune, "FACTORS", (1, 2, 4))
    monkeypatch.setattr(compare, "BUDGETS", (1,))
    made = Comparison(run, dataset, epochs=1, view=18)
    made.probed().make()
    assert sides == [18] * 4  # two systems, for training and testing
    made.curve().make()
    assert sides == [18] * 8
    made.finetuned().make()
    assert set(tested) == {18}
    with monkeypatch.context() as patch:
        patch.setattr(compare, "finetune", lambda *_, **named: {"rows": {"a": named, "b": {}}})
        patch.setattr(Comparison, "figures", lambda self, made: made)
        made, scratch = Comparison(run, dataset, epochs=7, view=18).finetuned().make()
        assert (made["epochs"], made["view"]) == (7, 18) and "epochs" not in scratch
    found = finetune.finetune(run, dataset, labels=12, epochs=1, view=19)
    assert [found[key] for key in ("labels", "test", "step")] == [12, 24, run.step]
    assert embed.probe_run(run, dataset, labels=12)["labels"] == 12
    assert set(tested) == {18, 19}


def test_simclrv2_has_a_linear_head_on_its_frozen_features(run, dataset, tmp_path, monkeypatch):
    weights.save(run.model.encoder, file := tmp_path / "w", weights.Preprocessing(16))
    stored, net = weights.read(file), weights.encoder(file)
    probed = embed.probe_weights(str(file), dataset, None, None, "cpu", nothing)
    monkeypatch.setattr(weights, "read", lambda _: stored._replace(format=compare.TENSORFLOW))
    monkeypatch.setattr(weights, "encoder", lambda _: net)
    part = Comparison(run, dataset, simclrv2=file).on_simclrv2()
    (row,), (made,) = part.rows, part.make()
    assert made["top1"] == probed["top1"] and made["C"] == probed["C"]
    assert (row["method"], row["pixels"]) == ("linear", "20 px as 224")
    file.write_bytes(file.read_bytes() + b"x")
    assert Comparison(run, dataset, simclrv2=file).on_simclrv2().key != part.key


def test_inception_runs_where_the_run_does_and_is_searched_as_asked(run, dataset, monkeypatch):
    monkeypatch.setattr(baseline, "inception", lambda *given: given)
    monkeypatch.setattr(baseline, "baseline", lambda *given: {"trials": given[2:5]})
    there = replace(run, config=replace(run.config, device="cuda:1"))
    made = Comparison(there, dataset, trials=3)
    assert made.features(None)[2:4] == ("mixed8", "cuda:1")
    assert made.dense(None)["trials"] == (3, 100, 0)  # trials, epochs, seed


def test_published_weights_are_probed_as_asked(dataset, tmp_path, monkeypatch):
    nets, asked = [nn.inception_v3(), nn.inception_v3()], []
    made = iter(nets)
    monkeypatch.setattr(embed, "read", nothing)
    monkeypatch.setattr(embed, "network", lambda _: next(made))
    monkeypatch.setattr(embed, "load", lambda net, _, until: net is nets[0] and until)
    monkeypatch.setattr(embed, "calibrated", lambda net, *_: net)
    monkeypatch.setattr(embed, "published", lambda *given: asked.append(given[:5]))
    monkeypatch.setattr(embed, "probe", lambda *given, **_: given)
    found = embed.probe_weights(tmp_path / "w", dataset, "mixed0", 7, "cuda:1", nothing)
    assert len(asked) == 1 and found[:3] + found[4:] == (dataset, "w", None, 7)
    found[3]()  # the control is made once the labels are known to do
    assert asked == [(net, "mixed0", dataset, "mixed0", "cuda:1") for net in nets]


def test_the_time_of_pretraining_is_that_of_its_own_steps_once(run, tmp_path):
    there = replace(run, path=tmp_path, step=3)
    lines = [f'{{"step": {step}, "seconds": 2.0}}\n' for step in (1, 2, 2, 3, 4)]  # and one later
    (tmp_path / "timings.jsonl").write_text("".join(lines) + '{"step": 5, "sec')  # killed
    assert compare.pretraining_seconds(there) == {"pretraining_seconds": 6.0}
    (tmp_path / "timings.jsonl").write_text("".join(lines[1:]))
    assert compare.pretraining_seconds(there) == {"pretraining_seconds": None}


def test_it_is_said_that_imagenet_holds_the_test_photos(run, dataset, cheap, tmp_path, monkeypatch):
    from minisimclr.cli import group

    def call(*arguments):
        return CliRunner().invoke(group, [*map(str, arguments)], catch_exceptions=False).stdout

    dogs, said = replace(dataset, name="stanford-dogs"), "have seen the test photos"
    names = {"stanford-dogs": dogs}  # what is classified where nothing is said
    monkeypatch.setattr(embed, "open_dataset", lambda name, *_: names[name])
    file = tmp_path / "w.safetensors"
    weights.save(run.model.encoder, file, weights.Preprocessing(16))
    few = "--trials", 1, "--epochs", 1
    assert said in call("probe", file) and said in call("baseline", "--weights", file, *few)
    names["cache.h5"] = dogs
    assert said in call("probe", file, "--data", "cache.h5")
    assert said not in call("baseline", "--random", *few)
    made = Comparison(run, dogs)
    for row in made.on_simclrv2().rows + made.on_inception().rows:
        assert row["pretraining"] == "ImageNet, which holds Stanford Dogs, test photos too"
    assert made.on_random_inception().rows[0]["pretraining"] == "none"


def test_batches_of_fine_tuning_are_of_their_seed(model, monkeypatch):
    asked, real = [], finetune.batches
    monkeypatch.setattr(finetune, "batches", lambda *given: asked.append(given[1:]) or real(*given))
    fit(model, Colours(), np.arange(48), Recipe(1, 16, 16, "cpu"), 7, nothing)  # others choose
    assert [(rows.tolist(), *rest) for rows, *rest in asked] == [([*range(48)], 48, 7)]


def test_simclrv2_runs_where_the_run_does(run, dataset, tmp_path, monkeypatch):
    weights.save(run.model.encoder, file := tmp_path / "w", weights.Preprocessing(16))
    stored, asked = weights.read(file), []
    monkeypatch.setattr(weights, "read", lambda _: stored._replace(format=compare.TENSORFLOW))
    monkeypatch.setattr(weights, "encoder", lambda _: (None, None))
    monkeypatch.setattr(embed, "published", lambda *given: asked.append(given[3:5]))
    monkeypatch.setattr(Comparison, "linear", lambda self, extract: {})
    there = replace(run, config=replace(run.config, device="cuda:1"))
    Comparison(there, dataset, simclrv2=file).on_simclrv2().make()
    assert asked == [(None, "cuda:1")]


def test_commands_have_the_options_of_their_figures(run, dataset, cheap, tmp_path):
    from minisimclr.cli import group

    made = Comparison(run, dataset, weights_file(tmp_path / "w.h5", 1), trials=3)
    dense, linear = made.on_inception().rows
    (random,), (simclrv2,) = made.on_random_inception().rows, made.on_simclrv2().rows
    for row, wanted in (
        (dense, {"trials": 3}),
        (random, {"trials": 3}),
        (linear, {"block": compare.BLOCK}),
        (simclrv2, {"block": None}),
    ):
        _, name, *words = shlex.split(row["command"])
        given = group.get_command(None, name).make_context(name, [*words]).params
        assert wanted.items() <= given.items() and given["image_size"] == 20


def test_another_protocol_is_another_part(run, dataset, monkeypatch):
    key = Comparison(run, dataset).probed().key
    monkeypatch.setattr(compare, "PROTOCOL", compare.PROTOCOL + 1)
    assert Comparison(run, dataset).probed().key != key


def test_pretraining_is_named_by_the_run_s_own_data(run, dataset):
    row = Comparison(run, replace(dataset, name="others")).probed().rows[0]
    assert row["pretraining"].startswith(f"{Path(run.config.data).name} without labels")


def test_a_comparison_tells_how_far_it_is(run, dataset, monkeypatch):
    monkeypatch.setattr(baseline, "inception", lambda *given: given[-1])
    assert Comparison(run, dataset, notify=nothing).features(None) is nothing
    told = []
    made = Comparison(run, dataset, notify=lambda _, values: told.append(values["label"]))
    made.linear(lambda rows: dataset.images[rows].mean((1, 2)).astype("f4"))
    assert set(told) == {"choosing the penalty"}
    told.clear()
    monkeypatch.setattr(Comparison, "efficiency", lambda *_: {})
    made = Comparison(run, dataset, notify=lambda _, values: told.append(values)).curve()
    made.make()
    bar = [(v["done"], v["total"]) for v in told if v.get("label") == "label-efficiency curve"]
    assert bar == [(i, len(made.rows)) for i in range(1, len(made.rows) + 1)]


def test_two_comparisons_may_write_to_one_file(run, dataset, cheap, tmp_path, monkeypatch):
    real, options = embed.probe_run, {"trials": 1, "epochs": 1}

    def meanwhile(*arguments, **named):
        monkeypatch.setattr(embed, "probe_run", real)
        Comparison(run, dataset, view=20, **options).make(tmp_path)
        return real(*arguments, **named)

    monkeypatch.setattr(embed, "probe_run", meanwhile)
    results = Comparison(run, dataset, **options).make(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "20 px of 20" in {row.get("pixels") for row in results["others"]}


@pytest.mark.filterwarnings("ignore:waiting for the process")
def test_no_row_is_lost_where_two_write_at_once(run, dataset, tmp_path, monkeypatch):
    """Each reads the file and then writes it: the other must not write in between."""
    made = Comparison(run, dataset)
    parts = [made.probed(), made.finetuned()]

    def keep(part):
        row = dict.fromkeys(("system", "method", "pretraining", "pixels"), "")
        row |= dict.fromkeys(("top1", "labels", "seconds"), 1.0)
        row |= {"ci95": [0, 1], "key": part.key, "status": "measured"}
        made.keep(tmp_path / "results.json", [part], {part.key: [row]}, {})

    def slowly(*given):
        time.sleep(0.2)
        write(*given)

    write = compare.write_bytes
    monkeypatch.setattr(compare, "write_bytes", slowly)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(keep, parts))
    assert compare.made_before(tmp_path / "results.json").keys() == {part.key for part in parts}


def test_what_cannot_be_made_is_said_and_the_rest_is_made(
    run, dataset, cheap, tmp_path, monkeypatch
):
    labelled = dataset.split("labelled")
    one_each = [labelled[dataset.labels[labelled] == k][0] for k in range(3)]
    splits = dataset.splits.copy()
    splits[np.setdiff1d(labelled, one_each)] = 0
    few = replace(dataset, splits=splits)
    file = weights_file(tmp_path / "w.h5", 1)
    results = Comparison(run, few, file, trials=1, epochs=1).make(tmp_path)
    state = {row["method"]: row["status"] for row in results["rows"]}
    assert state["linear"] == state["random"] == "measured"
    assert state["finetune"] == state["dense"] == "not run"
    for row in "mixed8, dense", "resnet_small, finetune", "random weights, dense":
        assert f"{row}: too few labelled images" in markdown(results)
    with pytest.raises(DataError, match="not a TensorFlow checkpoint"):
        Comparison(run, dataset, simclrv2=weights_file(tmp_path / "w", 0)).make(tmp_path)

    def diverging(*_, **__):
        raise DivergedError("at every rate")

    with monkeypatch.context() as patch:
        patch.setattr(compare, "finetune", diverging)
        patch.setattr(Comparison, "probed", lambda self: Part([], [], list))
        patch.setattr(Comparison, "curve", lambda self: Part([], [], list))
        assert "finetune: at every rate" in markdown(Comparison(run, dataset).make(tmp_path / "d"))
        patch.setattr(compare, "finetune", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # a fault, and no reason
            Comparison(run, dataset).make(tmp_path / "d")
    monkeypatch.undo()
    with pytest.raises(DataError, match="does not fit this model: "):
        Comparison(run, dataset, weights_file(tmp_path / "other", 0)).make(tmp_path / "none")
    assert not list((tmp_path / "none").glob("*"))  # nothing was made before it was seen
    with pytest.raises(DataError, match="nowhere: cannot be read"):
        Comparison(run, dataset, inception=tmp_path / "nowhere").make(tmp_path)


def test_an_interrupted_comparison_keeps_what_it_had(run, dataset, cheap, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    file = weights_file(tmp_path / "w.h5", 1)

    with monkeypatch.context() as patch:
        patch.setattr(embed, "probe_run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Comparison(run, dataset, file, trials=1, epochs=1).make(tmp_path)
    kept = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["status"] for row in kept] == ["measured"] * 2 + ["not run"] * 8
    count = len(cheap)
    results = Comparison(run, dataset, file, trials=1, epochs=1).make(tmp_path)
    assert len(cheap) == count + 4 and results["rows"][:2] == kept[:2]


ROW = dict.fromkeys(("system", "method", "pretraining", "pixels", "key"), "A")
ROW |= {"status": "measured", "top1": 0.5, "ci95": [0, 1], "labels": 1, "seconds": 1.0}
NO_ROWS = {"top1": None}, {"ci95": [0]}, {"seconds": float("nan")}
NO_RESULTS = ["{", "[]", '{"rows": [{}], "curve": []}', "[" * 100_000]
NO_RESULTS += [json.dumps({"rows": [ROW | wrong], "curve": []}) for wrong in NO_ROWS]


def test_a_row_s_seconds_are_those_of_its_making(run, dataset, tmp_path, monkeypatch):
    about = {name: "" for name in ROW if name not in ("key", "status", "seconds")}
    row = {"top1": 0.5, "ci95": [0, 1], "labels": 1}
    slow = Part(["x"], [about], lambda: time.sleep(0.2) or [row])
    for name in "on_simclrv2", "finetuned", "curve", "on_random_inception":
        monkeypatch.setattr(Comparison, name, lambda _: Part([], [], list))
    monkeypatch.setattr(Comparison, "on_inception", lambda _: slow)
    monkeypatch.setattr(Comparison, "probed", lambda _: Part(["y"], [about], lambda: [row]))
    made, quick = Comparison(run, dataset).make(tmp_path)["rows"]
    assert 0.2 <= made["seconds"] < 60  # and the other's without those of this part
    assert quick["seconds"] < made["seconds"]
    kept = compare.table.made_before(tmp_path / "results.json")
    assert kept == {made["key"]: [made], quick["key"]: [quick]}


@pytest.mark.parametrize("content", NO_RESULTS)
def test_another_results_json_is_not_touched(content, run, dataset, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError, match=r"results\.json: not results of `minisimclr compare`"):
        Comparison(run, dataset).make(tmp_path)
    assert (tmp_path / "results.json").read_text() == content


@pytest.mark.parametrize("seconds, said", [(89.4, "89 s"), (90, "2 min"), (2460, "41 min"),
                                           (5340, "89 min"), (5400, "1.5 h")])  # fmt: skip
def test_times_are_said_as_people_do(seconds, said):
    assert compare.table.clock(seconds) == said


def test_markdown_shows_figures_missing_ones_and_the_curve():
    about = {"pretraining": "none", "pixels": "16 px", "status": "measured", "test": 100}
    one = about | {"system": "A", "method": "linear", "top1": 0.123, "top5": 0.4}
    one |= {"ci95": [0.1, 0.15], "labels": 1716, "seconds": 5400, "pretraining_seconds": 60}
    knn = {k: v for k, v in one.items() if k not in ("top5", "pretraining_seconds")}
    waiting = about | {"system": "B|b", "method": "dense", "status": "not run"}
    points = [{"system": "A", "per_class": n, "top1": [0.1, 0.2]} for n in (1, 2)]
    points.append({"system": "A", "per_class": "all", "top1": [0.3]})
    points += [{"system": "B", "per_class": n, "status": "not run"} for n in (1, 2, "all")]
    text = markdown(
        {"rows": [one | {"warning": "odd"}, knn | {"seconds": 89}, waiting], "curve": points,
         "chance": 0.25}
    )  # fmt: skip
    assert text.count(r"| B\|b |") == 1
    lines = text.replace(r"\|", "").splitlines()
    columns = "system, head, pre-training, input, labels, top-1, 95 %, top-5, time"
    assert lines[0].strip("| ").split(" | ") == columns.split(", ")
    assert lines[7] == "- A, linear: odd"  # about the rows, and so not below the curve
    assert lines[2].endswith("| 1,716 | 12.3% | 10.0% - 15.0% | 40.0% | 60 s + 1.5 h |")
    assert lines[3].endswith("| 10.0% - 15.0% |  | 89 s |")
    unknown = markdown({"rows": [one | {"pretraining_seconds": None}], "curve": [], "chance": 0.25})
    assert "| 40.0% | ? + 1.5 h |" in unknown  # and not 1.5 h, as if it had taken no time
    assert "| not run |" in lines[4] and lines[5].startswith("| chance |") and "25.0%" in lines[5]
    assert lines[-1] == "| B | not run | not run | not run |"
    assert lines[-2] == "| A | 15.0% ± 7.1% | 15.0% ± 7.1% | 30.0% |"
    assert {line.count("|") for line in lines} == {10, 0, 5}
    assert len({line.count("|") for line in lines[:6]}) == 1


def test_options_of_the_command_arrive(run, pictures, tmp_path, monkeypatch):
    from minisimclr.cli import main

    made = []
    empty = {"rows": [], "curve": [], "chance": 0.5}
    monkeypatch.setattr(Comparison, "make", lambda self, out: made.append((self, out)) or empty)
    photos = shutil.copytree(pictures, tmp_path / "photos")
    options = {"inception": "i", "simclrv2": "s", "trials": 3, "epochs": 4, "view": 19}
    options |= {"device": "cpu", "data": photos, "out": tmp_path / "results"}
    with pytest.raises(SystemExit) as exit:
        main(["compare", str(run.path), *(f"--{k}={v}" for k, v in options.items())])
    ((c, out),) = made
    assert exit.value.code == 0 and out == tmp_path / "results"
    assert (str(c.inception), str(c.simclrv2), c.trials, c.epochs, c.view) == ("i", "s", 3, 4, 19)
    assert (c.run.config.device, c.dataset.name) == ("cpu", "photos")


def test_command_line(run, pictures, tmp_path, monkeypatch, capsys):
    from minisimclr.cli import main

    def call(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        return exit.value.code, *capsys.readouterr()

    code, out, _ = call("probe", run.path, "--finetune", "--epochs", 1)
    assert code == 0 and "SimCLR, fine-tuned" in out and "supervised from scratch" in out
    assert [line.split()[-1] for line in out.splitlines()[:3]] == ["kNN", "-", "-"]
    stored = json.loads((run.path / "finetune.json").read_text())
    assert stored["controls"]["scratch"] == stored["rows"]["supervised from scratch"]["top1"]
    assert stored["controls"]["chance"] == pytest.approx(1 / 3)
    code, out, _ = call("probe", run.path, "--data", pictures, "--json")
    assert code == 0 and json.loads(out)["classes"] == 3

    file = tmp_path / "encoder.safetensors"
    weights.save(run.model.encoder, file, weights.Preprocessing(16))
    code, out, _ = call("probe", file, "--data", pictures, "--json")
    rows = json.loads(out)["rows"]
    assert code == 0 and list(rows) == [file.name, "random encoder", "raw pixels"]
    net, preprocessing = weights.encoder(file)
    dataset, some = embed.open_data(run, None), np.arange(40)  # more than a batch
    exported = embed.published(net, preprocessing, dataset, None, "cpu", nothing)(some)
    own = embed.extractor(run, run.model, dataset)(some)
    np.testing.assert_allclose(exported, own, rtol=1e-4, atol=1e-6)
    code, out, _ = call("probe", file, "--data", pictures)
    assert "ImageNet" not in out  # which holds other dogs
    for block in ("layer1", "mixed8"):  # it would be read, and the rest be left random
        code, _, err = call("probe", file, "--data", pictures, "--block", block)
        assert code == 2 and f"block '{block}': InceptionV3 has mixed0, mixed1" in err
    assert call("data", "info", pictures, "--image-size", 24)[0] == 3
    assert call("probe", file, "--data", pictures, "--image-size", 24)[0] == 0
    assert call("data", "info", pictures, "--image-size", 24)[0] == 0
    for option in (("--image-size", 24), ("--block", "mixed8")):
        code, _, err = call("probe", run.path, *option)
        assert code == 2 and "--block and --image-size go with a file of weights" in err
    for option in (("--finetune",), ("--view", 24)):
        code, _, err = call("probe", file, *option)
        assert code == 2 and "--finetune and --view go with a run folder" in err
    code, _, err = call("probe", tmp_path / "nowhere")
    assert code == 3 and "nowhere" in err and len(err.splitlines()) == 1

    def empty(self, out):
        return {"rows": [], "curve": [], "chance": 1 / self.epochs}

    monkeypatch.setattr(Comparison, "make", empty)
    code, out, _ = call("compare", run.path, "--epochs", 5, "--out", tmp_path / "results")
    assert code == 0 and "| chance |  | none |  | 0 | 20.0% |" in out
    code, out, _ = call("compare", run.path, "--epochs", 5, "--out", tmp_path / "results", "--json")
    assert code == 0 and json.loads(out)["chance"] == 0.2


def test_fine_tuning_takes_all_batches_of_each_pass(model, monkeypatch):
    monkeypatch.setattr(finetune, "BATCH", 25)
    told = []
    fit(model, Colours(), np.arange(60), Recipe(3, 16, 16, "cpu"), 0, lambda *v: told.append(v))
    assert told == [(step, 6) for step in range(1, 7)]


def test_statistics_are_of_views_as_in_training_whatever_the_test_s_side(model):
    colours, rows = Colours(), np.arange(30, 90)
    classifier = fit(model, colours, rows, Recipe(1, 16, 20, "cpu"), 0, nothing)
    seen = classifier.encoder.conv1(Tensor(center_view(colours.images[rows], 16))).data
    mean = classifier.encoder.bn1.running_mean
    np.testing.assert_allclose(mean, seen.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)


def test_statistics_are_of_all_classes_though_images_are_sorted_by_them(model, monkeypatch):
    colours, seen = Colours(), []
    rows = np.argsort(colours.labels[:60], kind="stable")  # as those of class folders
    monkeypatch.setattr(finetune, "MONITORED", 20)
    monkeypatch.setattr(finetune, "center_view", lambda images, size: seen.append(images) or images)
    monkeypatch.setattr(finetune, "calibrate", nothing)
    fit(model, colours, rows, Recipe(1, 16, 16, "cpu"), 0, nothing)
    (images,) = seen
    assert len(images) == 20 and {*images.mean((1, 2)).argmax(1).tolist()} == {0, 1, 2}


def test_fine_tuning_s_figures_are_the_run_s_beside_its_controls(run, monkeypatch):
    top1 = {finetune.TUNED: 0.75, finetune.SCRATCH: 0.25}
    monkeypatch.setattr(finetune, "tuned", lambda name, *_: {"top1": top1[name]})
    colours = Colours()
    colours.labels[60:75] = 0  # of the test images, 15 + 5 of 30
    found = finetune.finetune(run, colours, epochs=1)
    assert found["top1"] == 0.75
    assert found["controls"] == {"chance": 20 / 30, "scratch": 0.25}
