"""The pages: whole, self-contained, accessible, repeatable; also of runs that lack parts."""

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import nullcontext, suppress
from copy import deepcopy
from dataclasses import replace
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import minisimclr as ms
from minisimclr import augment, embed, report, simclr, tensor
from minisimclr.augment import draw_views
from minisimclr.cli.train import train
from minisimclr.embed import open_data, probe_run
from minisimclr.errors import ConfigError, DataError
from minisimclr.files import locked
from minisimclr.ops.loss import NTXent
from minisimclr.probe import standardize, unit
from minisimclr.profile import table as profile_table
from minisimclr.report import charts, panels, verdict, walkthrough
from minisimclr.report.page import Missing, document
from minisimclr.report.page import text as for_people
from minisimclr.report.panels import described
from minisimclr.report.verdict import WARNING, Finding
from minisimclr.report.walkthrough import RATE, TEMPERATURE, excerpt, walk
from minisimclr.run import open_run
from minisimclr.simclr import Model, training_step
from minisimclr.tensor import Tensor
from minisimclr.train import pretrain

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    config = ms.TrainConfig(
        data=str(pictures), width=8, image_size=16, batch_size=32, epochs=3, lr=0.5, threads=1,
        optimizer="lars", crop_min=0.4,
    )  # fmt: skip
    path = pretrain(config, tmp_path_factory.mktemp("runs") / "run").path
    trained = report.read(path).run
    (path / "probe.json").write_text(json.dumps(probe_run(trained, open_data(trained, None))))
    return path


@pytest.fixture(scope="module")
def page(run):
    return report.build_report(report.read(run)).decode()


