"The page about a model: what it says is true, nothing in it runs that is not its own, nothing is requested"

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.basics import SGD, DataLoaders, L, Learner
from helpers import equal
from processes import python
from torch import nn

pytest.importorskip('plotly', reason='reports need plotly')
from fastprune.all import SparsifyCallback, Ticket, Tickets, compute_masks, linear, prunable_weights
from fastprune.core.sparse_files import save_sparse
from fastprune.deploy import inference, page_masks
from fastprune.deploy import report_file as rep
from fastprune.deploy.graph_choice import GraphCandidate
from fastprune.deploy.weight_file import read_weights
from fastprune.zoo.make import make_model

browser = next((p for n in ('chromium', 'chromium-browser', 'google-chrome') if (p := shutil.which(n))), None)
evil = '<script>document·title=1</script><img src=x onerror="alert(1)">&\'"{{}} %{x} $a$'


class Page(HTMLParser):
    "What a browser would make of a file: elements with attributes, text by element, rows of tables"

    void = {'meta', 'img', 'br'}

    def __init__(self, path):
        super().__init__()
        self.tags, self.open, self.text, self.rows, self.figures, self.scripts = [], [], [], [], [], 0
        self.feed(Path(path).read_text(encoding='utf-8'))
        assert not self.open, 'elements are left open'

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == 'tr':
            self.rows.append([])
        if tag in ('td', 'th'):
            self.rows[-1].append('')
        if tag not in self.void:
            self.open.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attrs = self.open[-1] if self.open else (None, {})
        if attrs.get('type') == 'application/json':
            self.figures.append(json.loads(data))
        elif tag == 'script':
            self.scripts += 1
        elif tag != 'style':
            self.text.append(data)
            if any(t in ('td', 'th') for t, _ in self.open):
                self.rows[-1][-1] += data

    @property
    def words(self):
        return ' '.join(self.text)

    def row(self, name):
        return next(r for r in self.rows if r and r[0] == name)


def check(page):
    "Self-contained: its two scripts alone may run, and nothing is loaded"
    policy = next(a['content'] for t, a in page.tags if a.get('http-equiv') == 'Content-Security-Policy')
    nonce = re.search(r"script-src 'nonce-([^']+)'", policy)[1]
    assert "default-src 'none'" in policy and 'http' not in policy
    assert (
        page.scripts == 2
        and [a.get('nonce') for t, a in page.tags if t == 'script' and a.get('type') != 'application/json']
        == [nonce] * 2
    )
    assert not {t for t, _ in page.tags} & {'link', 'iframe', 'object', 'embed', 'base', 'form', 'a'}
    for t, a in page.tags:
        assert not any(k.startswith('on') for k in a), (t, a)
        for k in ('src', 'href', 'srcset', 'action', 'data'):
            assert a.get(k, 'data:').startswith('data:'), (t, a)
    return page


