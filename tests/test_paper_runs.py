"The paper's domains through an experiment: each from its drawn tree to a row."
import json
from pathlib import Path

import numpy as np
import pytest
from execnb.shell import CaptureShell

from synthdet.core import refused
from synthdet.files import read_jsonl
from synthdet.data.domains import load_domain
from synthdet.data.fixtures import make_fixture, TREES
from synthdet.data.labels import taken
from synthdet.evidence.arm import make_arms
from synthdet.evidence.phases import run

ROOT = Path(__file__).parents[1]
FEW = dict(steps=2, pretrain_steps=2, eval_every=2, batch_size=2, backbone='mobilenetv1_025')
FEW['model.image_size'] = 64


def test_scratch_needs_neither_class_images_nor_backgrounds(tmp_path):
    root = make_fixture('cars', tmp_path/'tree')
    for k in ('lsun_cars', 'INRIAPerson', 'VOCdevkit'): (root/k).rename(tmp_path/k)
    scratch, pretrain = make_arms('scratch,pretrain', domain='cars', root=str(root), n_real=4, **FEW)
    row = run(scratch, tmp_path/'out')
    assert row['class_images_from'] == '' and row['settings']['data']['root'] == 'tree'
    assert str(tmp_path) not in json.dumps(row), 'no path of this machine'
    assert "has no backgrounds for 'cars'" in refused(run, pretrain, tmp_path/'out')


def test_labels_of_the_protocols(drawn):
    "Released: one permutation for all runs, and the first of the list where a finite set of images is synthesised."
    arms, train = dict(domain='birds', root=str(drawn), n_real=5), load_domain('birds', drawn).train
    order = np.random.RandomState(2020).permutation(len(train))
    released, = make_arms('pretrain', protocol='released', **arms)
    assert taken(released.labels, train)[0].indices == order[:5].tolist()
    few, = make_arms('pretrain', protocol='released', n_fake=40, **arms)
    assert taken(few.labels, train)[0].indices == [0, 1, 2, 3, 4]
    fold, = make_arms('pretrain', protocol='released', fold=1, **arms)
    assert 'leave fold 0 and change the seed' in refused(taken, fold.labels, train)


@pytest.mark.slow
@pytest.mark.parametrize('domain', TREES)
def test_run_experiment(drawn, tmp_path, domain):
    "Every cell of the notebook, in this process."
    protocol, codes = 'released' if domain == 'birds' else 'paper', domain == 'qrcodes'
    values = dict(FEW, domain=domain, root=str(drawn), arms='scratch,pretrain', out=str(tmp_path), n_real=6,
                  protocol=protocol, objects='real', segmenter='alpha' if codes else 'frame', weights='none')
    values |= {'val': 'budget'} if domain == 'cars' else {'options': 'n_class_images=24'} if codes else {}
    own = {k: v for k, v in values.items() if k.isidentifier()}
    more = ' '.join(f'{k}={v}' for k, v in values.items() if not k.isidentifier())
    nb, shell = json.loads((ROOT/'nbs'/'experiments'/'run_experiment.ipynb').read_text()), CaptureShell()
    for c in nb['cells']:
        if c['cell_type'] != 'code': continue
        parameters = 'parameters' in c['metadata'].get('tags', ())
        injected = f'\nglobals().update({dict(own, more=more)!r})' if parameters else ''
        shell.run(''.join(c['source']) + injected)
        assert not shell.exc, shell.exc
    rows = read_jsonl(tmp_path/'results.jsonl')
    assert sorted(row['arm'] for row in rows) == ['pretrain', 'scratch'] and all(0 <= row['ap50'] <= 1 for row in rows)
    assert rows[0]['labels'] == rows[1]['labels'] and str(drawn) not in json.dumps(rows)
    data = rows[0]['settings']['data']
    assert data['backgrounds'] == ('released' if domain == 'birds' else 'inria')