class Reader(HTMLParser):
    """Notes what a browser would fetch, what a screen reader would miss, and unclosed tags."""

    def __init__(self, page):
        super().__init__()
        self.fetched, self.silent, self.ids, self.headings, self.open = [], [], [], [], []
        self.charts, self.tables = [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            if name in values and not values[name].startswith(("data:", "#")):
                self.fetched.append(values[name])
        if tag == "script":
            self.fetched.append("script")
        if tag == "img" and not values.get("alt"):
            self.silent.append(tag)
        if tag == "svg":
            self.charts.append(values.get("aria-label"))
            assert len(values) == len(attributes)  # none twice
            if not values.get("aria-label") or values.get("role") != "img":
                self.silent.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.tables += tag == "table"
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "link", "img", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(page):
    reader = Reader(page)
    assert not reader.fetched
    assert not re.search(r">[^<]*mathdefault", page)  # numbers at the axes are typeset
    assert not reader.silent
    assert len(set(reader.ids)) == len(reader.ids)
    assert reader.open == []
    assert reader.headings[0] == 1
    assert all(b <= a + 1 for a, b in zip(reader.headings, reader.headings[1:], strict=False))
    ids = set(reader.ids)
    for target in re.findall(r'(?:href="#|url\(#)([^")]+)', page):
        assert target in ids
    assert not re.search(r"url\((?!#)|@import", page)
    assert "#0000" not in page  # a stand-in colour that was not replaced
    assert 'lang="en"' in page
    assert len(page.encode()) < 3e6
    return reader


def test_a_view_is_described_as_it_was_made():
    views = draw_views(0, 0, 40, 20, 20)
    for k, i in np.ndindex(2, 40):
        small, large = (" ".join(described(views, k, i, side)) for side in (32, 33))
        assert "blur" not in small  # which apply_views leaves sharp
        assert ("blur" in large) == bool(views.sigmas[k, i])
        assert ("mirrored" in small) == views.flips[k, i] and ("grey" in small) == views.greys[k, i]
        left, top, width, height = views.boxes[k, i]
        assert f"crop {width:.0f}×{height:.0f} at {left:.0f},{top:.0f}" in small
        a, b, c, hue = views.factors[k, i]
        said = f"brightness ×{a:.2f} contrast ×{b:.2f} saturation ×{c:.2f} hue {360 * hue:+.0f}°"
        assert (said in small) == ((a, b, c, hue) != (1, 1, 1, 0))


def test_below_a_view_stands_how_it_was_made(run, monkeypatch):
    cards = []
    monkeypatch.setattr(panels, "card", lambda *given, mark: cards.append(given) or "")
    panels.augmentation(facts := report.read(run))
    images, drawn, pair = facts.first_views
    for i in range(6):
        np.testing.assert_array_equal(cards[3 * i][0], images[i])
        assert cards[3 * i][1:] == (f"Picture {i + 1}", f"picture {i + 1}")
        for k, (pixels, alt, name, *words) in enumerate(cards[3 * i + 1 : 3 * i + 3]):
            assert (name, words) == (f"{i + 1}{'ab'[k]}", described(drawn, k, i, 16))
            assert alt == f"View {name}: {', '.join(words)}"
            np.testing.assert_array_equal(pixels, pair[k][i])


def test_a_finding_says_what_was_seen_and_what_to_do():
    box = report.verdict_box([Finding(WARNING, "It was seen.", "It is odd", "Do this.")], [])
    assert "Look here: it is odd" in box and "<b>! It is odd.</b> It was seen. Do this." in box


def test_the_report_is_whole_and_self_contained(page):
    reader = check(page)
    assert "Not shown" not in page
    assert reader.tables >= len(reader.charts)
    for words in ("chance, ln(2N-1)", "roofline", "✓ same", "Trust ratios", "mirrored", "--lr 0.5",
                  "resnet_small on pictures0, 16 px, batches of 32, 3 epochs, lars",
                  "lars, temperature 0.2<"):  # fmt: skip
        assert words in page
    cosines = page[page.index("<caption>epoch 1</caption>") :].partition("</table>")[0]
    middles = [float(x) for x in re.findall(r'scope="row">([-\d.]+)', cosines)]
    np.testing.assert_allclose(middles, np.arange(-95, 96, 10) / 100)  # of monitor's 20 bins


def test_the_same_run_gives_the_same_bytes(run, page, tmp_path):
    copy = tmp_path / "elsewhere" / run.name
    shutil.copytree(run, copy)
    assert report.build_report(report.read(copy)).decode() == page


def test_panels_show_what_they_say(run, monkeypatch):
    facts, cards, drawn, tables, words_of = report.read(run), [], [], [], []
    data, labels = facts.dataset, facts.dataset.labels[facts.test_rows]
    classes, names = np.eye(3, dtype=np.float32), data.class_names
    # Trained features tell classes; those of the random encoder tell a picture's place in its own.
    place = np.concatenate([np.arange(n) for n in np.bincount(labels)])
    facts.__dict__["test_h"] = classes[labels], np.eye(len(labels), dtype=np.float32)[place]

    def card(pixels, alt, *words, mark=""):
        cards.append((pixels.tobytes(), alt))
        words_of.append((*words, mark))
        return ""

    monkeypatch.setattr(panels, "card", card)
    monkeypatch.setattr(panels, "lines", lambda *given, **_: drawn.append(given[-1]) or "")
    monkeypatch.setattr(panels, "table", lambda *given: tables.append(given[-1]) or "")

    panels.spectrum(facts)
    values = {name: np.array(s) for name, (_, s) in drawn[0].items()}
    assert (values["trained"] > 1e-3).sum() == 3 < (values["random encoder"] > 1e-3).sum()
    assert values["trained"][0] == 1

    true = {data.images[row].tobytes(): names[data.labels[row]] for row in facts.test_rows}
    said = panels.neighbours(facts)
    assert all(alt.endswith(f": {true[pixels]}") for pixels, alt in cards)
    # After its two partners by place come the first pictures there are, all of the first class.
    assert "trained 100%, random encoder 20%." in said
    for k, query in enumerate(names):
        (asked, alt), *near = cards[11 * k : 11 * k + 11]
        assert alt == f"Query: {query}" and asked not in [pixels for pixels, _ in near]
        assert [alt for _, alt in near[:5]] == [f"trained: {query}"] * 5
        others = {f"random encoder: {name}" for name in names if name != query}
        assert {alt for _, alt in near[5:7]} == others
        said = words_of[11 * k + 1 : 11 * k + 8]
        assert said[:5] == [("✓ same", query, "yes")] * 5
        assert {words[0] for words in said[5:]} == {"✗ other"} and not said[5][2]

    cards.clear()
    facts.__dict__["test_h"] = (classes[(labels + 1) % 3],)
    labels_of = data.labels
    monkeypatch.setattr(panels, "extractor", lambda *_, **__: lambda rows: classes[labels_of[rows]])
    classifier, tried = panels.LogisticRegression, []
    monkeypatch.setattr(panels, "LogisticRegression", lambda *C: tried.append(C) or classifier(*C))
    panels.confusions(facts)
    assert tried == [(facts.files["probe"]["C"],)]
    pairs = {(a, names[(k + 1) % 3]) for k, a in enumerate(names)}
    count = len(labels) // 3
    assert set(tables[0]) == {(f"{a} taken for {b}", count, count) for a, b in pairs}
    shown = {(true[pixels], alt) for pixels, alt in cards}
    assert shown == {(a, f"{a}, taken for {b}") for a, b in pairs} | {(a, a) for a in names}

    named = labels.copy()  # once the first class for the second, always the second for the third
    named[np.flatnonzero(labels == 0)[0]] = 1
    named[labels == 1] = 2
    facts.__dict__["test_h"] = (classes[named],)
    panels.confusions(facts)
    most = [(names[0], names[1], 1), (names[1], names[2], count)][::-1]
    assert tables[1] == [(f"{a} taken for {b}", times, count) for a, b, times in most]

    right = np.flatnonzero(labels == 1)[-2:]  # two of the class that the first is taken for
    named = np.array([1, 0, 2])[labels]
    named[right] = 1
    facts.__dict__["test_h"] = (classes[named],)
    cards.clear()
    panels.confusions(facts)
    beside = [pixels for pixels, alt in cards if alt == names[1]]
    assert beside == [data.images[facts.test_rows[i]].tobytes() for i in right]


def test_pictures_without_labels_are_of_no_class(run, monkeypatch):
    facts, said = report.read(run), []
    data = facts.dataset
    none = replace(data, labels=np.full_like(data.labels, -1))
    facts.__dict__ |= {"dataset": none, "test_h": (np.eye(len(facts.test_rows), 8),) * 2}
    monkeypatch.setattr(panels, "card", lambda pixels, alt, *words, mark="": said.append(words))
    monkeypatch.setattr(panels, "row", lambda *_, **named: "")
    assert "same class" not in panels.neighbours(facts)
    assert set(said) == {("no label",)} and len(said) == 6 * (1 + 2 * 5)
    monkeypatch.setattr(panels, "scatter", lambda *given, **_: said.append([*given[3]]) or "")
    panels.feature_map(facts)
    assert said[-1] == ["no label"]


def test_of_many_classes_some_are_shown(run, drawn):
    facts = report.read(run)
    n, labels = len(facts.test_rows), facts.dataset.labels.copy()
    labels[facts.test_rows] = 1 + np.arange(n) % 13  # none of the first class
    facts.dataset = replace(facts.dataset, labels=labels, class_names=tuple("-abcdefghijklm"))
    facts.__dict__["test_h"] = (np.eye(n),) * 2
    assert re.findall('alt="Query: (.)"', panels.neighbours(facts)) == [*"adgjm"]
    panels.feature_map(facts)
    assert [*drawn[0][0][3]] == [*"abcdefghijkl"]
    facts.__dict__["test_h"] = (np.eye(14)[labels[facts.test_rows]],)
    panels.feature_map(facts)  # of which each class is a point
    points = [{*zip(*where, strict=True)} for where in drawn[1][0][3].values()]
    assert {len(each) for each in points} == {1} and len(set.union(*points)) > 1


def test_the_command_of_a_run_can_be_typed(run):
    facts = report.read(run)
    facts.config = replace(facts.config, data="my photos")
    page = panels.repeat(facts)
    (command,) = re.findall("<code>(.*?)</code>", page, re.S)
    words = shlex.split(unescape(command))
    assert words[:4] == ["minisimclr", "train", "--data", "my photos"]
    options = train.make_context("train", words[2:]).params
    assert all(options[name] == value for name, value in facts.config.to_dict().items())
    assert re.search('row">lr</th><td[^>]*>0.5</td>', page)


def test_a_chart_of_many_runs_grows_with_its_legend():
    charts.lines("t", "x", {f"20261125-1530{k}-resnet_small": ([0, 1], [k, 1]) for k in range(60)})


def test_legends_cover_no_data_and_ticks_leave_room():
    series = {name: ([-2.775 + i / 1e3 for i in range(9)], range(9)) for name in ("a", "run" * 12)}
    for chart in (charts.lines("t", "x", series), charts.scatter("t", "x", "y", series)):
        svg = re.search("<svg.*</svg>", chart, re.S)[0].replace("xlink:href", "href")
        root = ElementTree.fromstring(svg)
        (axes,) = (g for g in root.iter("g") if g.get("id", "").endswith("axes_1"))
        ids = [g.get("id", "") for g in axes.iter("g")]
        assert not any("legend" in name for name in ids)
        assert any("legend" in g.get("id", "") for g in root.iter("g"))
    ids = re.findall(r"xtick_\d+", charts.lines("t", "x", series))
    assert 3 <= len(set(ids)) <= 8


def test_histograms_have_whole_bins_and_long_names_are_cut(monkeypatch):
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(charts, "chart", lambda alt, data, draw, *_, **__: drawn.append(draw))
    charts.lines("t", "cosine", {"a": ([-0.5, 0.5], [1, 2])}, fill=True)
    charts.scatter(
        "t", "x", "y", {name: ([0], [0]) for name in ("a", "b", "c", "Wirehaired griffon")}
    )
    roof = [1, 2, 3], [1, 2, 2]
    charts.scatter("t", "x", "y", {"a": ([1], [1])}, roof=roof, scale="log", sizes={"a": [50]})
    figure, (left, right, last) = pyplot.subplots(1, 3, layout="constrained")
    drawn[0](left), drawn[1](right), drawn[2](last)
    assert [line.get_xydata().T.tolist() for line in last.lines] == [[*roof]]
    assert (last.get_xscale(), last.get_yscale()) == ("log", "log")
    assert last.collections[0].get_sizes().tolist() == [50]
    assert {tuple(patch.get_data().edges) for patch in left.patches} == {(-1, 0, 1)}
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[-2:] == ["c", "Wirehaired grif…"]
    pyplot.close(figure)


def test_charts_take_names_of_any_folder():
    """Letters that matplotlib's font lacks are the browser's; a backslash is no reference."""
    for name in ("柴犬", r"a\q", r"\1", "$x$", '<"&'):
        page = Reader(charts.lines("title", "x", {name: ([0, 1], [1, 2])}))
        assert page.charts == [f"title by x: {name} from 1 to 2"] and page.open == []


@pytest.fixture
def drawn(monkeypatch):
    """What charts are asked to draw: (arguments, those with names) of each."""
    asked = []
    for chart in ("lines", "scatter", "bars"):
        monkeypatch.setattr(panels, chart, lambda *a, **named: asked.append((a, named)) or "")
    return asked


def test_a_point_of_a_long_training_is_the_mean_of_its_steps(run, drawn):
    facts = report.read(run)
    row = facts.files["metrics"][0]
    facts.files["metrics"] = [row | {"step": k + 1, "loss": 0.5 + k} for k in range(450)]
    panels.training(facts)
    x, y = drawn[0][0][-1]["loss"]
    assert x == [*range(3, 451, 3)] and y == [k - 1.5 for k in x]


def test_histograms_fit_and_share_a_scale(run, drawn):
    panels.similarities(report.read(run))
    most = max(np.max(shares) for (*_, pairs), _ in drawn for _, shares in pairs.values())
    assert {named["ylim"] for _, named in drawn} == {(0, 1.4 * most)}


def test_twenty_mistakes_are_listed_and_six_of_them_drawn(run, monkeypatch):
    facts, tables, titles = report.read(run), [], []
    labels, rows = facts.dataset.labels.copy(), facts.dataset.split("labelled")
    truth = 1 + np.arange(len(facts.test_rows)) % 8  # none of the first class
    labels[facts.test_rows], labels[rows] = truth, 1 + np.arange(len(rows)) % 8
    facts.dataset = replace(facts.dataset, labels=labels, class_names=tuple("-abcdefgh"))
    eye = np.eye(9, dtype=np.float32)
    facts.__dict__["test_h"] = (eye[1 + truth % 8],)  # each is taken for the next
    for name, spy in {
        "extractor": lambda *_, **__: lambda some: eye[labels[some]], "card": lambda *_, **__: "",
        "table": lambda *given: tables.append(given[-1]) or "",
        "row": lambda *_, title="": titles.append(title) or "",
    }.items():  # fmt: skip
        monkeypatch.setattr(panels, name, spy)
    panels.confusions(facts)
    assert len(tables[0]) == 8 and len([*filter(None, titles)]) == 6
    assert "\u2068a\u2069 → \u2068b\u2069" in titles  # as in the table, where a is taken for b


def test_axes_are_what_they_are_called(run, drawn):
    facts = report.read(run)
    panels.training(facts)
    steps = facts.files["metrics"]
    for key, ((title, _, series), _) in zip(
        ("loss", "accuracy", "gradient_norm", "lr"), drawn, strict=True
    ):
        assert key in title.replace(" ", "_") or title == "learning rate"
        assert series[title] == ([*range(1, 7)], [row[key] for row in steps])
    assert drawn[0][1]["level"] == ("chance, ln(2N-1)", steps[-1]["chance"])
    drawn.clear()
    panels.sphere(facts)
    ((_, x, path), named), ((_, _, ranks), _) = drawn
    last = facts.epochs[-1]
    assert (x, named["y"]) == ("uniformity", "alignment")
    whole = tuple([e[key] for e in facts.epochs] for key in (x, "alignment"))
    assert path["epochs 1 to 3"] == whole
    assert path["last"] == ([last["uniformity"]], [last["alignment"]])
    assert ranks["effective rank"] == ([1, 2, 3], [e["effective_rank"] for e in facts.epochs])
    drawn.clear()
    panels.similarities(facts)
    for end, ((_, _, pairs), _) in zip(facts.epochs, drawn, strict=True):
        for key, (_, shares) in zip(("positives", "negatives"), pairs.values(), strict=True):
            assert shares == pytest.approx(np.array(end[key]) / sum(end[key]))
        assert [*pairs] == ["same picture", "different"]
    drawn.clear()
    del facts.epochs[1]  # as one whose figures are no numbers
    panels.sphere(facts)
    assert drawn[1][0][2]["effective rank"][0] == [1, 3]


def test_one_batch_is_compared_as_the_loss_sees_it(run, monkeypatch):
    shown = []
    monkeypatch.setattr(panels, "matrix", lambda *given: shown.append(given) or "")
    panels.one_batch(facts := report.read(run))
    ((_, cosines, names, partners),) = shown
    model, views = facts.run.model, np.concatenate([x[:16] for x in facts.first_views[2]])
    z = unit(model.project(model.encode(views)))
    np.testing.assert_allclose(cosines, z @ z.T, atol=1e-5)
    assert names == [f"{i + 1}{view}" for view in "ab" for i in range(16)]
    assert [names[i] for i in partners] == names[16:] + names[:16]


def test_the_map_has_the_main_axes(run, drawn):
    panels.feature_map(facts := report.read(run))
    title, _, _, named = drawn[0][0]
    groups = named.values()
    x, y = (np.concatenate([points[k] for points in groups]) for k in (0, 1))
    variances = np.linalg.svd(standardize(facts.test_h[0])[0], compute_uv=False) ** 2
    np.testing.assert_allclose([(x**2).sum(), (y**2).sum()], variances[:2], rtol=0.02)
    assert title == f"{variances[:2].sum() / variances.sum():.0%} of the variance"


def test_without_test_pictures_the_map_is_of_those_of_the_training(run):
    facts = report.read(run)
    facts.dataset = replace(facts.dataset, splits=np.zeros_like(facts.dataset.splits))
    facts.__dict__["test_h"] = (np.eye(len(facts.test_rows), 9, dtype=np.float32),) * 2
    assert panels.feature_map(facts)


def test_the_roof_is_in_the_units_of_the_marks_below_it(run, drawn):
    facts = report.read(run)
    turned = dict(reversed(facts.profile["roofline"].items()))  # as jq --sort-keys might
    facts.__dict__["profile"] = facts.profile | {"roofline": turned | {"made_by": "me"}}
    said = panels.hot_spots(facts)
    assert escape(profile_table(facts.profile)) in said
    (_, _, unit, groups), named = drawn[-1]
    roof = facts.profile["roofline"]
    peak, band = roof["flops_per_second"], roof["bytes_per_second"]
    x, y = named["roof"]
    np.testing.assert_allclose(y, np.minimum(peak, band * x) / 1e9)
    ops = [op for op in facts.profile["ops"] if op["direction"] == "forward" and op["flops"]]
    rates = [op["flops"] / op["seconds"] / 1e9 for op in ops]
    assert unit == "GFLOP/s" and groups["forward"][1] == pytest.approx(rates)
    assert groups["forward"][0] == pytest.approx([op["flops"] / op["bytes"] for op in ops])
    (_, _, shares), _ = drawn[0]
    slowest, step = facts.profile["ops"][0], sum(op["seconds"] for op in facts.profile["ops"])
    assert next(iter(shares.values())) == pytest.approx(100 * slowest["seconds"] / step)
    ten = facts.profile["ops"][:10]
    assert [*shares] == [f"{op['name']} {op['direction']}" for op in ten] and len(shares) == 10
    network = {"encoder": "resnet_small", "image_size": 16, "batch_size": 32, "threads": 1}
    assert any(op["name"].endswith(" 3>8") for op in facts.profile["ops"])
    assert network.items() <= facts.profile.items()


def test_the_profile_is_of_the_run_s_own_network(run, monkeypatch, tmp_path):
    facts = report.read(run)
    facts.path, facts.run.model.encoder.stem = tmp_path, "cifar"
    facts.config = replace(facts.config, batch_size=64, device="cuda:0")
    timed = Mock(return_value={"events": []})
    monkeypatch.setattr("minisimclr.report.facts.profile", timed)
    assert facts.profile == {} and timed.call_args.args == ("resnet_small", "cifar", 8, 16, 32)
    given = timed.call_args.kwargs  # on a GPU's run, too, where there may be none now
    assert (given["device"], given["thread_count"]) == ("cpu", facts.config.threads) == ("cpu", 1)


def test_tiles_and_the_comparison_show_the_figures_they_name(run):
    facts = report.read(run)
    facts.files["probe"] |= {"top1": 0.61, "ci95": [0.51, 0.71], "controls": {"chance": 0.4}}
    facts.total = 1234
    last, tiles = facts.epochs[-1], report.tiles(facts)
    for value, name in (
        ("6", "steps of 1,234"),
        (f"{last['effective_rank']:.1f}", "effective rank"),
        (f"{last['loss']:.2f}", f"loss (chance {last['chance']:.2f})"),
        (f"{last['accuracy']:.0%}", "contrastive accuracy"),
        (f"{last['views/s']:,.0f}", "views per second"),
        ("61.0%", "probe top-1 (chance 40.0%)"),
    ):
        assert f"<div><b>{value}</b><span>{name}</span></div>" in tiles
    said = escape(report.headline(report.judge(facts))[1])
    row = f"<td class=words>{said}</td><td>61.0%</td><td>51.0% – 71.0%</td>"
    cold = replace(facts, config=replace(facts.config, temperature=0.01))
    cold.files = facts.files | {"probe": None}
    both = report.compare.results({"b": cold, "a": facts})
    assert f'row">a</th>{row}' in both
    said = escape(report.headline(report.judge(cold))[1])
    assert f'row">b</th><td class=words>{said}</td><td>–</td>' in both and said not in row


def harmed(value):
    """Copies of nested dicts and lists; in each one entry is missing, or None."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        without, emptied = deepcopy(value), deepcopy(value)
        del without[key]
        emptied[key] = None
        yield from (without, emptied)
        for inner in harmed(value[key]) if isinstance(value[key], (dict, list)) else ():
            yield deepcopy(value) | {key: inner} if isinstance(value, dict) else [
                *value[:key], inner, *value[key + 1 :]
            ]  # fmt: skip


def test_bars_and_table_show_the_probe_s_figures(run, monkeypatch):
    drawn, tables = [], []
    monkeypatch.setattr(panels, "bars", lambda *given: drawn.append(given) or "")
    monkeypatch.setattr(panels, "table", lambda *given: tables.append(given) or "")
    facts = report.read(run)
    facts.files["probe"] |= {"test": 23, "controls": {"chance": 0.4}}  # of unequal classes
    panels.probe(facts)
    ((_, unit, values, ranges),) = drawn
    probe, rows = facts.files["probe"], facts.files["probe"]["rows"]
    shares = {name: row["top1"] for name, row in rows.items()} | {"chance": 0.4}
    assert unit == "%" and values == pytest.approx({n: 100 * v for n, v in shares.items()})
    ends = [*(row["ci95"] for row in rows.values()), [probe["controls"]["chance"]] * 2]
    np.testing.assert_allclose(ranges, 100 * np.array(ends))
    ((title, head, cells),) = tables
    assert title == f"{probe['labels']} labels, {probe['test']} tests, 3 classes"
    assert head[:5] == ("system", "top-1", "95 % interval", "top-5", "kNN")
    said = ["{:.1%} \u2013 {:.1%}".format(*row["ci95"]) for row in rows.values()]
    assert [interval for _, _, interval, *_ in cells] == said and len(set(said)) > 1
    for (name, top1, _, *more), (system, row) in zip(cells, rows.items(), strict=True):
        assert (name, top1) == (system, f"{row['top1']:.1%}")
        assert more == [f"{row['top5']:.1%}", f"{row['knn']:.1%}", row["C"], row["warning"]]


@pytest.mark.parametrize("file", ["metrics.jsonl", "timings.jsonl", "probe.json", "profile.json"])
def test_files_changed_by_hand_cost_their_part_alone(file, run, tmp_path, monkeypatch):
    for name in ("lines", "bars", "scatter"):
        monkeypatch.setattr(panels, name, lambda *_, **__: "")
    monkeypatch.setattr(verdict, "gradients", lambda: None)  # they hang on no file
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    report.build_report(report.read(run))  # which makes profile.json
    shutil.copy(run / "profile.json", copy)
    probed = json.loads((copy / "probe.json").read_text())
    del probed["step"]  # it belongs to a checkpoint, and what takes long is left out
    (copy / "probe.json").write_text(json.dumps(probed))
    whole = (copy / file).read_text()
    if file.endswith(".jsonl"):
        first, *rest = whole.splitlines()
        *before, last = whole.splitlines()
        texts = ["\n".join([json.dumps(h), *rest]) for h in (5, [], *harmed(json.loads(first)))]
        texts += ["\n".join([*before, json.dumps(h)]) for h in harmed(json.loads(last))]
    else:
        texts = [json.dumps(h) for h in harmed(json.loads(whole))]
        texts.insert(0, json.dumps(json.loads(whole) | {"rows": {}}))
    sections = dict.fromkeys((panels.training, panels.similarities, panels.sphere), "metrics.jsonl")
    sections |= {panels.probe: "probe.json", panels.hot_spots: "profile.json"}
    for text in [*texts[:: 1 + len(texts) // 150], "[" * 100_000]:
        (copy / file).write_text(text)
        facts = report.read(copy)
        report.judge(facts)
        for section, source in sections.items():
            with suppress(Missing) if source == file else nullcontext():
                section(facts)


@pytest.mark.parametrize("key", ["positives", "negatives"])
def test_a_histogram_with_nan_costs_its_epoch_alone(key, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ends = [row for row in rows if "positives" in row]
    ends[1][key][3] = float("nan")
    ends[2]["negatives"] = [0] * 20
    path.write_text("\n".join(map(json.dumps, rows)))
    drawn = panels.similarities(report.read(tmp_path / "run"))
    assert "epoch 1 by" in drawn and "epoch 3 by" in drawn and "epoch 2 by" not in drawn
    empty = [{"epoch": 1, "positives": [0] * 20, "negatives": [0] * 20}]
    assert "epoch 1 by" in panels.similarities(SimpleNamespace(epochs=empty))  # and no warning


@pytest.mark.parametrize("file, path", [
    ("profile.json", ("ops", 0, "seconds")), ("profile.json", ("roofline", "flops_per_second")),
    ("profile.json", ("roofline", "bytes_per_second")), ("probe.json", ("controls", "chance")),
    ("probe.json", ("C",)),
])  # fmt: skip
def test_a_0_that_cannot_be_costs_its_part_alone(file, path, run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    panels.hot_spots(report.read(tmp_path / "run"))  # which makes profile.json
    *above, last = path
    part = values = json.loads((tmp_path / "run" / file).read_text())
    for name in above:
        part = part[name]
    part[last] = 0
    (tmp_path / "run" / file).write_text(json.dumps(values))
    facts = report.read(tmp_path / "run")
    report.judge(facts)
    panels.hot_spots(facts)  # timed again, if need be
    assert (facts.files["probe"] is None) == (file == "probe.json")


def test_a_probe_that_gets_nothing_right_is_one(run, tmp_path):
    path = shutil.copytree(run, tmp_path / "run") / "probe.json"
    values = json.loads(path.read_text()) | {"top1": 0, "top5": 0, "knn": 0, "ci95": [0, 0]}
    path.write_text(json.dumps(values))
    assert report.read(tmp_path / "run").files["probe"] == values


def test_pages_without_docstrings_are_refused_in_a_line(run):
    command = [sys.executable, "-OO", "-m", "minisimclr", "report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: pages need docstrings: run")


def test_all_steps_of_a_run_share_their_keys(run):
    (one, *_), (other, *_) = map(report.read(run).files.get, ("metrics", "timings"))
    assert all(key is sys.intern(str(key)) for key in (*one, *other))


def test_what_takes_long_shows_progress(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "profile.json").unlink(missing_ok=True)
    seen = {}
    report.build_report(
        report.read(copy, lambda _, told: seen.setdefault(told["label"], []).append(told))
    )
    assert set(seen) == {"features", "profiling"}
    assert all(told[-1]["done"] == told[-1]["total"] for told in seen.values())
    assert [told["done"] for told in seen["profiling"]] == [1, 2, 3, 4, 5]


def without_data(path):
    settings = json.loads((path / "config.json").read_text())
    settings["data"]["value"] = str(path / "gone")
    (path / "config.json").write_text(json.dumps(settings))
    return "gone"


def without_checkpoints(path):
    shutil.rmtree(path / "checkpoints")
    return "There is no checkpoint yet."


def torn_checkpoints(path):
    for file in path.glob("checkpoints/*"):
        file.write_bytes(b"torn")
    return "none of its 2 checkpoints is whole"


def killed_in_the_first_epoch(path):
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text(lines[0] + lines[1][:20])
    shutil.rmtree(path / "checkpoints")
    return "stopped before its end"


def before_the_first_step(path):
    for name in ("metrics.jsonl", "timings.jsonl", "probe.json", "env.json", "profile.json"):
        (path / name).unlink(missing_ok=True)
    shutil.rmtree(path / "checkpoints")
    return "no metrics"


@pytest.mark.parametrize(
    "harm",
    [without_data, without_checkpoints, torn_checkpoints, killed_in_the_first_epoch,
     before_the_first_step],
)  # fmt: skip
def test_a_run_that_lacks_parts_gets_a_page_that_says_so(harm, run, page, tmp_path):
    path = tmp_path / ("a & b" if os.name == "nt" else "<b>&")  # nor can a name break the page
    shutil.copytree(run, path)
    said = harm(path)
    lacking = report.build_report(report.read(path)).decode()
    check(lacking)
    assert said in lacking
    assert "Not shown" in lacking


def test_what_comes_after_a_divergence_is_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    end = json.dumps({"step": 2, "diverged": "loss nan"}) + "\n"
    for rest in lines[1:], [end]:
        log.write_text("".join([lines[0], end, *rest]))
        facts = report.read(tmp_path / "run")
        assert len(facts.files["metrics"]) == 1 and facts.files["diverged"]["step"] == 2
        assert report.build_report(facts)


def test_a_log_damaged_in_the_middle_says_from_where_on_it_is_left_out(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    for harmed in (b'{"step": ', b"\xff\xfe", b"[1]", lines[3].strip()):  # or line 3 is lost
        log.write_bytes(b"".join([*lines[:2], harmed, b"\n", *lines[3:]]))
        facts = report.read(tmp_path / "run")
        said = "metrics.jsonl: line 3 cannot be used; lines left out from there on: "
        assert facts.missing[0] == f"{said}{len(lines) - 2}." and len(facts.files["metrics"]) == 2
        log.write_bytes(b"".join([*lines[:2], harmed, b"\n"]))  # at the end
        assert report.read(tmp_path / "run").missing[0] == f"{said}1."
    log.write_bytes(b"".join(lines)[:-20])  # half a line, as a killed run leaves it
    assert not report.read(tmp_path / "run").missing


def test_a_card_takes_any_words():
    said = panels.card(np.zeros((8, 8, 3), np.uint8), '"<', "<b>")
    assert 'alt="&quot;&lt;"' in said and "<span>&lt;b&gt;</span>" in said


def test_confusions_are_of_labelled_pictures_seen_as_in_training(run, monkeypatch):
    facts, asked, scaled, see = report.read(run), [], [], panels.extractor
    labels = facts.dataset.labels.copy()
    labels[facts.dataset.split("labelled")[0]] = -1
    facts.dataset = replace(facts.dataset, labels=labels)

    def noted(*given, **named):
        return lambda rows: asked.append(rows) or see(*given, **named)(rows)

    crop, sizes = augment.center_view, set()
    monkeypatch.setattr(embed, "center_view", lambda x, size: sizes.add(size) or crop(x, size))
    monkeypatch.setattr(panels, "extractor", noted)
    monkeypatch.setattr(panels, "standardize", lambda *h: scaled.append(h) or standardize(*h))
    panels.confusions(facts)
    (rows,), ((own, test),) = asked, scaled
    assert sizes == {facts.config.image_size} != {facts.dataset.images.shape[1]}
    assert (labels[rows] >= 0).all() and len(own) == len(rows) and test is facts.test_h[0]


def test_three_mistakes_and_two_of_the_other_class_are_shown(run, monkeypatch):
    facts, alts = report.read(run), []
    labels_of = facts.dataset.labels
    labels, classes = labels_of[facts.test_rows], np.eye(3, dtype=np.float32)
    facts.__dict__["test_h"] = (classes[(labels + 1) % 3],)
    monkeypatch.setattr(panels, "extractor", lambda *_, **__: lambda rows: classes[labels_of[rows]])
    monkeypatch.setattr(panels, "card", lambda pixels, alt, *_, **__: alts.append(alt) or "")
    assert f"<caption>Mistakes, {len(labels):,} tests</caption>" in panels.confusions(facts)
    assert sum("taken for" in alt for alt in alts) == 3 * 3 and len(alts) == 3 * (3 + 2)


def test_the_views_after_the_step_have_the_loss_after_it(step):
    after = [Tensor(u) for u in np.split(step.u_after, 2)]
    assert float(ms.nt_xent(*after, TEMPERATURE)) == pytest.approx(step.loss_after, rel=1e-6)


def test_the_views_after_the_step_are_one_batch_too(dataset, monkeypatch):
    seen = []
    monkeypatch.setattr(walkthrough, "nt_xent", lambda *z: seen.extend(z[:2]) or ms.nt_xent(*z))
    walk(np.asarray(dataset.images[::40]))
    z = np.concatenate([each.data for each in seen])
    assert z.dtype == np.float64  # by the readable passes, which the page shows
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-9)  # not of running statistics


def test_nobody_observes_after_a_walk_that_failed(monkeypatch):
    monkeypatch.setattr(walkthrough, "training_step", Mock(side_effect=ValueError("of a test")))
    with pytest.raises(ValueError, match="of a test"):
        walk(np.zeros((2, 20, 20, 3), np.uint8))
    assert tensor.observer is None


def test_a_walkthrough_names_its_seed(dataset):
    assert b"LARS, seed 3;" in report.build_walkthrough(dataset, 2, seed=3)
    model = Model.build("resnet_small", "small", 0, seed=3, d_out=2)
    w = np.linalg.norm(model.encoder.conv1.weight.data)
    step = walk(np.asarray(dataset.images[:2]), seed=3)
    assert step.weights["encoder.conv1.weight"]["w"] == pytest.approx(w)


def test_titles_and_captions_are_escaped():
    assert "<h3>&lt;b&gt;</h3>" in panels.row(title="<b>")
    assert b"&lt;b&gt;" in document("kind", "t", "<b>", "", [])
    box = report.verdict_box([Finding(WARNING, "", "<b>")], [])
    assert "Look here: &lt;b&gt;</h2>" in box
    page = charts.table("<", ("<b>", "<b>"), [("<b>", "<b>")]) + panels.code("<b>", "<")
    assert not any(raw in page for raw in ("<b>", "<<", '"<"')) and "<figcaption>&lt;" in page
    assert '<div class="card yes">' in panels.card(np.zeros((8, 8, 3), np.uint8), "a", mark="yes")


def test_settings_have_origins_and_the_machine_is_told(run):
    facts = report.read(run)
    facts.files["config"]["lr"]["origin"] = "flag"
    page = panels.repeat(facts)
    assert re.search('row">lr</th><td[^>]*>0.5</td><td[^>]*>flag</td>', page)
    assert facts.files["env"] and all(f'row">{name}</th>' in page for name in facts.files["env"])


def test_marks_of_both_directions_are_their_own(run, drawn):
    facts = report.read(run)
    facts.config = replace(facts.config, batch_size=64)  # of which no more than 32 are timed
    assert "A step of 32 pictures" in panels.hot_spots(facts)
    ops, (given, named) = facts.profile["ops"], drawn[-1]
    step = sum(op["seconds"] for op in ops)
    for way, (_, rates) in given[3].items():
        some = [op for op in ops if op["direction"] == way and op["flops"]]
        assert rates == pytest.approx([op["flops"] / op["seconds"] / 1e9 for op in some])
        sizes = [8 + 250 * op["seconds"] / step for op in some]
        assert named["sizes"][way] == pytest.approx(sizes)


def test_axes_are_as_asked(monkeypatch):
    lines = lambda: charts.lines("t", "x", {"a": ([1, 2], [3, 4])}, yscale="log", ylim=(1, 9))  # noqa: E731
    (axes,) = drawn_by(monkeypatch, charts, lines)
    assert (axes.get_yscale(), axes.get_ylim()) == ("log", (1, 9))
    scatter = lambda: charts.scatter("t", "x", "y", {"a": ([1, 2], [3, 5])})  # noqa: E731
    (axes,) = drawn_by(monkeypatch, charts, scatter)
    assert axes.collections[0].get_offsets().tolist() == [[1, 3], [2, 5]]


def test_a_chart_is_as_high_as_its_figure_has_become():
    page = charts.chart("a", "", lambda axes: axes.figure.set_figheight(5), 4, 2)
    assert 'viewBox="0 0 288 360"' in page


def test_words_behind_charts_have_their_figures():
    page = charts.matrix("t", np.arange(4.0).reshape(2, 2), "ab", np.array([1, 0]))
    assert re.findall("<td>([^<]*)", page) == ["0.00", "1.00", "2.00", "3.00"]
    assert "a from 1 to 2" in charts.lines("t", "x", {"a": ([0, 1, 2], [1, 3, 2])})
    assert "; l 3.5" in charts.lines("t", "x", {"a": ([1, 2], [3, 4])}, level=("l", 3.5))
    assert "t, %: a 1.5, b 2" in charts.bars("t", "%", {"a": 1.5, "b": 2.0})
    assert "Points of a, b: t, x and y" in charts.scatter(
        "t", "x", "y", dict.fromkeys("ab", ([1], [2]))
    )


def test_three_epochs_are_the_ends_and_the_middle():
    rows = [{"epoch": k, "x": [k]} for k in range(1, 8)]
    assert [row["epoch"] for row in panels.three(rows, "x")] == [1, 4, 7]
    with pytest.raises(Missing, match="its log has no trust"):
        panels.three([{"epoch": 1}], "trust")


def test_each_epoch_has_its_own_trust_ratios(run, drawn):
    panels.trust(facts := report.read(run))
    names, _ = drawn[0][0][2]["epoch 1"]
    own = (name.removesuffix(".weight") for name in facts.epochs[0]["trust"])
    assert names == [name.removeprefix("encoder.") for name in own]
    shown = [values for _, values in drawn[0][0][2].values()]
    assert shown == [[*end["trust"].values()] for end in facts.epochs]


def test_trust_ratios_are_shown_for_lars_only(run, page, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text())
    settings["optimizer"]["value"] = "sgd"
    path.write_text(json.dumps(settings))
    assert "Trust ratios" in page
    assert "Trust ratios" not in report.build_report(report.read(tmp_path / "run")).decode()


def test_trust_ratios_changed_by_hand_cost_their_epoch_alone(run):
    facts = report.read(run)
    for harmed in (None, 5, {}):
        facts.epochs[1]["trust"] = harmed
        drawn = panels.trust(facts)
        assert "epoch 1 from" in drawn and "epoch 3 from" in drawn and "epoch 2" not in drawn
    for end in facts.epochs:
        end["trust"] = None
    with pytest.raises(Missing):
        panels.trust(facts)


def test_a_run_that_is_going_on_is_not_disturbed(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "profile.json").unlink(missing_ok=True)
    with locked(tmp_path / "run" / "run"):
        page = report.build_report(report.read(tmp_path / "run")).decode()
    assert "Still training" in page
    assert not (tmp_path / "run" / "profile.json").exists()


def test_features_that_are_all_equal_and_settings_without_origin_have_a_page(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "timings.jsonl").unlink()
    path = tmp_path / "run" / "config.json"
    settings = {name: {"value": e["value"]} for name, e in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(settings))
    facts = report.read(tmp_path / "run")
    facts.__dict__["test_h"] = tuple(np.ones_like(h) for h in facts.test_h)
    page = report.build_report(facts).decode()
    assert "0% of the variance" in page and "nan" not in re.sub("<svg.*?</svg>", "", page)
    assert "views per second" not in report.tiles(facts)
    assert "views per second" in report.tiles(report.read(run))


@pytest.mark.skipif(os.name == "nt", reason="has no such names")
def test_any_name_of_a_class_or_a_run_is_shown(pictures, tmp_path):
    names = {"blob": "$10_$20", "check": "_hidden", "stripe": os.fsdecode(b"bad\xff")}
    for old, new in names.items():
        shutil.copytree(pictures / old, tmp_path / "photos" / new)
    config = ms.TrainConfig(
        data=str(tmp_path / "photos"), width=4, image_size=16, batch_size=16, epochs=1
    )
    runs = [pretrain(config, tmp_path / name).path for name in ("_a", "$b_$c")]
    run = open_run(runs[0])[0]
    (runs[0] / "probe.json").write_text(json.dumps(probe_run(run, open_data(run, None))))
    page = report.build_report(report.read(runs[0])).decode()
    check(page)
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    for name in ("$10_$20", "_hidden", "bad?"):
        assert name in charts  # in the legend of the map
    page = report.build_comparison([report.read(path) for path in runs]).decode()
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.S))
    assert "$b_$c</text>" in charts and "_a</text>" in charts


def test_one_picture_alone_is_compared_with_none(run):
    facts = report.read(run)
    splits = facts.dataset.splits.copy()
    splits[facts.dataset.split("test")[1:]] = 0
    facts.dataset = replace(facts.dataset, splits=splits)
    for panel in (panels.spectrum, panels.neighbours, panels.feature_map, panels.confusions):
        with pytest.raises(Missing, match="one picture alone"):
            panel(facts)


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(DataError, match="not a run folder"):
        report.read(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_comparison_shows_what_differs(run, tmp_path):
    config = report.read(run).config
    other = pretrain(replace(config, lr=0.25, epochs=1), tmp_path / "run").path
    page = report.build_comparison([report.read(run), report.read(other)]).decode()
    check(page)
    ends = [f"{path.parent.name}/{path.name}" for path in (run, other)]  # both are called run
    assert f'<p class="lead">{", ".join(ends)}</p>' in page
    ended = page[page.index("<caption>At the last epoch</caption>") :].split("</table>")[0]
    for path, end in zip((run, other), ends, strict=True):
        last = report.read(path).epochs[-1]
        keys = "chance", "loss", "accuracy", "alignment", "uniformity", "effective_rank"
        figures = [last["step"], *(f"{last[key]:.4g}" for key in keys)]
        assert "".join([f"{end}</th>", *(f"<td>{x}</td>" for x in figures)]) in ended
    head = re.findall(r'scope="col">([^<]+)', ended)
    names = ["loss", "contrastive accuracy", "alignment", "uniformity", "effective rank"]
    assert head == ["run", "step", "chance", *names, "views/s"]
    came = page[page.index("<caption>What came of it</caption>") :].split("</table>")[0]
    columns = ["run", "verdict", "probe top-1", "95 % interval"]
    assert re.findall(r'scope="col"[^>]*>([^<]+)', came) == columns
    assert page.count(">chance</text>") == 1  # beside the losses, and nowhere else
    differing = page[page.index("Settings that differ") :].split("</table>")[0]
    assert set(re.findall(r'scope="row">(\w+)', differing)) == {"lr", "epochs"}
    assert 'row">lr</th><td>0.5</td><td>0.25</td>' in differing
    facts = {"a": report.read(run), "b": report.read(other)}
    for end in facts["b"].epochs:
        end["chance"] += 1  # as of another batch size
    assert ">chance</text>" not in report.compare.curves(facts)
    with pytest.raises(ConfigError, match="two runs"):
        report.build_comparison([report.read(run)] * 2)
    with pytest.raises(ConfigError, match="two runs"):
        report.build_comparison([report.read(run)])


def test_runs_that_are_equal_or_have_not_begun_are_compared(run):
    facts = report.read(run)
    new = replace(facts, files=facts.files | {"metrics": []})
    with pytest.raises(Missing, match="all settings are equal"):
        report.compare.differences({"a": facts, "b": new})
    drawn = report.compare.curves({"old": facts, "new": new})
    assert "old from" in drawn and "new from" not in drawn
    assert "<td>–</td>" in report.compare.results({"old": facts, "new": new})
    with pytest.raises(Missing, match="no run has ended"):
        report.compare.curves({"new": new})


def test_a_comparison_tells_of_data_that_changed_between_its_runs(run):
    old, new = report.read(run), report.read(run)
    new.path, old.missing = run / "again", ["The data set has changed since <this> run."]
    page = report.build_comparison([old, new]).decode()
    check(page)
    said = f"{run.name}: The data set has changed since &lt;this&gt; run."
    assert page.index(said) < page.index("What came of it") and page.count(said) == 1


def test_curves_of_a_comparison_are_what_they_are_called(run, monkeypatch):
    drawn, epochs = {}, report.read(run).epochs
    monkeypatch.setattr(report.compare, "lines", lambda *a, **_: drawn.update({a[0]: a[2]}) or "")
    facts = report.read(run)
    del facts.epochs[1], epochs[1]  # as one whose figures are no numbers
    report.compare.curves({"a": facts})
    for key in ("loss", "alignment", "uniformity"):
        assert drawn[key]["a"] == ([1, 3], [end[key] for end in epochs])


def drawn_by(monkeypatch, module, make):
    """Axes with what the charts of a page's part draw there."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(module, "chart", lambda alt, data, draw, *_, **__: kept.append(draw) or "")
    make()
    axes = Figure().subplots(len(kept), squeeze=False).ravel()
    for draw, each in zip(kept, axes, strict=True):
        draw(each)
    return axes


def test_a_matrix_outlines_partners(monkeypatch):
    partners = np.array([2, 3, 0, 1])
    show = lambda: charts.matrix("t", np.eye(4), "abcd", partners)  # noqa: E731
    assert "partners 0.00 on average" in show()
    (axes,) = drawn_by(monkeypatch, charts, show)
    assert axes.collections[0].get_offsets().tolist() == [[0, 2], [1, 3], [2, 0], [3, 1]]


def test_an_empty_diagonal_leaves_the_colours(monkeypatch):
    values = np.where(np.eye(4), -np.inf, np.arange(16.0).reshape(4, 4))
    show = lambda: charts.matrix("t", values, "abcd", np.array([2, 3, 0, 1]))  # noqa: E731
    (axes,) = drawn_by(monkeypatch, charts, show)
    assert (axes.images[0].norm.vmin, axes.images[0].norm.vmax) == (1, 14)


def test_axes_have_their_names(monkeypatch):
    def show():
        charts.lines("t", "x", {"a": ([1, 2], [3, 4])}, y="y")
        charts.scatter("t", "x", "y", {"a": ([1], [2])})

    for axes in drawn_by(monkeypatch, charts, show):
        title = axes.get_title("left") or axes.get_title()
        assert (title, axes.get_xlabel(), axes.get_ylabel()) == ("t", "x", "y")


def test_the_mean_of_a_histogram_is_of_what_it_counts():
    assert "means: a 0.25" in charts.lines("t", "x", {"a": ([-0.5, 0.5], [1, 3])}, fill=True)


def test_each_of_many_lines_and_marks_has_a_look_of_its_own(monkeypatch):
    def show():
        charts.lines("t", "x", {f"n{k}": ([1, 2], [3, 4]) for k in range(12)})
        charts.scatter("t", "x", "y", {f"n{k}": ([1], [2]) for k in range(12)})

    lines, points = drawn_by(monkeypatch, charts, show)
    assert len({(line.get_color(), line.get_linestyle()) for line in lines.lines}) == 12
    marks = ((c.get_facecolor()[0], c.get_paths()[0].vertices) for c in points.collections)
    assert len({(tuple(colour), shape.tobytes()) for colour, shape in marks}) == 12
    assert all(c.get_alpha() > 0.5 for c in points.collections)


def test_curves_and_histograms_are_told_apart(monkeypatch):
    def show():
        charts.lines("t", "x", {name: (range(40), range(40)) for name in "ab"})
        charts.lines("t", "x", {name: ([-0.5, 0.5], [1, 2]) for name in "ab"}, fill=True)

    curves, histograms = drawn_by(monkeypatch, charts, show)
    looks = [(line.get_marker(), line.get_markevery()) for line in curves.lines]
    assert looks == [("o", 2), ("s", 2)]
    areas, edges = histograms.patches[::2], histograms.patches[1::2]
    colours = [area.get_facecolor()[:3] for area in areas]
    assert colours == [edge.get_edgecolor()[:3] for edge in edges] and len({*colours}) == 2


def test_epochs_are_whole_and_names_of_weights_stand_upright(monkeypatch):
    def show():
        charts.lines("t", "epoch", {"a": ([1, 2], [3, 4])})
        charts.lines("t", "weight", {"a": (["conv1", "conv2"], [3, 4])})

    epochs, weights = drawn_by(monkeypatch, charts, show)
    assert all(tick == round(tick) for tick in epochs.get_xticks())
    assert {label.get_rotation() for label in weights.get_xticklabels()} == {90}


def test_a_large_matrix_names_some_of_its_views(monkeypatch):
    show = lambda: charts.matrix("t", np.eye(10), "abcdefghij", np.arange(10))  # noqa: E731
    (axes,) = drawn_by(monkeypatch, charts, show)
    for axis in (axes.xaxis, axes.yaxis):
        assert [*axis.get_ticklocs()] == [0, 2, 4, 6, 8]
        assert [text.get_text() for text in axis.get_ticklabels()] == [*"acegi"]


def test_a_level_is_drawn_at_its_height(monkeypatch):
    show = lambda: charts.lines("t", "x", {"a": ([1, 2], [3, 4])}, level=("b", 3.5))  # noqa: E731
    (axes,) = drawn_by(monkeypatch, charts, show)
    assert [[*line.get_ydata()] for line in axes.lines] == [[3, 4], [3.5, 3.5]]


@pytest.mark.parametrize("names", [["a" * 70, "b" * 70, "c d " * 20], ["W" * 20] * 3, ["a", "b"]])
def test_a_legend_fits_its_chart(names):
    figure = pytest.importorskip("matplotlib.figure").Figure((4.8, 2.7), layout="constrained")
    axes = figure.add_subplot()
    for name in names:
        axes.plot([0, 1], label=name)
    charts.legend(axes)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, chart = legend.get_window_extent(), axes.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 and box.y1 <= chart.y0
    assert chart.height > 1.2 * figure.dpi
    shown = ["".join(text.get_text().split()) for text in legend.get_texts()]
    assert shown == ["".join(name.split()) for name in names]


def test_names_that_differ_only_at_their_ends_stay_whole():
    ends = [f"class with number {k:03}" for k in (1, 2)]
    for names, shown in ((ends, ends), (["a" * 20, "b"], ["a" * 15 + "…", "b"])):
        page = charts.scatter("t", "x", "y", {name: ([0], [1]) for name in names})
        assert all(f">{name}</text>" in page for name in shown)


def test_a_flag_is_not_broken_at_the_end_of_a_line():
    box = report.verdict_box([Finding(WARNING, "It is <b>.", "<i>", "Try --crop-min 0.1")], [])
    assert "<i>" not in box  # a title may name a control of probe.json
    assert 'It is &lt;b&gt;. Try <span class="flag">--crop-min</span> 0.1</li>' in box


def test_columns_of_long_cells_run_over_several_lines():
    rows = [("a long name of a row", "short", "1"), ("y", "a sentence of several words", "2")]
    head, *body = charts.table("t", ("a", "b", "c"), rows).split("<tr>")[1:]
    assert '<th scope="col">a<' in head and '<th scope="col" class=words>b<' in head
    assert [re.findall("<td class=words>(.)", row) for row in body] == [["s"], ["a"]]
    assert [re.findall("<td>(.)", row) for row in body] == [["1"], ["2"]]


def test_the_numbers_behind_a_chart_are_named_as_its_axes():
    both = charts.points("t", "x", "y", {"a": ([1, 2], [3, None]), "b": ([4], [1234.5])})
    assert re.findall(r'scope="col">([^<]*)', both) == ["name", "x", "y"]
    rows = [["1", "3"], ["2", "–"], ["4", "1,234"]]
    assert [re.findall("<td>([^<]*)", row) for row in both.split("<tr>")[2:]] == rows
    apart = charts.points("t", "x", "y", {"a": ([1, 2], [3, 4]), "b": ([2, 3], [5, 6])})
    cells = [re.findall("<td>([^<]*)", row) for row in apart.split("<tr>")[2:]]
    assert cells == [["1", "3"], ["2", "4"], ["2", "5"], ["3", "6"]]
    drawn = charts.chart("loss by step: from 4 to 1", "", lambda axes: None)
    assert '<summary aria-label="The numbers: loss by step">' in drawn  # short: it is read aloud


def test_values_are_written_for_people():
    for value, said in ((None, "–"), (12345, "12,345"), (-12345.6, "-12,346"), (0.123456, "0.1235"),
                        (True, "True"), (np.float32(0.5), "0.5"), (2e9, "2e+09")):  # fmt: skip
        assert charts.text(value) == said


def test_a_card_shows_views_as_it_shows_pictures():
    pixels = np.arange(192, 256, dtype=np.uint8).repeat(3).reshape(8, 8, 3)
    assert panels.card(pixels, "a") == panels.card(pixels.astype(np.float32) / 255, "a")
    brown = np.full((300, 200, 3), (200, 100, 50), np.uint8)
    (data,) = re.findall('base64,([^"]+)', panels.card(brown, "a"))
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert shown.size == (64, 96)
    np.testing.assert_allclose(np.asarray(shown)[0, 0], brown[0, 0], atol=5)


def test_error_bars_end_where_their_ranges_do(monkeypatch):
    show = lambda: charts.bars("t", "%", {"a": 40.0, "b": 30.0}, [[35, 50], [30, 30]])  # noqa: E731
    (axes,) = drawn_by(monkeypatch, charts, show)
    assert axes.yaxis_inverted()  # the first is on top
    assert axes.yaxis.get_major_formatter().format_ticks([0, 1]) == ["a", "b"]
    assert [bar.get_width() for bar in axes.patches] == [40, 30]
    (errors,) = axes.collections
    assert [line[:, 0].tolist() for line in errors.get_segments()] == [[35, 50], [30, 30]]


@pytest.fixture(scope="module")
def dataset(pictures):
    return ms.data.open_dataset(pictures, 20)


@pytest.fixture(scope="module")
def step(dataset):
    return walk(np.asarray(dataset.images[::40]))


def test_the_walkthrough_has_the_library_s_numbers(step):
    n = len(step.images)
    model = Model.build("resnet_small", "small", 0, seed=0, d_out=2).train()
    h = model.encoder(Tensor(np.concatenate(step.views)))
    np.testing.assert_allclose(step.seen["h"], h.data, rtol=1e-4, atol=1e-5)
    z1, z2 = (Tensor(z.astype(np.float64), requires_grad=True) for z in np.split(step.seen["z"], 2))
    loss = ms.nt_xent(z1, z2, TEMPERATURE)
    loss.backward()
    assert step.loss == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(step.seen["dz"], np.concatenate([z1.grad, z2.grad]), atol=1e-6)
    s, i = step.s.astype(np.float64), np.arange(2 * n)
    assert np.isneginf(np.diag(s)).all()
    terms = np.log(np.exp(s).sum(axis=1)) - s[i, step.partner]
    assert terms.mean() == pytest.approx(step.loss, rel=1e-5)
    np.testing.assert_allclose(np.exp(-terms), step.p[i, step.partner], rtol=1e-5)
    # The forces, summed over all views, are the gradient along the circle.
    u = step.seen["u"]
    du = step.force @ u
    along = (du - u * (u * du).sum(axis=1, keepdims=True)) / step.seen["length"]
    np.testing.assert_allclose(along, step.seen["dz"], atol=1e-5)
    assert step.loss_after < step.loss
    for name, figures in step.weights.items():
        decayed = figures["step"] / (RATE * figures["trust"])
        assert decayed == pytest.approx(figures["g"], rel=1e-3), name
        assert figures["step"] == pytest.approx(RATE * 0.001 * figures["w"], rel=1e-3)


def test_each_picture_of_the_walkthrough_has_a_look_of_its_own(dataset, monkeypatch):
    step = walk(np.asarray(dataset.images[:12]))
    (axes,) = drawn_by(monkeypatch, walkthrough, lambda: walkthrough.forces(step))
    looks = [(line.get_color(), line.get_marker()) for line in axes.lines[1:]]
    assert len(looks) == 48 and len(set(looks)) == 12  # two views, before and after
    assert len(re.findall('alt="View ', walkthrough.views(step))) == 24


def test_the_walkthrough_s_cards_are_of_its_views(step, monkeypatch):
    monkeypatch.setattr(walkthrough, "view_cards", lambda *given: shown.extend(given) or "")
    shown = []
    walkthrough.views(step)
    for one, other in zip(shown, (step.images, step.drawn, step.views), strict=True):
        assert one is other


def test_arrows_of_the_walkthrough_show_the_way_downhill(step, monkeypatch):
    (axes,) = drawn_by(monkeypatch, walkthrough, lambda: walkthrough.forces(step))
    arrows = [text for text in axes.texts if text.arrow_patch]
    at = np.array([arrow.xyann for arrow in arrows])
    ways = np.array([arrow.xy for arrow in arrows]) - at
    np.testing.assert_allclose(at, step.seen["u"], atol=1e-6)
    downhill = -step.seen["dz"] * step.seen["length"]
    np.testing.assert_allclose(ways, downhill * 0.5 / abs(downhill).max(), atol=1e-6)
    marks = np.array([line.get_xydata()[0] for line in axes.lines[1:]])  # before, after, before
    np.testing.assert_allclose(marks[::2], step.seen["u"])
    np.testing.assert_allclose(marks[1::2], step.u_after)


def test_black_pictures_are_pulled_nowhere():
    assert walkthrough.forces(walk(np.zeros((4, 20, 20, 3), np.uint8)))  # without a warning


def test_names_stand_by_their_views(step, monkeypatch):
    (axes,) = drawn_by(monkeypatch, walkthrough, lambda: walkthrough.forces(step))
    names = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in names] == [n for n in step.names for _ in range(2)]
    before, after = ([text.get_position() for text in names[k::2]] for k in (0, 1))
    np.testing.assert_allclose(before, 0.82 * step.seen["u"])
    np.testing.assert_allclose(after, 1.2 * step.u_after)