def browse(path, *flags, size='1200,900'):
    "A file in a browser that can reach nothing: its elements after the scripts, its messages, and what it asked for"
    log = path.with_suffix('.net')
    off = 'background-networking component-update sync default-apps extensions domain-reliability'
    off = f'{off} client-side-phishing-detection'.split()
    quiet = [*(f'--disable-{o}' for o in off), '--no-first-run', '--metrics-recording-only']
    r = subprocess.run(
        [
            browser,
            '--headless',
            '--no-sandbox',
            '--disable-gpu',
            *quiet,
            '--host-resolver-rules=MAP * ~NOTFOUND',
            f'--log-net-log={log}',
            '--enable-logging=stderr',
            '--v=0',
            f'--user-data-dir={path.with_suffix(".profile")}',
            '--virtual-time-budget=8000',
            f'--window-size={size}',
            *flags,
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    console = [o for o in r.stderr.splitlines() if 'CONSOLE' in o]
    own = [
        o for o in log.read_text().splitlines() if '"initiator":' in o and '"initiator":"not an origin"' not in o
    ]  # not the browser's own
    return r.stdout, console, {re.search(r'"url":"([^"]*)"', o)[1] for o in own}


def names(model):
    return list(prunable_weights(model))


@pytest.fixture
def trained(learner, fit):
    cb = SparsifyCallback(0.8, interval=3)
    return fit(learner(opt_func=SGD), 3, 0.02, cbs=cb), cb


def test_numbers_are_those_of_the_learner(trained, tmp_path):
    learn, cb = trained
    state, masks, rng = {n: t.clone() for n, t in learn.model.state_dict().items()}, learn.masks, torch.get_rng_state()
    path = learn.report(tmp_path / 'new' / 'r.html', callback=cb, seconds=0.3)
    assert path == tmp_path / 'new' / 'r.html' and [p.name for p in path.parent.iterdir()] == ['r.html']
    assert (
        all(equal(t, state[n]) for n, t in learn.model.state_dict().items())
        and learn.masks == masks
        and torch.equal(rng, torch.get_rng_state())
    )
    page, report, flops = check(Page(path)), learn.sparsity_report(), learn.flops().loc['total']
    for n, row in report.iterrows():
        got = page.row(n)
        kept = round(row.weights * (1 - row.sparsity))
        assert got[1:4] == [row['shape'], f'{row.weights:,}', f'{kept:,}'] and float(got[4][:-1]) == pytest.approx(
            100 * row.sparsity, abs=0.01
        )
    learn.save_sparse(tmp_path / 's')
    torch.save(learn.model.state_dict(), tmp_path / 'dense')  # the name is in the file, too
    for p, before in (('s', ''), ('dense', 'dense ')):
        assert f'{before}{os.path.getsize(tmp_path / p) / 1e6:.3g} MB' in page.words
    assert f'{flops.dense / flops.nonzero:.3g} times fewer' in page.words
    assert re.search(r'batch of 1x1x8x8 on .+, \d+ threads?, torch', page.words) and page.row('name')[5:] == [
        'form',
        'dense ms',
        'ms',
        'why',
    ]
    bars = {t['name']: t for t in page.figures[0]['data']}
    assert (
        bars['kept']['y'] == [int(m.count_nonzero()) for m in masks.values()]
        and bars['weights']['y'] == report.weights[:-1].tolist()
        and len(bars['sparse ms']['y']) == len(masks)
    )
    charts = {f['layout']['title']['text']: f['data'] for f in page.figures[1:]}
    assert list(charts) == ['loss', 'accuracy', 'sparsity: ocp', 'learning rate']
    assert charts['accuracy'][0]['y'] == pytest.approx([v[2] for v in learn.recorder.values]) and charts['accuracy'][0][
        'x'
    ] == [1, 2, 3]
    for t, ys in zip(charts['sparsity: ocp'], (cb.asked, cb.reached), strict=True):
        assert t['y'] == ys and t['x'][-1] == pytest.approx(3)
    assert charts['learning rate'][0]['y'] == pytest.approx(learn.recorder.lrs)
    assert (
        page.row('epoch')[1:] == ['train_loss', 'valid_loss', 'accuracy', 'sparsity']
        and page.row('3')[-1] == f'{100 * cb.reached[-1]:.4g}%'
    )
    n = path.stat().st_size
    assert (
        f'one file of {n / 1e6:.1f} MB' in page.words
        or abs(n / 1e6 - float(re.search(r'one file of ([\d.]+) MB', page.words)[1])) < 0.06
    )


def test_what_is_not_there_is_left_out(learner, tmp_path):
    "A Learner that was never trained or pruned, one without data, a DataLoader of torch's"
    page = check(Page(learner().report(tmp_path / 'a.html', seconds=0)))
    assert (
        [d for t, d in pairwise(page.text) if t == 'latency'] == ['–']
        and 'seconds=0' in page.words
        and len(page.figures) == 1
    )
    assert not {'Training', 'Masks', 'Tickets', 'Paths'} & set(page.text)
    bare = Learner(DataLoaders([], []), nn.Linear(4, 3), loss_func=nn.MSELoss())
    page = check(Page(bare.report(tmp_path / 'b.html')))
    assert page.words.count('the training DataLoader has no batches') == 2 and page.row('weight')[2] == '12'
    ds = [(torch.randn(4), torch.randn(5), torch.zeros(3)) for _ in range(8)]
    dl = torch.utils.data.DataLoader(ds, batch_size=4)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(5, 3)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    page = check(
        Page(Learner(DataLoaders(dl, dl), Two(), loss_func=nn.MSELoss()).report(tmp_path / 'c.html', seconds=0.1, bs=3))
    )
    assert 'batch of 3x4, 3x5 on' in page.words


def test_after_validate_there_is_no_curve(trained, tmp_path):
    "fastai forgets the fit when it validates"
    learn, _ = trained
    with learn.no_bar():
        learn.validate()
    assert 'Training' not in Page(learn.report(tmp_path / 'a.html', seconds=0)).text


class Odd(nn.Module):
    "Tied, transposed, grouped and recurrent layers, one that is empty, one kept dense"

    def __init__(self):
        super().__init__()
        self.up, self.groups = nn.ConvTranspose2d(1, 4, (2, 3)), nn.Conv2d(4, 4, 3, groups=4)
        self.rnn, self.a, self.b, self.none = nn.LSTM(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(0, 3)
        self.b.weight = self.a.weight
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.groups(self.up(x)).mean(1).flatten(1)[:, :8]
        return self.head(self.b(self.a(self.rnn(x[None])[0][0])))


def test_odd_layers(learner, tmp_path):
    learn = learner(Odd())
    learn.prune({'up': 0.5, 'groups': 0.9, 'rnn': 0.5, 'a': 0.5})
    with torch.no_grad():
        learn.model.head.weight.zero_()
    path = learn.report(tmp_path / 'a.html', seconds=0.1)
    page = check(Page(path))
    assert (
        [r[0] for r in page.rows[1:-1]] == names(learn.model)
        and page.row('head.weight')[3] == '0'
        and ('mark', {}) in page.tags
    )
    assert page.row('none.weight')[2:4] == ['0', '0']
    with_time = [r[0] for r in page.rows if r[0].startswith('rnn') and r[7] not in ('', '–')]
    assert len(with_time) <= 1  # a module's time, once
    alts = [a['alt'] for t, a in page.tags if t == 'img']
    assert 'mask of up.weight' in alts and 'mask of none.weight' not in alts


@pytest.mark.parametrize(
    'shape',
    [
        (5,),
        (1, 1),
        (4, 7),
        (300, 3),
        (1, 900),
        (64, 3, 7, 7),
        (2, 3, 5),
        (96, 1, 3, 3),
        (3, 2, 2, 3, 4),
        (7, 500, 1, 1),
        (3, 333, 1, 3),
    ],
    ids=str,
)
def test_every_weight_is_a_pixel(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    x, what = page_masks.mask_pixels(mask)
    assert (x == 1).sum() == mask.sum() and (x == 0).sum() == (~mask).sum() and set(np.unique(x)) <= {0, 1, 2}
    assert x.shape[1] <= 340 and not (x[0] == 2).all() and not (x[-1] == 2).all()
    if shape == (4, 7):
        assert equal(torch.from_numpy(x).bool(), mask) and what == 'outputs down, inputs across'
    if shape == (64, 3, 7, 7):
        assert (
            (x[:7, 8:15] == mask[1, 0].cpu().numpy()).all()
            and (x[8:15, :7] == mask[0, 1].cpu().numpy()).all()
            and 'kernels of 7x7, inputs down' in what
        )


def test_few_and_small_pictures(learner, tmp_path):
    from PIL import Image

    learn = learner(
        nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(9)], nn.Linear(64, 400), nn.Linear(400, 10))
    )
    learn.prune(0.5)
    pages = {k: check(Page(learn.report(tmp_path / f'{k}.html', seconds=0, pictures=k))) for k in (0, 4, 99)}
    images = {k: [a for t, a in p.tags if t == 'img'] for k, p in pages.items()}
    assert {k: len(v) for k, v in images.items()} == {0: 0, 4: 4, 99: 10} and '10 of 11 layers' in pages[
        99
    ].words  # 25,600 weights are too many
    x = np.array(Image.open(io.BytesIO(base64.b64decode(images[4][0]['src'].split(',')[1]))).convert('RGB'))
    assert x.shape == (64, 64, 3) and ((x[..., 0] < 100) == learn.masks['1.weight'].cpu().numpy()).all()


def test_tickets_and_paths(learner, fit, tmp_path):
    import matplotlib.pyplot as plt

    learn = learner(opt_func=SGD)
    train = lambda learn, cbs: fit(learn, 1, 0.02, cbs=cbs)
    with learn.no_bar(), learn.no_logging():
        tickets = learn.find_tickets(2, train)
        path = learn.linear_path(tickets[0], tickets[1], n=3)
    before = plt.get_fignums()
    page = check(
        Page(
            learn.report(tmp_path / 'a.html', tickets={evil: tickets, 'again': tickets}, paths=[path, path], seconds=0)
        )
    )
    assert plt.get_fignums() == before and evil in page.text
    assert len([r for r in page.rows if r[:1] == ['round']]) == 2 and [
        r for r in page.rows if 'barrier' in ' '.join(r)
    ][0][2:4] == ['loss barrier', 'error barrier']
    assert (
        any(r[0] == '2' and r[2:3] == [f'{path.barrier.loss:.4g}'] for r in page.rows if r)
        and sum(a.get('alt', '').startswith(('tickets', 'path')) for t, a in page.tags) == 4
    )
    untrained = Tickets([Ticket(learn.model.state_dict(), tickets[0].masks)])
    assert 'Tickets' in Page(learn.report(tmp_path / 'b.html', tickets=untrained, seconds=0)).text


@pytest.mark.parametrize(
    'args,message',
    [
        (dict(path='.'), 'is a folder'),
        (dict(bs=0), 'bs=0'),
        (dict(bs=1.5), 'bs=1.5'),
        (dict(seconds=-1), 'seconds=-1'),
        (dict(seconds=float('nan')), 'seconds=nan'),
        (dict(pictures=-1), 'pictures=-1'),
        (dict(tickets=Tickets()), 'tickets: there are none'),
        (dict(tickets=3), 'tickets=int'),
        (dict(paths='p'), 'paths=str'),
        (dict(paths=[1]), 'paths=list'),
        (dict(callback=3), 'callback=int'),
    ],
)
def test_wrong_arguments(learner, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        learner().report(**args)
    assert not list(tmp_path.iterdir())


def test_written_whole_or_not_at_all(learner, tmp_path, monkeypatch):
    path = tmp_path / 'a.html'
    path.write_text('before')

    def full(self, text, **kwargs):
        with open(self, 'w') as f:
            f.write(text[:1000])
        raise OSError('no space')

    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(OSError):
        learner().report(path, seconds=0)
    assert path.read_bytes() == b'before' and len(list(tmp_path.iterdir())) == 1


def test_without_plotly(learner, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'plotly.offline', None)
    with pytest.raises(ImportError, match=r"pip install 'fastprune\[report\]'"):
        learner().report(tmp_path / 'a.html')
    assert not list(tmp_path.iterdir())


@pytest.fixture
def hostile(learner, tmp_path, fit):
    "A page whose every name means harm"
    body = nn.Sequential()
    kind = type(evil, (nn.Linear,), {})
    for i in range(3):
        body.add_module(f'{evil}{i}', kind(64, 64) if i else nn.Flatten())
    body.add_module('</script><script>alert(1)</script>', kind(64, 10))

    def metric(pred, y):
        return (pred.argmax(1) == y).float().mean()

    metric.__name__ = evil
    learn = learner(body, metrics=metric)
    return fit(learn, 1, cbs=SparsifyCallback(0.5, schedule=linear)).report(
        tmp_path / 'evil.html', seconds=0.1, title=evil
    )


def test_hostile_names(hostile):
    page = check(Page(hostile))
    assert (
        page.text.count(evil) >= 2
        and page.row(f'{evil}1.weight')[2] == '4,096'
        and '</script><script>alert(1)</script>.weight' in page.words
    )
    ticks = page.figures[0]['data'][0]['x']
    assert len(set(ticks)) == 3 and not any('<' in o for o in ticks)  # plotly takes some HTML, too


browsed = pytest.mark.skipif(browser is None, reason='there is no chromium or google-chrome to look at pages with')


@browsed
@pytest.mark.parametrize('n', [5, pytest.param(160, marks=pytest.mark.slow)])
def test_in_a_browser(learner, fit, tmp_path, monkeypatch, n):
    monkeypatch.setattr(
        inference, 'graph_candidate', lambda *args: GraphCandidate()
    )  # so layers have times of their own
    learn = learner(nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64) for _ in range(n - 1)], nn.Linear(64, 10)))
    fit(learn, 2, cbs=SparsifyCallback(0.5))
    dom, console, asked = browse(learn.report(tmp_path / 'a.html', seconds=0.1), '--dump-dom')
    assert not console, console
    assert all(u.startswith(('file:', 'data:', 'blob:')) for u in asked), asked
    first = dom[dom.index('class="chart js-plotly-plot"') : dom.index('<table')]
    traces = re.split(r'<g class="trace bars"', first)[1:]
    assert (
        [t.count('<g class="point">') for t in traces] == [n] * 3
        and first.count('<path class="point"') == 2 * n
        and first.count('class="main-svg"') >= 1
    )
    assert dom.count('class="chart js-plotly-plot"') == 5  # layers, loss, accuracy, sparsity, learning rate


