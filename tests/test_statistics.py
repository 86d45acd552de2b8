"Statistics against brute force, SciPy, and what rliable gave."
import itertools
from math import inf

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from synthdet.core import generator, refused
from synthdet.evidence import claims
from synthdet.evidence.statistics import (
    at_least, cell, CLAIMS, contrast, equivalence, improvement, interquartile_mean, labels_needed, MARGIN, overall,
    pairs, prediction_interval, sign_flip, suite, t_interval, verdict)


def side(arm, **more):
    return pd.DataFrame([dict(dict(id=f"{arm}-{d}{s}", arm=arm, domain=d, n_real=20, fold=s, seed=s, lr=1e-3,
                                   scale=[.2, .8], ap50=.5 + s/100, curve=[[s, .1]], seconds=s, commit=arm), **more)
                         for d in ("birds", "cars") for s in range(3)])


# pairs


def test_pairs_are_run_by_run_in_any_order():
    a, b = side("scratch"), side("pretrain", ap50=.75).iloc[::-1]
    found = pairs(a, b)
    assert list(found.gain.round(6)) == [25., 24., 23.]*2 and list(found.id_a) == list(a.id)
    assert list(found.id_b) == [i.replace("scratch", "pretrain") for i in a.id]


def test_two_rows_for_one_pair_are_an_error_with_their_ids():
    b = side("pretrain")
    line = refused(pairs, side("scratch"), pd.concat([b, b.iloc[:1].assign(id="again")]))
    assert "pretrain-birds0 and again" in line and "domain=birds, n_real=20, fold=0, seed=0" in line


@pytest.mark.parametrize("cut", ["a", "b"])
def test_a_row_without_its_partner_is_an_error_with_its_id(cut):
    a, b = side("scratch"), side("pretrain")
    line = refused(pairs, a.iloc[1:] if cut == "a" else a, b.iloc[1:] if cut == "b" else b)
    assert ("pretrain-birds0" if cut == "a" else "scratch-birds0") in line and "no partner" in line


@pytest.mark.parametrize("column, value", [("lr", .1), ("torch", "3.0"), ("scale", [1, 1]), ("versions", {"data": 2})])
def test_a_pair_that_differs_in_another_setting_is_an_error_with_its_ids(column, value):
    b = side("pretrain")
    b[column] = [value]*len(b)
    line = refused(pairs, side("scratch"), b)
    assert "scratch-birds0 and pretrain-birds0" in line and column in line
    assert len(pairs(side("scratch"), b, differ=("arm", column))) == 6


def test_what_a_run_gave_may_differ():
    b = side("pretrain", curve=[], seconds=9, ap50=.9, ap_small=None, val_ap50=.1, boxes_spent=3, cpus=4, threads=1)
    assert len(pairs(side("scratch"), b)) == 6


def test_a_column_that_newer_code_added_parts_no_pair_unless_it_is_a_setting():
    assert len(pairs(side("scratch"), side("pretrain", data_test="abc", handed="[]"))) == 6
    assert "data_test ('x', 'abc')" in refused(pairs, side("scratch", data_test="x"), side("pretrain", data_test="abc"))
    assert "share (nothing, 0.1)" in refused(pairs, side("scratch"), side("pretrain", share=.1))


def test_no_number_equals_no_number():
    assert len(pairs(side("scratch", decay=None), side("pretrain", decay=float("nan")))) == 6


# one cell, one contrast


def test_a_cell_holds_all_dots_and_the_sample_deviation():
    found = cell([50., 52., 57.])
    assert found["dots"] == [50., 52., 57.] and found["n"] == 3 and found["mean"] == 53
    assert np.isclose(found["sd"], np.sqrt((9 + 1 + 16)/2))
    assert cell([3])["n"] == 1 and np.isnan(cell([3])["sd"])
    assert "no scores" in refused(cell, []) and "score 1 of 3 is no number" in refused(cell, [1, float("nan"), 2])


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_intervals_are_scipys(n):
    d = generator(n).normal(1, 3, n)
    found, theirs = contrast(d), stats.ttest_1samp(d, 0).confidence_interval()
    assert np.allclose((found["low"], found["high"]), (theirs.low, theirs.high)) and found["n"] == n
    assert np.isclose(found["sd"], d.std(ddof=1)) and np.isclose(found["mean"], d.mean())


@pytest.mark.parametrize("d", [[1.], [1., 2., 3.], [1., -2., 3.], [.1, .2, .3], [0., 0., 1.], [2., 2., -2., 2.],
                               [-1., -5.], list(range(-4, 8))])