def test_the_walkthrough_s_gradients_have_their_lengths(step, monkeypatch):
    tables = []
    monkeypatch.setattr(walkthrough, "table", lambda *given: tables.append([*given[-1]]) or "")
    monkeypatch.setattr(walkthrough, "chart", lambda *_: "")
    walkthrough.forces(step)
    lengths = np.linalg.norm(step.seen["dz"] * step.seen["length"], axis=1)
    np.testing.assert_allclose([row[5] for row in tables[0]], lengths)


@pytest.mark.parametrize("change, said", [(1, True), (-1, False)])
def test_a_step_that_raises_the_loss_is_explained(change, said, step):
    page = walkthrough.update(replace(step, loss_after=step.loss + change))
    assert ("may also raise it" in page) == said


def test_each_view_is_told_its_strongest_forces(step, monkeypatch):
    tables = []
    monkeypatch.setattr(walkthrough, "table", lambda _, *given: tables.append(given) or "")
    monkeypatch.setattr(walkthrough, "chart", lambda *_: "")
    walkthrough.forces(step)
    ((head, lines),) = tables
    assert head[1:5] == ("pulled to", "pull", "pushed most by", "push")
    partners = step.partner, step.force.argmax(axis=1)  # pulled together, pushed apart most
    for i, (_, *said) in enumerate(lines):
        pull, push = (step.force[i, j[i]] for j in partners)
        names = [step.names[j[i]] for j in partners]
        assert said[:4] == [names[0], -pull, names[1], push]
        for degrees, u in zip(said[5:], (step.seen["u"], step.u_after), strict=True):
            turn = np.radians(degrees)
            np.testing.assert_allclose([np.cos(turn), np.sin(turn)], u[i], atol=1e-5)


