"""The dense baseline: what is drawn, learned, stopped and kept; against controls."""

import json

import numpy as np
import pytest

from minisimclr import baseline as dense
from minisimclr import nn, weights
from minisimclr.baseline import DenseClassifier, Trial, epochs_of
from minisimclr.data import open_dataset
from minisimclr.errors import ConfigError, DataError, DivergedError
from minisimclr.tensor import Tensor


def clouds(n, classes=3, d=8, spread=0.3, seed=0):
    """Features around one corner per class, and labels."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % classes
    return (np.eye(classes, d)[y] + spread * rng.standard_normal((n, d))).astype("f4"), y


def quiet(event, values):
    pass


def test_trials_cover_their_ranges_and_repeat():
    drawn = [Trial.draw(0, i) for i in range(500)]
    assert drawn == [Trial.draw(0, i) for i in range(500)]
    assert len(set(drawn)) == 500 and Trial.draw(1, 0) != drawn[0]
    lr, width1, width2, dropout = map(np.array, zip(*drawn, strict=True))
    assert set(width1) == set(width2) == {64, 128, 256, 512, 1024}
    assert 0.001 <= lr.min() < 0.0012 and 0.25 < lr.max() <= 0.3
    assert abs(np.median(np.log(lr)) - np.log(0.001 * 300**0.5)) < 0.3  # log-uniform
    assert 0 <= dropout.min() < 0.02 and 0.68 < dropout.max() <= 0.7
    related = np.corrcoef([np.log(lr), np.log2(width1), np.log2(width2), dropout])
    assert np.abs(related - np.eye(4)).max() < 0.2  # each from a number of its own


def test_classifier_equals_torch(monkeypatch):
    torch = pytest.importorskip("torch")
    model = DenseClassifier(8, 3, Trial(0.1, 64, 128, 0.5))
    layers = []
    for layer, ours in zip((0, 3, 6), (model.dense1, model.dense2, model.output), strict=True):
        linear = torch.nn.Linear(*ours.weight.shape[::-1])
        linear.weight.data = torch.tensor(ours.weight.data)
        linear.bias.data = torch.tensor(ours.bias.data)
        layers += [linear, torch.nn.ReLU(), torch.nn.Dropout(0.5)][: 3 if layer < 6 else 1]
    reference = torch.nn.Sequential(*layers).eval()
    X, _ = clouds(20)
    theirs = reference(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(model.eval()(Tensor(X)).data, theirs, atol=1e-6)
    assert (model.train().ranked(X)[:, 0] == theirs.argmax(1)).all()  # without dropout
    a, b = (model.train()(Tensor(X)).data for _ in range(2))
    assert not np.allclose(a, b)  # dropout is at work
    widths = []
    monkeypatch.setattr(dense.Dropout, "forward", lambda _, x: widths.append(x.shape[1]) or x)
    model(Tensor(X))
    assert widths == [64, 128]  # after both layers


def test_every_draw_is_of_the_seed(monkeypatch):
    X, y = clouds(90)
    trial, rates = Trial(0.1, 64, 64, 0.0), []
    one, other = (DenseClassifier(8, 3, trial, seed) for seed in (0, 1))
    assert (one.dense1.weight.data != other.dense1.weight.data).all()
    assert one.output.weight.data.std() == pytest.approx(0.01, rel=0.2)
    losses = [next(epochs_of(DenseClassifier(8, 3, trial), X, y, 0.1, seed)) for seed in (0, 1)]
    assert losses[0] != losses[1]  # of the order

    def build(d, classes, trial, seed=0):
        seeds.append(seed)
        return DenseClassifier(d, classes, trial, seed)

    def optimizer(named, lr, weight_decay):
        rates.append((lr, weight_decay))
        return sgd(named, lr, weight_decay=weight_decay)

    def fold(y, seed=0):
        seeds.append(seed)
        return holdout(y, seed)

    few, seeds, holdout, sgd = Few(), [], dense.holdout, dense.SGD
    for name, spy in ("DenseClassifier", build), ("SGD", optimizer), ("holdout", fold):
        monkeypatch.setattr(dense, name, spy)
    dense.baseline(few, lambda rows: few.X[rows], 2, 1, 7, quiet)
    assert seeds == [7] * 4  # the fold, two trials, the last training
    assert {decay for _, decay in rates} == {1e-4} and len({lr for lr, _ in rates}) == 2
    assert (holdout(y, 0)[1] != holdout(y, 1)[1]).any()


def test_training_learns_and_repeats():
    X, y = clouds(90)
    losses = []
    for _ in range(2):
        model = DenseClassifier(8, 3, Trial(0.1, 64, 64, 0.2))
        epochs = epochs_of(model, X, y, 0.1, seed=0)
        losses.append([next(epochs) for _ in range(15)])
    assert losses[0] == losses[1]
    assert (model.ranked(X)[:, 0] == y).mean() > 0.9
    next(epochs)
    assert model.dropout.training  # again, after it was asked


def test_each_epoch_has_an_order_of_its_own(monkeypatch):
    seen, once = [], dense.cross_entropy
    monkeypatch.setattr(dense, "cross_entropy", lambda z, y: seen.extend(y) or once(z, y))
    model = DenseClassifier(8, 90, Trial(0.1, 64, 64, 0.0))
    epochs = epochs_of(model, clouds(90)[0], np.arange(90), 0.1, seed=0)
    next(epochs), next(epochs)
    assert sorted(seen[:90]) == sorted(seen[90:]) and seen[:90] != seen[90:]


def test_search_stops_early_and_survives_rates_that_are_too_high(monkeypatch):
    X, y = clouds(60, spread=0.1)
    events, epochs, seeds = [], [], []

    def counted(*arguments):
        seeds.append(arguments[-1])
        for loss in epochs_of(*arguments):
            epochs.append(loss)
            yield loss

    monkeypatch.setattr(dense, "epochs_of", counted)
    rows = dense.search(X, y, 3, 2, 100, 7, lambda event, values: events.append((event, values)))
    assert [values["done"] for _, values in events] == [1, 2] and seeds == [7, 7]
    assert [row["lr"] for row in rows] == [Trial.draw(7, index).lr for index in (0, 1)]
    assert all(row["validation"] == 1 for row in rows)
    assert len(epochs) == sum(row["epochs"] + 10 for row in rows)
    epochs.clear()
    dense.search(X, y, 3, 2, 3, 0, quiet)
    assert len(epochs) == 6  # at most 3 each
    epochs.clear()
    monkeypatch.setattr(Trial, "draw", lambda seed, index: Trial(1e6, 64, 64, 0.0))
    rows = dense.search(X, y, 3, 1, 100, 0, quiet)
    assert rows[0]["validation"] < 0.9 and len(epochs) <= 3
    with pytest.raises(DataError, match="too few labelled"):
        dense.search(X[:3], y[:3], 3, 1, 1, 0, quiet)


def test_the_last_training_is_as_long_as_the_best_trial(monkeypatch):
    row = {"lr": 0.1, "width1": 64, "width2": 128, "dropout": 0.2, "epochs": 3, "validation": 0.5}
    others = [row | {"epochs": 9, "validation": 0.4}, row, row | {"epochs": 8, "validation": 0.1}]
    lengths = []

    def counted(*arguments):
        for loss in epochs_of(*arguments):
            np.testing.assert_allclose(arguments[1].mean(0), 0, atol=1e-5)  # standardized
            lengths.append(arguments[-1])
            yield loss

    monkeypatch.setattr(dense, "search", lambda *_: others)
    monkeypatch.setattr(dense, "epochs_of", counted)
    few = Few()
    dense.baseline(few, lambda rows: few.X[rows], 3, 40, 5, quiet)
    assert lengths == [5] * 3  # of its seed
    table = dense.table(others).splitlines()
    assert [line.split()[-1] for line in table[1:]] == ["50.0%", "40.0%", "10.0%"]
    assert table[1].split() == ["0.1000", "64,", "128", "0.20", "3", "50.0%"]


def test_the_random_network_has_batch_norm_statistics_of_the_data(pictures, monkeypatch):
    seen = []
    monkeypatch.setattr(dense, "published", lambda net, prep, *_: seen.append((net, prep)))
    net = nn.inception_v3()
    monkeypatch.setattr(dense, "inception_v3", lambda: net)
    monkeypatch.setattr("minisimclr.embed.MONITORED", 4)
    dense.inception(open_dataset(pictures, 20), None, "mixed8", "cpu", quiet)
    assert seen == [(net, weights.Preprocessing(299, "symmetric"))]
    assert net.Conv2d_1a_3x3.bn.running_mean.any()


class Few:
    """A data set of features: three classes, some rows without a label."""

    name, class_names = "few", ("a", "b", "c")

    def __init__(self, classes=3):
        self.X, self.labels = clouds(330, classes)
        self.labels[::50] = -1
        self.duplicate_of = np.arange(330)

    def split(self, name):
        return {"labelled": np.arange(90), "test": np.arange(90, 330)}[name]


def test_baseline_tests_once_on_what_it_has_not_seen(monkeypatch):
    few, asked = Few(), []

    def features_of(rows):
        asked.append(rows)
        return few.X[rows]

    standardized = []

    def standardize(X, *others):
        standardized.append(len(X))
        return dense_standardize(X, *others)

    dense_standardize = dense.standardize
    monkeypatch.setattr(dense, "standardize", standardize)
    result = dense.baseline(few, features_of, 3, 40, 0, quiet)
    assert standardized == [70, 88]  # by what is fitted to, never by the test images
    assert result["top1"] > 0.85 and result["top5"] == 1
    assert result["ci95"][0] < result["top1"] < result["ci95"][1]
    assert (result["labels"], result["test"], result["classes"]) == (88, 235, 3)
    share = np.bincount(few.labels[asked[1]]).max() / 235
    assert result["controls"] == {"chance": share} and len(result["trials"]) == 3
    assert result["best"]["validation"] == max(t["validation"] for t in result["trials"])
    assert len(asked) == 2 and not set(asked[0]) & set(asked[1])
    again = dense.baseline(few, features_of, 3, 40, 0, quiet)
    assert again == result
    rng = np.random.default_rng(0)
    few.X = rng.standard_normal(few.X.shape).astype("f4")  # nothing to learn
    found = dense.baseline(few, features_of, 3, 40, 0, quiet)
    assert abs(found["top1"] - 1 / 3) < 0.12
    assert max(t["validation"] for t in found["trials"]) < 0.8  # by heart it knows those it had
    with monkeypatch.context() as patch:
        patch.setattr(Trial, "draw", lambda seed, index: Trial(1e8, 64, 64, 0.0))
        with pytest.raises(DivergedError, match=r"even at the best rate tried, 1e\+08"):
            dense.baseline(few, features_of, 1, 40, 0, quiet)
    with monkeypatch.context() as patch:
        patch.setattr(dense, "epochs_of", lambda *_: iter([np.inf] * 9))
        with pytest.raises(DivergedError):
            dense.baseline(few, features_of, 1, 3, 0, quiet)
    with pytest.raises(DataError, match="few: labelled images of at least two"):
        dense.baseline(Few(1), features_of, 1, 1, 0, quiet)


def test_features_are_made_once_and_are_the_network_s(pictures, tmp_path, monkeypatch):
    dataset = open_dataset(pictures, 20)
    net = nn.inception_v3(seed=1)
    weights.save(net, tmp_path / "w", weights.Preprocessing(75, "symmetric"), until="mixed2")
    rows, seen = dataset.split("labelled")[:3], []

    def features(file):
        notify = lambda event, values: seen.append(values["done"])  # noqa: E731
        return dense.inception(dataset, file, "mixed2", "cpu", notify)(rows)

    X = features(tmp_path / "w")
    assert X.shape == (3, 288) and X.dtype == np.float32
    x = weights.Preprocessing(75, "symmetric")(dataset.images[rows])
    expected = net.eval().features(Tensor(x), "mixed2").data.mean((1, 2))
    np.testing.assert_allclose(X, expected, rtol=1e-4, atol=1e-5)
    assert seen == [3]
    np.testing.assert_array_equal(features(tmp_path / "w"), X)
    assert seen == [3]  # not made again


@pytest.mark.parametrize("file", [None, "w.h5"])
def test_an_unknown_block_is_refused_before_any_work(monkeypatch, file):
    monkeypatch.setattr(dense, "calibrated", lambda *_: pytest.fail("calibrated"))
    with pytest.raises(ConfigError, match="block 'mixed99': InceptionV3 has mixed0, "):
        dense.inception(None, file, "mixed99", "cpu", quiet)


def test_command_line(pictures, tmp_path, monkeypatch, capsys):
    from minisimclr.cli import main

    def inception(dataset, file, block, device, notify):
        return lambda rows: dataset.images[rows].reshape(len(rows), -1)[:, ::7].astype("f4")

    monkeypatch.setattr(dense, "inception", inception)
    common = ["baseline", "--data", str(pictures), "--image-size", "20", "--trials", "2"]

    def run(*arguments):
        with pytest.raises(SystemExit) as exit:
            main([*common, *arguments])
        return exit.value.code, *capsys.readouterr()

    code, out, _ = run("--random", "--epochs", "5", "--json", str(tmp_path / "random.json"))
    assert not json.loads((tmp_path / "random.json").read_text())["imagenet_weights"]
    assert code == 0 and "validation" in out and "random weights" in out and "chance 33.3%" in out
    code, out, _ = run("--weights", "w.h5", "--json")
    values = json.loads(out)
    assert values["imagenet_weights"] and "20 px as 299" in values["features"]
    assert len(values["trials"]) == 2
    for neither_or_both in ([], ["--random", "--weights", "w.h5"]):
        code, _, err = run(*neither_or_both)
        assert code == 2 and "--weights FILE or, for the control, --random" in err


def test_options_of_the_command_arrive(pictures, monkeypatch, capsys):
    from minisimclr.cli import main

    def inception(dataset, file, block, device, notify):
        got.extend([str(file), block, device])

    def baseline(dataset, extract, trials, epochs, seed, notify):
        got.extend([dataset.images.shape[1], trials, epochs, seed])
        return found

    got, found = [], {"ci95": [0.4, 0.6], "top1": 0.5, "top5": 0.7, "labels": 12, "test": 34}
    found |= {"classes": 2, "controls": {"chance": 0.25}, "trials": []}
    monkeypatch.setattr(dense, "inception", inception)
    monkeypatch.setattr(dense, "baseline", baseline)
    options = "--block mixed3 --device cpu --image-size 20 --trials 3 --epochs 4 --seed 5"
    with pytest.raises(SystemExit):
        main(["baseline", "--weights", "w", "--data", str(pictures), *options.split()])
    assert got == ["w", "mixed3", "cpu", 20, 3, 4, 5]
    said = capsys.readouterr().out
    assert "InceptionV3 mixed3, 20 px as 299" in said
    assert "12 labelled images, 34 to test, 2 classes" in said
    assert "50.0% (95 % interval 40.0% - 60.0%), top-5 70.0%, chance 25.0%" in said
