"Strangers' pictures and names: what is read, what is refused in a line, and what is only text."
import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.text import Text
import pandas as pd
import pytest
import torch
from synthdet.evidence.plots import learning_curves, masks_against_detection, objects_compared, score_bars
from synthdet.show import captioned, show

NAMES = ["50$_cats", r"a_b$c$ \frac{", "_hidden^2", r"C:\new\$5", "$", "%d & #1 ~", "évêque 木\n$$", "caf\udce9"]


def arms(*names): return {n: [(s, s/1000) for s in (-10, 0, 10, 20)] for n in names}


def rows(domain="d", arm="pretrain", segmenter="redo"):
    both = [dict(source=s, fold=f, ap50=.3 + f/10) for s in ("real", "gan") for f in range(2)]
    return pd.DataFrame([dict(domain=domain, arm=arm, segmenter=segmenter, **r) for r in both])


CHARTS = dict(
    curves=lambda n: learning_curves(arms("scratch", n), title=f"{n}, 25 labels"),
    groups=lambda n: score_bars(rows(domain=n)),
    arms=lambda n: score_bars(pd.concat([rows(arm=n), rows(arm="scratch")])),
    objects=lambda n: objects_compared(rows(segmenter=n)),
    masks=lambda n: masks_against_detection({n: .5}, rows(segmenter=n)),
    show=lambda n: show(torch.zeros(3, 9, 9, dtype=torch.uint8), n),
    captions=lambda n: captioned([torch.zeros(3, 9, 9, dtype=torch.uint8)]*2, [n, "b"], title=n, cols=2))


@pytest.fixture
def figures():
    yield lambda: [plt.figure(n) for n in plt.get_fignums()]
    plt.close("all")


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("chart", CHARTS)
@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_and_no_formulas(chart, name, figures, monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    CHARTS[chart](name)
    figure, = figures()
    figure.canvas.draw()
    told = [t for t in figure.findobj(Text) if name.replace("\udce9", "?") in t.get_text()]
    assert told, "the name is shown as it is"
    assert not any(t.get_parse_math() or t.get_usetex() for t in told)