def test_the_walkthrough_s_tables_agree_with_each_other(step, monkeypatch):
    heads, tables, marked = [], [], []

    def table(_, head, rows):
        heads.append(head)
        tables.append(list(rows))
        return ""

    monkeypatch.setattr(walkthrough, "table", table)
    monkeypatch.setattr(walkthrough, "matrix", lambda *given: marked.append(given) or "")
    assert f"Loss: {step.loss:.4f}." in walkthrough.terms(step)
    for i, j, own, among, term, p in tables[0]:
        assert {i, j} == {f"{i[0]}a", f"{i[0]}b"}
        assert (term, p) == pytest.approx((among - own, np.exp(-term)), rel=1e-5)
    assert np.mean([row[4] for row in tables[0]]) == pytest.approx(step.loss, rel=1e-5)
    losses = f"the loss was {step.loss:.4f} and is now {step.loss_after:.4f}."
    assert losses in walkthrough.update(step)
    for _, w, g, ratio, moved in tables[1]:
        assert (ratio, moved) == pytest.approx((0.001 * w / g, RATE * 0.001 * w), rel=1e-3)
    assert heads[0][2:] == ("s[i, j]", "log Σ exp s[i, k]", "l(i)", "p[i, j]")
    assert heads[1] == ("weight", "|w|", "|g|", "trust ratio", "|step|")
    tables.clear()
    for part in (walkthrough.encoder, walkthrough.head, walkthrough.similarity):
        part(step)
    assert all([row[0] for row in rows] == step.names for rows in tables)
    ((_, shown, names, partner),) = marked
    np.testing.assert_array_equal(partner, step.partner)
    np.testing.assert_array_equal(shown, step.s)  # over the temperature, as its title says
    assert names == step.names
    h, z, units = ([row[1:] for row in rows] for rows in tables)
    np.testing.assert_allclose(h, step.seen["h"][:, :6])
    np.testing.assert_allclose(z, step.seen["z"])
    np.testing.assert_allclose(units, np.hstack([step.seen["length"], step.seen["u"]]))