@browsed
def test_hostile_names_in_a_browser(hostile):
    dom, console, asked = browse(hostile, '--dump-dom')
    assert not console, console
    assert (
        dom.count('<script nonce') == 2
        and '<script>' not in dom.replace('&lt;script>', '')
        and 'onerror="' not in re.sub(r'&lt;img[^<]*', '', dom)
    )
    assert not [u for u in asked if not u.startswith('file:')] and 'js-plotly-plot' in dom


@browsed
def test_the_policy_stops_what_escaping_would_miss(learner, tmp_path):
    "And without it the test would see the request"
    page = learner().report(tmp_path / 'a.html', seconds=0).read_text()
    evil = page.replace(
        '<footer>', '<script>document.title="hacked"</script><img src="http://example.com/x.png"><footer>'
    )
    (tmp_path / 'b.html').write_text(evil)
    (tmp_path / 'c.html').write_text(evil.replace('Content-Security-Policy', 'nothing'))
    seen = {}
    for name in 'bc':
        dom, console, asked = browse(tmp_path / f'{name}.html', '--dump-dom')
        seen[name] = '<title>hacked</title>' in dom, any('example.com/x.png' in u for u in asked)
        assert name == 'c' or 'js-plotly-plot' in dom and console  # the policy says what it stopped
    assert seen == {'b': (False, False), 'c': (True, True)}


