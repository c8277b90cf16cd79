"""Pictures of runs: nothing drawn outside the page, legends of any number of classes, labels as the run's losses."""

from __future__ import annotations

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ffcl_fast.train import report
from ffcl_fast.train.checkpoint import Progress

LONG = "a name that $would$ be longer than any legend has room for"


@pytest.fixture
def figures(monkeypatch):
    """Every figure that was drawn."""
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    found = []
    close = plt.close

    def kept(figure):
        found.append(figure)
        close(figure)

    monkeypatch.setattr(plt, "close", kept)
    return found


def assert_whole(figure):
    """Title, axes, labels and legends lie on the page, and the axes have kept most of it."""
    canvas = FigureCanvasAgg(figure)  # closing it has left it without one
    canvas.draw()
    page, renderer = figure.bbox, canvas.get_renderer()
    boxes = [axis.get_tightbbox(renderer) for axis in figure.axes]
    boxes += [figure._suptitle.get_window_extent(renderer)] if figure._suptitle else []
    for box in boxes:
        assert box.x0 >= page.x0 - 1 and box.y0 >= page.y0 - 1 and box.x1 <= page.x1 + 1 and box.y1 <= page.y1 + 1
    room = sum(axis.get_window_extent(renderer).width for axis in figure.axes)
    assert room > 0.25 * page.width


def history(stage: str, layers: int = 0, least: float = 0.0) -> list[dict]:
    loss = {"loss": least + 0.5, **{f"layer{i}": least + i / 10 for i in range(layers)}}
    loss |= {"accuracy": 0.5} if stage == "downstream" else {}
    return [{"epoch": 1, "train": loss, "val": loss, "trace": [least, least + 1.0]}]


@pytest.mark.parametrize(
    ("stages", "title"),
    [(["downstream"], "No pretraining on"), (["local"], "FFCL on"), (["global", "downstream"], "FFCL on")],
)
def test_learning_curves_say_which_losses_and_fit_the_page(tmp_path, figures, stages, title):
    metrics = {
        "data": {"name": "chest_xray_224"},
        "backbone": "timm/efficientnet_lite0",
        "config": {"seed": 0, "local_loss": "mean_squares", "global_loss": "nt_xent"},
        "test": {"accuracy": 0.5, "auc": 0.5},
    }
    progress = Progress(stages[-1], 1, {s: history(s, 30, -1.0) for s in stages}, dict.fromkeys(stages, 1))
    report.learning_curves(tmp_path / "curves.png", metrics, progress)
    (figure,) = figures
    assert_whole(figure)
    assert figure._suptitle.get_text().startswith(title)
    wanted = {"local": "mean squares loss", "global": "nt xent loss", "downstream": "classification loss"}
    for axis, stage in zip(figure.axes, stages, strict=False):
        assert axis.get_ylabel() == wanted[stage]
        assert axis.get_ylim()[0] < -0.9  # losses below 0 are seen