def test_the_walkthrough_is_about_pictures_of_different_classes(dataset, step, monkeypatch):
    taken = []
    monkeypatch.setattr(walkthrough, "walk", lambda images, _: taken.extend(images) or step)
    report.build_walkthrough(dataset, 3)
    labels = {image.tobytes(): k for image, k in zip(dataset.images, dataset.labels, strict=True)}
    assert {labels[image.tobytes()] for image in taken} == {0, 1, 2}


def test_the_walkthrough_page(dataset):
    page = report.build_walkthrough(dataset, 3).decode()
    assert "ln 5 = 1.6094" in page
    check(page)
    assert page == report.build_walkthrough(dataset, 3).decode()
    other = report.build_walkthrough(dataset, 3, seed=1).decode()
    for key in ("views", "encoder"):
        parts = [each.partition(f'<section id="{key}"')[2] for each in (page, other)]
        numbers = [part.partition("</section>")[0] for part in parts]
        assert numbers[0] != numbers[1] and all(numbers)
    few = replace(dataset, splits=np.where(np.arange(len(dataset.splits)) < 2, 0, 1))
    assert "on 2 pictures of" in report.build_walkthrough(few, 3).decode()
    few.splits[0] = 1
    with pytest.raises(DataError, match="two pictures to train on are needed, not 1"):
        report.build_walkthrough(few, 3)
    for lines in (
        "z = model.head(h)",
        "s[row, row + start] = -xp.inf",
        "du += g.T @ u[i]",
        "w[...] -= v",
    ):
        assert lines in page