def kinds(state, folder):
    "The same state in every kind of file"
    opt = {'state': [{'avg': torch.ones(2), 'step': np.float64(3)}], 'hypers': L([{'lr': np.float64(0.1)}])}
    from safetensors.torch import save_file

    torch.save(state, folder / 'plain.pth')
    torch.save({'model': state, 'opt': opt}, folder / 'fastai.pth')
    torch.save({'state_dict': state, 'epoch': 3}, folder / 'timm.pth')
    torch.save(state, folder / 'legacy.pth', _use_new_zipfile_serialization=False)
    save_sparse(state, folder / 'small.safetensors')
    save_file(state, folder / 'plain.safetensors', metadata={'format': 'pt'})
    return sorted(p for p in folder.iterdir())


def test_every_kind_of_file(learner, fit, tmp_path):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.9))
    (tmp_path / 'in').mkdir()
    files = [*kinds(learn.model.state_dict(), tmp_path / 'in'), learn.save(tmp_path / 'in' / 'with_opt')]
    want = learn.sparsity_report()
    for file in files:
        page = check(Page(rep.report_file(file, out=tmp_path / 'out.html', pictures=1)))
        assert {n: page.row(n)[2:4] for n in want.index} == {
            n: [f'{r.weights:,}', f'{r.nonzero:,}'] for n, r in want.iterrows()
        }, file
        assert page.words.count('Name it by --arch') == 2 and 'form' not in page.row('name') and file.name in page.text