def test_sign_flips_are_all_gone_through(d):
    every = [np.mean(np.array(s)*d) for s in itertools.product([-1, 1], repeat=len(d))]
    right = np.mean([abs(m) >= abs(np.mean(d)) - 1e-12 for m in every])
    assert sign_flip(d) == right
    if len(d) > 1:
        theirs = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=np.inf)
        assert np.isclose(sign_flip(d), theirs.pvalue)


def test_sign_flips_of_many_pairs_are_exact():
    n, k = 34, 5                                                        # k of n equal gains are negative: binomial
    assert np.isclose(sign_flip([1.]*(n - k) + [-1.]*k), 2*stats.binom.cdf(k, n, .5))
    assert "at most 40" in refused(sign_flip, [1.]*41)


# suites


A = dict(enumerate([[51.3, 63.0, 26.7, 54.1, 59.0], [48.7, 59.5, 47.8, 60.4, 50.9], [56.4, 43.0, 37.5, 48.7, 42.6],
                    [51.0, 37.3, 42.7, 63.7, 40.8], [44.6, 43.8, 44.6, 43.3, 45.4], [53.6, 50.4, 46.8, 53.5, 52.2]]))
B = dict(enumerate([[63.0, 65.7, 39.4, 69.1, 58.6], [53.7, 64.9, 57.7, 73.0, 58.9], [61.6, 52.9, 44.8, 56.5, 50.7],
                    [59.7, 50.8, 47.1, 63.7, 50.3], [51.7, 43.5, 57.9, 49.3, 45.5], [61.4, 64.0, 62.6, 62.8, 54.9]]))


def test_the_suite_is_rliables():
    "What rliable 1.2.0 gives of the same runs: aggregate_iqm, and get_interval_estimates with 50,000 draws."
    found = suite(B)
    assert np.isclose(found["iqm"], 57.025) and np.isclose(suite(A)["iqm"], 48.5375)
    assert np.isclose(suite({d: v[:3] for d, v in A.items()})["iqm"], 47.2), "18 values: quarters are rounded down"
    assert abs(found["low"] - 54.144) < .2 and abs(found["high"] - 59.688) < .2
    assert found["domains"] == 6 and found["n"] == 30


def test_the_probability_of_improvement_is_rliables():
    found = improvement(A, B)
    assert np.isclose(found["probability"], 0.8133333333333334)
    assert abs(found["low"] - .687) < .02 and abs(found["high"] - .92) < .02
    assert np.isclose(improvement(B, A)["probability"], 1 - found["probability"])
    assert "expected the same" in refused(improvement, A, {0: B[0]})


def test_equal_scores_are_half_an_improvement():
    assert improvement({"d": [1, 2]}, {"d": [2, 2, 0]})["probability"] == np.mean([1, .5, 1, .5, 0, 0])


def test_domains_weigh_the_same_whatever_their_runs():
    few, many = [0., 4.], [10., 10., 10., 10., 10., 10.]
    assert interquartile_mean([few, many]) == interquartile_mean([few*3, many])
    assert suite({"few": few, "many": many})["iqm"] != np.mean(sorted(few + many)[2:-2])


def test_a_bootstrap_draws_inside_its_domain():
    spread = suite({"low": [0., 0., 0.], "high": [100., 100., 100.]})
    assert spread["low"] == spread["high"] == spread["iqm"] == 50
    assert suite(A, repeats=200, seed=1) == suite(A, repeats=200, seed=1) != suite(A, repeats=200, seed=2)


# equivalence


@pytest.mark.parametrize("gains", [[.5, -.5, 1., -.2, .4], [4., 6., 5., 4.5, 7.], [6., -5., 3.],
                                   [-2., -2.5, -1.5, -2.2]])
def test_equivalence_is_two_one_sided_tests(gains):
    p = [stats.ttest_1samp(gains, v, alternative=side).pvalue for v, side in ((-MARGIN, "greater"), (MARGIN, "less"))]
    found, one = equivalence(gains), at_least(gains)
    assert np.isclose(found["p"], max(p)) and np.isclose(one["p"], p[0])
    assert found["holds"] == (max(p) < .05) == (found["low"] > -MARGIN and found["high"] < MARGIN)
    assert one["holds"] == (p[0] < .05) == (one["low"] > -MARGIN)


def test_the_margin_is_fixed():
    assert MARGIN == 3 and "points above 0" in refused(equivalence, [1, 2], 0)
    assert equivalence([1.])["holds"] is False and equivalence([1.])["low"] == -inf
    assert equivalence([0., 0., 0.])["holds"] is True and equivalence([3., 3., 3.])["holds"] is False


# one more run