def test_excerpts_are_the_source_or_an_error():
    lines = excerpt(training_step, "# t(x)", "x = ")
    assert "concatenate(augment.apply_views(" in lines and "h = model.encoder" not in lines
    place = int(re.search(r"minisimclr/simclr\.py, line (\d+): training_step", lines)[1])
    source = Path(simclr.__file__).read_text("utf-8").splitlines()
    assert "# t(x)" in source[place - 1]
    with pytest.raises(StopIteration):
        excerpt(NTXent.forward, "a line that is not there")


def luminance(colour):
    """WCAG 2's relative luminance of #rrggbb or #rgb."""
    digits = colour if len(colour) == 6 else "".join(2 * c for c in colour)
    c = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ (
        0.2126,
        0.7152,
        0.0722,
    )


def test_colours_have_contrast_in_light_and_dark(page):
    themes = [dict(re.findall(r"--(\w+): #(\w+)", part)) for part in page.split("@media")[:2]]
    for theme in themes:
        for name, least in {"ink": 7, "soft": 4.5, "link": 4.5, "good": 4.5, "warning": 4.5,
                            "fault": 4.5, "k01": 7, "k02": 3, **{f"k1{k}": 3 for k in range(1, 7)}
                            }.items():  # fmt: skip
            for ground in ("paper", "page"):
                low, high = sorted((luminance(theme[name]), luminance(theme[ground])))
                assert (high + 0.05) / (low + 0.05) >= least, (name, ground)


def test_numbers_are_shown_with_four_digits_or_whole():
    shown = {0.123456: "0.1235", 999.4: "999.4", 999.6: "1,000", 12345.6: "12,346", 2e9: "2e+09"}
    assert {value: for_people(value) for value in shown} == shown
    assert (for_people(12345), for_people(None), for_people(True)) == ("12,345", "–", "True")
