"What was published, against the reference that lies beside the project, and values copied from the paper by hand."
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from synthdet.core import refused
from synthdet.machine import shared
from synthdet.evidence.published import published, released_curves, released_runs, TABLES

REFERENCE = (shared() or Path("none"))/"reference"
beside = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no shared/reference beside the project")


def one(table, by="paper", **where):
    "The only line of a table with these values."
    found = published(table, by)
    for column, value in where.items(): found = found[found[column] == value]
    assert len(found) == 1
    return found.iloc[0]


@pytest.mark.parametrize("table, where, mean, printed", [
    ("table1", dict(domain="birds", arm="scratch", n_real=1000), 41.08, .89),
    ("table1", dict(domain="cars", arm="pretrain_only"), 41.18, 2.22),
    ("table2", dict(domain="birds", arm="mixed", n_fake=8000), 82.40, 1.26),
    ("table2", dict(domain="faces", arm="pretrain", n_fake=0), 80.42, .69),
    ("table3", dict(domain="faces", source="real"), 79.51, .63),
    ("table4", dict(domain="cars", segmenter="frame"), 62.16, 1.23)])
def test_the_papers_numbers(table, where, mean, printed):
    line = one(table, **where)
    assert (line["mean"], line.printed_sd, line.n) == (mean, printed, 3)
    assert np.isclose(line.sd, printed*np.sqrt(1.5)), "of a population of three into a sample's"


def test_single_runs_and_what_was_not_printed_have_no_deviation():
    assert published("table5").sd.isna().all() and set(published("table5").n) == {1}
    assert np.isnan(one("table4", domain="faces", arm="scratch").sd)
    assert one("table5", arm="pretrain", n_real=100, score="hard")["mean"] == 43.19


@pytest.mark.parametrize("table", TABLES)
def test_every_cell_is_there_once_and_in_points(table):
    for source in ("paper", "released") if table != "table5" else ("paper",):
        found = published(table, source)
        assert not found.duplicated(["domain", "arm", "source", "segmenter", "n_real", "n_fake", "score"]).any()
        assert found["mean"].between(20 if table == "table5" else 1, 100).all() and (found["mean"].max() > 70)


def test_sources_are_never_in_one_table():
    paper, released = published("table1"), published("table1", "released")
    both = paper.merge(released, on=["domain", "arm", "n_real"])
    assert len(both) and not (both.mean_x.round(2) == both.mean_y.round(2)).any()
    assert "source 'both' is unknown; choose from paper, released" in refused(published, "table1", "both")
    assert "choose from table1" in refused(published, "table9")
    assert "no runs of table5" in refused(published, "table5", "released")
    assert "backbone 'vgg' is unknown" in refused(published, "table1", "released", backbone="vgg")


def test_an_endless_stream_is_no_line_of_the_released_finite_ones():
    assert (published("table2", "released").n_fake > 0).all() and (published("table2").n_fake == 0).any()


@beside
def test_all_of_the_papers_tables_are_the_references():
    tables = json.loads((REFERENCE/"paper_tables.json").read_text())
    names = dict(table_I=dict(without_pretraining="scratch", with_pretraining="pretrain"),
                 table_II=dict(mixed="mixed", pretrain_finetune="pretrain"))
    for table, of in (("table1", "table_I"), ("table2", "table_II")):
        for row in tables[of]["rows"]:
            for column, arm in names[of].items():
                if row[column] is None: continue
                where = dict(domain=row["domain"], n_real=row["n_real"], arm=arm if row["n_real"] else "pretrain_only")
                if of == "table_II": where["n_fake"] = 0 if row["n_fake"] == "inf" else row["n_fake"]
                line = one(table, **where)
                assert (line["mean"], line.printed_sd) == (row[column]["mean"], row[column]["std"])
    names = dict(table_III=dict(real_cls_images=dict(source="real"), gan_images=dict(source="gan")),
                 table_IV=dict(without_pretrain=dict(arm="scratch"), redo=dict(segmenter="redo"),
                               naive_pasting=dict(segmenter="frame")))
    for table, of in (("table3", "table_III"), ("table4", "table_IV")):
        for row in tables[of]["rows"]:
            for column, values in names[of].items():
                line = one(table, domain=row["domain"], n_real=row["n_real"], **values)
                assert line["mean"] == row[column]["mean"]
                assert line.printed_sd == row[column]["std"] or row[column]["std"] is None and np.isnan(line.printed_sd)
    for row in tables["table_V"]["rows"]:
        arm = {"without_pretraining": "scratch", "with_pretraining": "pretrain"}[row["method"]]
        for score in ("easy", "medium", "hard"):
            n = row["n_real"] if row["n_real"] != "all" else 12880
            assert one("table5", arm=arm, n_real=n, score=score)["mean"] == row[score]


@beside
def test_released_runs_are_the_references():
    theirs, ours = pd.read_csv(REFERENCE/"authors_runs.csv"), released_runs()
    assert len(theirs) == len(ours) and np.allclose(theirs.map50, ours.ap50, atol=5e-7)
    assert (theirs.domain == ours.domain).all() and (theirs.n_real == ours.n_real).all()
    assert (theirs.run == ours.run).all()


@beside
def test_released_curves_are_the_references():
    theirs, ours = pd.read_csv(REFERENCE/"authors_histories.csv.gz"), released_curves()
    theirs = theirs[(theirs.architecture == "SSDMobileNet") & (theirs.experiment == "main") & (theirs.n_real == 100)]
    for run in ours.itertuples():
        method = dict(pretrain="finetuned", scratch="from_scratch")[run.arm]
        right = theirs[(theirs.domain == run.domain) & (theirs.method == method) & (theirs.run == run.run)]
        assert np.allclose(run.curve, right[["step", "val_map50"]], atol=5e-7)


@beside
def test_deviations_of_released_runs_are_the_samples():
    rows = json.loads((REFERENCE/"paper_tables.json").read_text())["released_vs_paper"]
    arms = {"pretrain only": "pretrain_only", "without pretraining": "scratch", "with pretraining": "pretrain"}
    compared = [r for r in rows if r["table"] == "I" and r["released_mobilenet"]]
    for r in compared:
        line = one("table1", "released", domain=r["domain"], n_real=r["n_real"], arm=arms[r["quantity"]])
        right = r["released_mobilenet"]
        assert abs(line["mean"] - right["mean"]) < .006 and abs(line.sd - right["std_sample"]) < .006 and line.n == 3
    assert len(compared) > 10