def test_a_prediction_interval_is_the_textbooks():
    "Mean 10 and deviation 2 of 8 values: 10 -+ 2.3646*2*sqrt(1 + 1/8)."
    values = np.array([-1, 1, -1, 1, -1, 1, -1, 1])
    values = 10 + 2*values/values.std(ddof=1)
    found = prediction_interval(values)
    assert np.allclose((found["low"], found["high"]), 10 + 2.364624*2*np.sqrt(9/8)*np.array([-1, 1]))
    assert prediction_interval([5.])["high"] == inf == t_interval([5.])[1]


def test_a_prediction_interval_holds_one_more_run():
    g = generator(0, "more")
    inside = [p["low"] <= x <= p["high"]
              for p, x in ((prediction_interval(g.normal(0, 1, 4)), g.normal()) for _ in range(4000))]
    assert abs(np.mean(inside) - .95) < .015


# labels needed


def test_labels_are_interpolated_in_their_logarithm():
    need = labels_needed([10, 100, 1000], [[20, 40, 80]], [60])
    assert np.isclose(need["labels"], 10**2.5) and np.isclose(need["low"], need["high"])
    assert labels_needed([10, 100], [[20, 40]], [40])["labels"] == pytest.approx(100)
    assert labels_needed([10, 100], [[20, 40]], [41])["labels"] == inf
    assert labels_needed([10, 100], [[20, 40]], [1])["labels"] == 10
    assert labels_needed([10, 20, 40, 80], [[0, 50, 30, 90]], [50])["labels"] == pytest.approx(20), "the first time"


def test_the_bootstrap_of_labels_draws_whole_runs():
    labels, scores, goal = [10, 100], np.array([[0, 40], [0, 100.]]), [20, 50]
    found = labels_needed(labels, scores, goal)
    every = sorted(10**(1 + np.mean([goal[i], goal[j]])/np.mean([scores[i, 1], scores[j, 1]]))
                   for i, j in itertools.product(range(2), repeat=2))
    assert np.isclose(found["low"], every[0]) and np.isclose(found["high"], every[-1])
    apart = labels_needed(labels, scores, goal[::-1])
    assert apart["high"] == inf, "a run that does not reach its own goal"


def test_what_are_no_curves_is_said():
    assert "from 1 that ascend" in refused(labels_needed, [0, 10], [[1, 2]], [1])
    assert "from 1 that ascend" in refused(labels_needed, [10, 10], [[1, 2]], [1])
    assert "[1, 3] for 1 goals and 2 label counts" in refused(labels_needed, [10, 20], [[1, 2, 3]], [1])
    assert "is no number" in refused(labels_needed, [10, 20], [[1, None]], [1])


# verdicts


OURS = dict(low=75., high=85.)
UP, DOWN, BOTH, EDGE = (dict(low=l, high=h) for l, h in ((5, 11), (-11, -5), (-1, 9), (0, 9)))
NEAR, WIDE = dict(low=-1, high=2), dict(low=-4, high=2)


@pytest.mark.parametrize("gain, more, expected, why", [
    (None, dict(reason="no weights"), "not run", "no weights"),
    (None, dict(reason="no weights", paper=80, level=OURS), "not run", "no weights"),
    (DOWN, dict(paper=80, level=OURS), "contradicted", "-11.0 to -5.0"),
    (DOWN, dict(paper=80, level=OURS, surrogate=True), "contradicted", "-11.0 to -5.0"),
    (UP, dict(claim="less", paper=80, level=OURS), "contradicted", "+5.0 to +11.0"),
    (UP, dict(claim="equal"), "contradicted", "+5.0"), (DOWN, dict(claim="at_least"), "contradicted", "-5.0"),
    (BOTH, dict(paper=80, level=OURS), "inconclusive", "-1.0 to +9.0"),
    (EDGE, dict(paper=80, level=OURS), "inconclusive", "+0.0"), (BOTH, dict(surrogate=True), "inconclusive", "+9.0"),
    (WIDE, dict(claim="equal"), "inconclusive", "-4.0"), (WIDE, dict(claim="at_least"), "inconclusive", "-4.0"),
    (UP, dict(paper=90, level=OURS), "direction only", "the paper's 90.0 lies outside 75.0 to 85.0"),
    (UP, dict(paper=80, level=OURS, surrogate=True), "direction only", "surrogate data"),
    (UP, dict(level=OURS), "direction only", "no value of the paper"),
    (UP, dict(paper=80), "direction only", "no value"),
    (NEAR, dict(claim="equal", surrogate=True), "direction only", "surrogate data"),
    (UP, dict(paper=80, level=OURS), "reproduced", "+5.0 to +11.0"),
    (UP, dict(paper=75, level=OURS), "reproduced", ""),
    (DOWN, dict(claim="less", paper=80, level=OURS), "reproduced", ""),
    (NEAR, dict(claim="equal", paper=80, level=OURS), "reproduced", ""),
    (NEAR, dict(claim="at_least", paper=80, level=OURS), "reproduced", ""),
    (UP, dict(claim="at_least", paper=80, level=OURS), "reproduced", ""),
])
def test_the_verdict(gain, more, expected, why):
    found = verdict(gain, **more)
    assert found["verdict"] == expected and why in found["why"]
    for p in (0., .25, 1.):
        if gain: assert verdict(dict(gain, p=p), **more) == found, "a p decides nothing"