def test_masks_in_a_file_count(learner, tmp_path):
    "A kept weight that is 0 stays kept"
    learn = learner()
    learn.prune(0.9)
    n, m = next(iter(learn.masks.items()))
    dict(learn.model.named_parameters())[n].data.zero_()
    learn.save_sparse(tmp_path / 'a')
    assert Page(rep.report_file(tmp_path / 'a', out=tmp_path / 'b')).row(n)[3] == str(int(m.count_nonzero()))


class Bomb:
    def __reduce__(self):
        return os.system, ('touch bombed',)


@pytest.mark.parametrize(
    'what',
    [
        {'a': Bomb()},
        {'model': {'a': torch.ones(2, 2)}, 'opt': Bomb()},
        Bomb(),
        nn.Linear(2, 2),
        [torch.ones(2, 2)],
        torch.ones(2, 2),
        {},
        {'a': 3},
        {3: torch.ones(2, 2)},
        {'a': torch.ones(3)},
        {'a': torch.eye(3).to_sparse()},
        {'a': torch.ones(2, 2, device='meta')},
    ],
    ids=lambda o: type(o).__name__,
)
@pytest.mark.parametrize('legacy', [False, True])
def test_files_of_something_else(tmp_path, monkeypatch, what, legacy):
    monkeypatch.chdir(tmp_path)
    torch.save(what, 'a.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match='a.pth'):
        rep.report_file('a.pth')
    assert [p.name for p in tmp_path.iterdir()] == ['a.pth']


def test_damaged_files_are_one_error(learner, tmp_path):
    import random

    rng, state = random.Random(0), learner().model.state_dict()
    (tmp_path / 'in').mkdir()
    for file in kinds(state, tmp_path / 'in'):
        good = file.read_bytes()
        for _ in range(60):
            bad = bytearray(good[: rng.choice([len(good), rng.randrange(len(good))])])
            for _ in range(rng.randrange(4)):
                if bad:
                    bad[rng.randrange(min(len(bad), rng.choice([200, len(bad)])))] = rng.randrange(256)
            file.write_bytes(bad)
            try:
                read_weights(file)
            except ValueError as e:
                assert file.name in str(e)


def test_masks_and_tickets_are_no_models(learner, tmp_path):
    learn = learner()
    learn.prune(0.5)
    learn.masks.save(tmp_path / 'm')
    Ticket(learn.model.state_dict(), learn.masks).save(tmp_path / 't')
    for name, what in (('m', 'fastprune masks'), ('t', 'fastprune ticket')):
        with pytest.raises(ValueError, match=f'is a file of {what}'):
            rep.report_file(tmp_path / name, out=tmp_path / 'out.html')


def test_a_network_by_name(tmp_path):
    pytest.importorskip('torchvision')
    model = make_model('squeezenet1_1', 5, 32)
    weights = prunable_weights(model)
    masks = compute_masks({n: p.detach() for n, p in weights.items()}, 0.9, 'global', absolute=True)
    masks.apply_({n: p.data for n, p in weights.items()})
    save_sparse(model.state_dict(), tmp_path / 'a', masks=masks)
    page = check(Page(rep.report_file(tmp_path / 'a', 'squeezenet1_1', size=32, out=tmp_path / 'a.html', seconds=0.2)))
    assert (
        'a: squeezenet1_1' in page.text
        and 'batch of 1x3x32x32' in page.words
        and page.row('total')[4] == '90%'
        and 'FLOPs with a weight that is kept' in page.text
    )
    for args, message in (
        (dict(arch='resnet18'), "'conv1.weight' is missing in the file, and of shape (64, 3, 7, 7) in the network"),
        (dict(arch='squeezenet1_1', classes=7), f"classes=7: {tmp_path / 'a'} has 5"),
        (dict(arch='squeezenet1'), 'Did you mean squeezenet1_1'),
        (dict(arch='squeezenet1_1', size=4), "can't take images of size=4"),
        (dict(size=0), 'size=0'),
        (dict(classes=0), 'classes=0'),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            rep.report_file(tmp_path / 'a', out=tmp_path / 'b.html', **args)
    assert not (tmp_path / 'b.html').exists()


def test_the_command(learner, tmp_path, monkeypatch, capsys):
    from sysconfig import get_path

    from fastprune.cli import main

    monkeypatch.chdir(tmp_path)
    learn = learner()
    learn.prune(0.75)
    torch.save(learn.model.state_dict(), 'm.pth')
    script = Path(get_path('scripts')) / 'fastprune'
    r = python(script, 'report', 'm.pth', '--out', 'r.html', '--pictures', '2', folder=tmp_path)
    assert r.returncode == 0 and re.fullmatch(r'The report is in r.html \([\d.]+ MB\)\n', r.stdout), r.stderr
    assert check(Page('r.html')).row('total')[4] == '75%'
    monkeypatch.setattr(
        sys.modules['__main__'], '__file__', 'fastprune', raising=False
    )  # as in a script; a worker of pytest has none

    def ends(*args):
        monkeypatch.setattr(sys, 'argv', ['bin/fastprune', *args])
        with pytest.raises(SystemExit) as e:
            main()
        return e.value.code, capsys.readouterr()

    code, said = ends('report', '--help')
    assert not code and 'usage: fastprune report' in said.out and '--arch' in said.out and '--sparsity' not in said.out
    code, said = ends('--help')
    assert (
        not code
        and 'usage: fastprune [' in said.out
        and 'fastprune report FILE' in said.out
        and '--sparsity' in said.out
    )
    for args, why in (
        (('nothing.pth',), "there is no file 'nothing.pth'"),
        (('m.pth', '--arch', 'resnet19'), "--arch='resnet19' is unknown"),
        (('m.pth', '--out', '/proc/x/r.html'), '/proc/x'),
        (('m.pth', '--classes', '3'), '--classes=3: is of a network'),
        (('m.pth', '--arch='), "--arch='': needs the name of a network"),
    ):
        code, said = ends('report', *args)
        assert code == 2 and said.err.startswith('fastprune: ') and why in said.err and len(said.err.splitlines()) == 1
    code, said = ends('repord')
    assert code == 2 and 'unrecognized arguments: repord' in said.err
    monkeypatch.setitem(sys.modules, 'plotly.offline', None)
    assert "pip install 'fastprune[report]'" in ends('report', 'm.pth')[1].err