@pytest.mark.parametrize("pairs", ["uniform", "balanced"])
def test_the_pair_cosine_of_a_network_blind_to_the_class_is_drawn(tmp_path, figures, pairs):
    config = {"seed": 0, "local_loss": "pair_cosine", "global_loss": "sup_con", "pairs": pairs, "margin": 0.25}
    metrics = {"data": {"name": "d", "images": {"train": [30, 10]}}, "backbone": "b", "config": config}
    stages = ["local", "global"]
    progress = Progress("global", 1, {s: history(s, 3) for s in stages}, dict.fromkeys(stages, 1))
    report.learning_curves(tmp_path / "curves.png", metrics, progress)
    (figure,) = figures
    assert_whole(figure)
    legends = [[text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes]
    different = {"uniform": 2 * 0.75 * 0.25, "balanced": 0.5}[pairs]
    assert f"blind to the class: {different * 0.75:.2f}" in legends[0]
    assert not any("blind" in text for text in legends[1])


@pytest.mark.parametrize("margin", [-0.5, 0.0, 0.3, 1.0])
@pytest.mark.parametrize("counts", [[1, 1], [30, 10], [5] * 10])
def test_no_cosine_that_all_pairs_share_costs_less_than_the_line(counts, margin):
    n = sum(counts)
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    target = torch.where(labels[:, None] == labels[None, :], 1, -1)
    losses = []
    for cosine in np.linspace(0.0, 1.0, 101):
        x = torch.tensor([1.0, 0.0]).repeat(n * n, 1)
        y = torch.tensor([cosine, (1 - cosine**2) ** 0.5], dtype=torch.float32).repeat(n * n, 1)
        losses.append(float(torch.nn.functional.cosine_embedding_loss(x, y, target.flatten(), margin)))
    line = report.blind_loss(counts, {"pairs": "uniform", "margin": margin})
    assert line == pytest.approx(min(losses), abs=1e-4)


def test_a_loss_that_falls_through_decades_has_plain_numbers_beside_it(tmp_path, figures):
    metrics = {"data": {"name": "x$y$z"}, "backbone": "b", "config": {"seed": 0}, "test": {"accuracy": 0.5, "auc": 0.5}}
    report.learning_curves(
        tmp_path / "curves.png",
        metrics,
        Progress("downstream", 1, {"downstream": history("downstream", 0, 0.01)}, {"downstream": 1}),
    )
    (figure,) = figures
    assert_whole(figure)
    assert figure.axes[0].get_yscale() == "log" and "x$y$z" in figure._suptitle.get_text()
    texts = [label.get_text() for label in figure.axes[0].get_yticklabels(which="both")]
    assert "0.1" in texts and not any("$" in text for text in texts)


@pytest.mark.parametrize(("count", "name"), [(2, "c"), (4, LONG), (9, LONG), (60, "c")])
def test_pictures_of_an_evaluation_fit_the_page(tmp_path, figures, rng, count, name):
    classes = [f"{i} {name}" for i in range(count)]
    labels = torch.arange(3 * count) % count
    probability = torch.rand(len(labels), count, generator=rng).softmax(1)
    report.roc(tmp_path / "roc.png", probability, labels, classes)
    report.layers_over_time(tmp_path / "layers.png", history("local", count), "info_nce")
    report.confusion_matrix(tmp_path / "confusion.png", probability, labels, classes)
    for figure in figures:
        assert_whole(figure)
        legends = [axis.get_legend() for axis in figure.axes if axis.get_legend()]
        assert all(len(legend.get_texts()) <= 22 for legend in legends)
    assert {path.name for path in tmp_path.iterdir()} == {"roc.png", "layers.png", "confusion.png"}


def test_goodness_of_the_layers_stands_beside_their_losses(tmp_path, figures):
    epochs = history("local", 4)
    for record in epochs:
        layers = [name for name in record["val"] if name != "loss"]
        record["val"] |= {f"goodness of {name}": 3.0 * record["epoch"] for name in layers}
    report.layers_over_time(tmp_path / "layers.png", epochs, "pair_cosine")
    (figure,) = figures
    assert_whole(figure)
    loss, goodness = figure.axes[1], figure.axes[2]
    assert goodness.get_ylabel().startswith("goodness") and loss.get_ylabel() == "pair cosine loss of a layer"
    assert [list(line.get_ydata()) for line in goodness.lines] == [[3.0 * r["epoch"] for r in epochs]] * 4
    assert len(loss.lines) == 4


def test_embeddings_show_every_sample_beside_the_legend(tmp_path, figures, rng):
    labels = torch.arange(30) % 3
    rows = torch.randn(30, 4, generator=rng).numpy()
    report.embeddings(
        tmp_path / "e.png", {"before training": rows, "after local": np.copy(rows)}, labels, ["a", "b", LONG]
    )
    (figure,) = figures
    assert_whole(figure)
    assert sum(len(line.get_xdata()) for axis in figure.axes for line in axis.lines) == 60