def test_one_run_decides_nothing():
    assert verdict(contrast([30.]), paper=80, level=prediction_interval([80.]))["verdict"] == "inconclusive"
    for claim, test in (("equal", equivalence), ("at_least", at_least)):
        assert verdict(test([0.]), claim)["verdict"] == "inconclusive"


def test_what_is_no_claim_is_said():
    assert "expected the reason" in refused(verdict, None)
    assert "choose from more, less, at_least, equal" in refused(verdict, UP, "better") and len(CLAIMS) == 4


@pytest.mark.parametrize("gains, expected", [
    (dict(butterflies=[4, 5, 6]), "inconclusive"), (dict(butterflies=[4, 5, 6], birds=[3, 4, 5]), "contradicted"),
    (dict(butterflies=[4, 5, 6], birds=[-4, -5, -6]), "direction only"),
    (dict(butterflies=[4, 5, 6], birds=[-9, 1, 9]), "inconclusive")])
def test_that_a_sign_depends_on_the_domain_takes_two_domains(gains, expected):
    assert depending({d: {"8x": v} for d, v in gains.items()}) == expected


def of_runs(dots): return dict(dots=dots, runs_a=[50]*len(dots), runs_b=[50 + d for d in dots])


def depending(gains):
    "The verdict of C4 on gains by domain and number of synthesised images."
    lines = [dict(domain=d, n_fake=n, a=50., b=50., seeds=range(3), **of_runs(dots), **contrast(np.array(dots)))
             for d, some in gains.items() for n, dots in some.items()]
    return claims.whole(claims.CLAIMS["C4"], pd.DataFrame(lines))["verdict"]


def test_it_is_the_domain_that_a_sign_depends_on():
    up, down = [4, 5, 6], [-4, -5, -6]
    birds = {"1x": down, "8x": up}
    assert depending(dict(birds=birds, cars={"1x": down, "8x": up})) == "inconclusive", "it depends on the number"
    assert depending(dict(birds=birds, cars={"1x": up, "8x": up})) == "direction only"


def test_a_whole_claim_is_of_runs_not_of_places():
    line = dict(a=50., b=60., paper_b=np.nan, verdict="direction only", why="")
    lines = [dict(line, domain="birds", n_real=n, seeds=[0, 1, 2], **of_runs(dots))
             for n, dots in ((20, [4, 8, 9]), (100, [6, 10, 11]))]
    found = claims.whole(claims.CLAIMS["C8"], pd.DataFrame(lines))
    assert found["n"] == 3 and (found["low"], found["high"]) == pytest.approx(t_interval([5, 9, 10]))


@pytest.mark.parametrize("protocol, expected", [("quick", "direction only"), ("paper", "reproduced")])
def test_the_papers_own_protocol_can_reproduce_it(protocol, expected):
    known = [claims._paper_mean(claims.CLAIMS["C1"], side, dict(domain="birds")) for side in (0, 1)]
    rows = pd.DataFrame([dict(id=f"{a}{s}", arm=a, domain="birds", n_real=20, seed=s, protocol=protocol,
                              ap50=(m + s)/100, versions=1)
                         for a, m in zip(("scratch", "pretrain"), known) for s in range(3)])
    found = claims.findings(claims.CLAIMS["C1"], rows)
    assert found.verdict[0] == expected and claims.whole(claims.CLAIMS["C1"], found)["verdict"] == expected


def test_the_mean_over_domains_is_welchs_of_two():
    a, b = generator(3, "a").normal(0, 1, 5), generator(3, "b").normal(0, 4, 3)
    low, high = stats.ttest_ind(a, -b, equal_var=False).confidence_interval()
    found = overall(dict(a=a, b=b))
    assert (found["low"], found["high"]) == pytest.approx((low/2, high/2)) and found["n"] == 8
    assert (overall(dict(a=a))["low"], overall(dict(a=a))["high"]) == pytest.approx(t_interval(a))
    assert overall(dict(a=a, b=[3]))["high"] == inf
