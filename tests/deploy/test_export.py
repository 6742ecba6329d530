"Pruned models in other hands: ONNX and onnxruntime, torch.export, 2:4 tensors, torch.nn.utils.prune"

import sys
import warnings
from copy import deepcopy

import numpy as np
import pytest
import torch
from fastai.basics import SGD, Callback
from helpers import Encoder, Tagger
from torch import nn
from torch.nn.utils import prune

from fastprune.all import (
    RigL,
    SparsifyCallback,
    compute_masks,
    digits_convnet,
    from_torch_prune,
    one_shot,
    prunable_weights,
    state_of,
    to_onnx,
    to_semi_structured,
    to_torch_prune,
)
from fastprune.deploy import export
from fastprune.deploy.semi_structured import semi_structured_layers

pytestmark = [
    pytest.mark.cpu_only,  # files for other programs; what needs a GPU says `cuda`
    pytest.mark.usefixtures('one_registry'),
]


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.cont, self.out = nn.Embedding(5, 4), nn.Linear(3, 4), nn.Linear(12, 2)

    def forward(self, cat, cont):
        h = torch.cat([self.emb(cat).flatten(1), self.cont(cont)], 1)
        return {'out': self.out(h), 'hidden': [h, h.argmax(1)]}


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(6, 3)

    def forward(self, *xs):
        return self.l(xs[0]) - self.l(xs[1])


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def pruned(model, s=0.9, **kwargs):
    w = prunable_weights(model)
    masks = compute_masks(w, s, absolute=True, **kwargs)
    masks.apply_(w)
    return model, masks


def same(a, b):
    return list(a.state_dict()) == list(b.state_dict()) and all(
        torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


# ---- ONNX


def zeros(path):
    onnx = pytest.importorskip('onnx')
    g = onnx.load(path).graph
    res = {t.name: int((onnx.numpy_helper.to_array(t) == 0).sum()) for t in g.initializer if t.data_type == 1}
    return res | {
        t.values.name: int(np.prod(t.dims)) - len(onnx.numpy_helper.to_array(t.values)) for t in g.sparse_initializer
    }


@pytest.fixture
def ort():
    for p in ('onnx', 'onnxscript'):
        pytest.importorskip(p)
    lib = pytest.importorskip('onnxruntime')
    return lambda path: lib.InferenceSession(str(path), providers=['CPUExecutionProvider'])


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'make,xs,names',
    [
        (mlp, (torch.randn(3, 1, 8, 8),), ['input']),
        (Tagger, (torch.randint(0, 24, (3, 5)),), ['tokens']),
        pytest.param(Encoder, (torch.randn(3, 4, 8),), ['x'], marks=pytest.mark.slow),
        (Pair, (torch.randint(0, 5, (3, 2)), torch.randn(3, 3)), ['cat', 'cont']),
        (Siamese, (torch.randn(1, 6), torch.randn(1, 6)), ['input_0', 'input_1']),
    ],
    ids=lambda o: getattr(o, '__name__', ''),
)
def test_onnx_of_many_models(ort, tmp_path, make, xs, names):
    torch.manual_seed(0)
    model, masks = pruned(make().train())
    n_pruned = sum(int((~m).sum()) for m in masks.values())
    before, rng = deepcopy(model.state_dict()), torch.get_rng_state()
    assert to_onnx(model, xs, tmp_path / 'm.onnx') == tmp_path / 'm.onnx'
    to_onnx(model, xs, tmp_path / 's.onnx', sparse=True)
    assert (
        all(m.training for m in model.modules())
        and all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
        and torch.equal(rng, torch.get_rng_state())
    )
    assert sorted(o.name for o in tmp_path.iterdir()) == ['m.onnx', 's.onnx']
    assert (
        sum(zeros(tmp_path / 'm.onnx').values()) >= n_pruned
        and zeros(tmp_path / 'm.onnx').keys() == zeros(tmp_path / 's.onnx').keys()
    )
    a, b = ort(tmp_path / 'm.onnx'), ort(tmp_path / 's.onnx')
    assert [i.name for i in a.get_inputs()] == names
    more = {n: torch.cat([x] * 7)[:7].numpy() for n, x in zip(names, xs, strict=True)}
    assert (
        all(np.array_equal(x, y) for x, y in zip(a.run(None, more), b.run(None, more), strict=True))
        and len(a.run(None, more)[0]) == 7
    )
    assert b'site-packages' not in (tmp_path / 'm.onnx').read_bytes()


def test_onnx_of_convolutions_with_norms_folded_in(ort, learner, fit, tmp_path):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.9))
    state, masks, training = state_of(learn), learn.masks, learn.model.training
    order = [b[1].tolist() for b in deepcopy(learn.dls.train)]
    learn.to_onnx(tmp_path / 'm.onnx')
    stored = zeros(tmp_path / 'm.onnx')
    assert all(stored[n] == int((~m).sum()) for n, m in masks.items())
    assert (
        learn.masks == masks
        and learn.model.training == training
        and all(torch.equal(t, state[n]) for n, t in learn.model.state_dict().items())
    )
    x, y = learn.dls.valid.one_batch()
    with torch.no_grad():
        assert np.allclose(
            ort(tmp_path / 'm.onnx').run(None, {'input': x.numpy()})[0], learn.model.eval()(x).numpy(), atol=1e-4
        )
    assert [b[1].tolist() for b in learn.dls.train] == order
    learn.to_onnx(tmp_path / 'one.onnx', dynamic_batch=False, input_names=['image'], output_names=['digit'])
    fixed = ort(tmp_path / 'one.onnx')
    assert (fixed.get_inputs()[0].name, fixed.get_inputs()[0].shape, fixed.get_outputs()[0].name) == (
        'image',
        [1, 1, 8, 8],
        'digit',
    )


def test_onnx_of_a_tabular_learner_within_a_fit(ort, tmp_path):
    pd = pytest.importorskip('pandas')
    from fastai.tabular.all import Categorify, Normalize, TabularDataLoaders, tabular_learner

    rng = np.random.default_rng(0)
    df = pd.DataFrame({'a': rng.choice(list('xyz'), 96), 'b': rng.normal(size=96), 'y': rng.choice(['p', 'q'], 96)})
    learn = tabular_learner(
        TabularDataLoaders.from_df(
            df, cat_names=['a'], cont_names=['b'], y_names='y', bs=32, procs=[Categorify, Normalize]
        ),
        layers=[16, 8],
    )

    class Now(Callback):
        def after_batch(self):
            if self.iter == 1 and self.training:
                self.learn.to_onnx(tmp_path / 'm.onnx')

    with learn.no_bar(), learn.no_logging():
        learn.fit(1, cbs=[SparsifyCallback(0.8, interval=1), Now()])
    assert learn.masks.sparsity == pytest.approx(0.8, abs=0.01)
    learn.to_onnx(tmp_path / 'm.onnx')
    cat, cont, _ = learn.dls.valid.one_batch()
    with torch.no_grad():
        wanted = learn.model.eval()(cat, cont).numpy()
    assert np.allclose(
        ort(tmp_path / 'm.onnx').run(None, {'x_cat': cat.numpy(), 'x_cont': cont.numpy()})[0], wanted, atol=1e-5
    )


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) for n in ('test_vit', 'test_convnext')])
def test_onnx_of_timm_models(ort, tmp_path, name):
    timm = pytest.importorskip('timm')
    if not timm.is_model(name):
        pytest.skip(f'this timm has no {name}')
    model, masks = pruned(timm.create_model(name, num_classes=10))
    to_onnx(model, torch.randn(2, 3, *model.pretrained_cfg['input_size'][1:]), tmp_path / 'm.onnx')
    assert sum(zeros(tmp_path / 'm.onnx').values()) >= sum(int((~m).sum()) for m in masks.values())


class Branches(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


class Text(nn.Module):
    def forward(self, x):
        return x, 'text'


class Reshape(nn.Module):
    def forward(self, x):
        return x.reshape(4, 3) * 2


class Lucky(nn.Module):
    "Other numbers at each call"

    def forward(self, x):
        return x * torch.rand(())


def test_onnx_that_is_not_written(ort, tmp_path, monkeypatch):
    x, path = torch.randn(2, 64), tmp_path / 'm.onnx'
    path.write_text('as before')

    def fails(msg, model=None, example=x, p=path, error=ValueError, **kwargs):
        with pytest.raises(error, match=msg):
            to_onnx(mlp() if model is None else model, example, p, **kwargs)
        assert path.read_text() == 'as before' and [o.name for o in tmp_path.iterdir()] == ['m.onnx']

    fails('Branches can\'t be exported to ONNX with dynamic_batch=True', Branches())
    fails('output 1 of Text is a str', Text())
    fails('output 0 in onnxruntime, for inputs of shape .*differs from torch', Lucky())
    fails('input 1 is a int', example=(x, 3))
    fails('needs at least one tensor', example=())
    fails('there is no directory', p=tmp_path / 'no' / 'm.onnx')
    fails("output_names='y'", output_names='y')
    fails("input_names=\\['a', 'a'\\]", Siamese(), (torch.randn(2, 6),) * 2, input_names=['a', 'a'])
    for t in (torch.tensor(1.0), torch.ones(0, 64)):
        fails('the first input has shape', example=t)
    fails('Reshape itself fails for inputs of shape \\(5, 3\\)', Reshape(), torch.randn(4, 3))
    fails('Sequential itself fails for inputs of shape \\(2, 63\\)', example=torch.randn(2, 63))
    fails('no bfloat16', mlp().bfloat16())
    fails('of 2 GB or more', nn.Linear(2**15, 2**15, device='meta'))
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    fails("to_onnx needs onnxscript: pip install 'fastprune\\[onnx\\]'", error=ImportError)


def test_onnx_says_when_onnxruntime_differs(ort, tmp_path, monkeypatch):
    monkeypatch.setattr(export, '_compare', lambda *args: (_ for _ in ()).throw(ValueError('differs')))
    with pytest.raises(ValueError, match='differs'):
        to_onnx(mlp(), torch.randn(2, 64), tmp_path / 'm.onnx')
    assert not list(tmp_path.iterdir())


def test_onnx_of_half_precision(ort, tmp_path):
    to_onnx(pruned(mlp())[0].half(), torch.randn(2, 64).half(), tmp_path / 'm.onnx')
    assert ort(tmp_path / 'm.onnx').get_inputs()[0].type == 'tensor(float16)'


# ---- torch.export


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'make,xs',
    [
        (mlp, torch.randn(3, 64)),
        (Tagger, torch.randint(0, 24, (3, 5))),
        (Encoder, torch.randn(3, 4, 8)),
        (digits_convnet, torch.randn(3, 1, 8, 8)),
    ],
    ids=['mlp', 'lstm', 'transformer', 'convnet'],
)
def test_torch_export(make, xs, tmp_path):
    model, masks = pruned(make().eval())
    torch.export.save(
        torch.export.export(model, (xs,), dynamic_shapes=({0: torch.export.Dim('batch')},)), tmp_path / 'm.pt2'
    )
    program = torch.export.load(tmp_path / 'm.pt2')
    with torch.no_grad():
        assert all(torch.allclose(program.module()(x), model(x), atol=1e-6) for x in (xs, xs[:2]))
    assert all(torch.equal(program.state_dict[n] != 0, m) for n, m in masks.items())


def test_torch_export_within_a_fit(learner, fit):
    learn, programs = learner(), []

    class Now(Callback):
        def after_batch(self):
            if self.iter == 5 and self.training:
                programs.append((torch.export.export(self.learn.model, (self.x,)), self.learn.masks.copy()))

    fit(learn, 1, cbs=[SparsifyCallback(0.9, schedule=one_shot, interval=1), Now()])
    ((program, masks),) = programs
    assert (
        masks.sparsity > 0
        and learn.masks.sparsity == pytest.approx(0.9, abs=1e-3)
        and program.state_dict.keys() == learn.model.state_dict().keys()
    )


# ---- torch.nn.utils.prune


def attention():
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)


def normed():
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.ReLU(), nn.Linear(8, 4))


inputs = {
    'mlp': (mlp, torch.randn(3, 64)),
    'lstm': (Tagger, torch.randint(0, 24, (3, 5))),
    'attention': (attention, torch.randn(3, 4, 16)),
    'convnet': (digits_convnet, torch.randn(3, 1, 8, 8)),
    'grouped': (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(8, 6, 3, groups=2)),
        torch.randn(2, 4, 6, 6),
    ),
    'weight_norm': (normed, torch.randn(3, 8)),
}


@pytest.mark.parametrize('name', inputs)
@pytest.mark.filterwarnings('ignore:torch never calls')
def test_to_torch_prune_and_back(name):
    torch.manual_seed(0)
    make, x = inputs[name]
    model = make().eval()
    weights = prunable_weights(model, include='*')
    masks = compute_masks({n: torch.rand(p.shape) for n, p in weights.items()}, 0.6)
    before = deepcopy(model)
    copy = to_torch_prune(model, masks)
    assert same(model, before) and prune.is_pruned(copy) and from_torch_prune(copy) == masks
    masks.apply_(weights)
    with torch.no_grad():
        assert torch.allclose(copy(x), model(x), atol=1e-6)
    held = {id(p) for p in copy.parameters()}
    assert from_torch_prune(copy, permanent=True) == masks
    assert (
        same(copy, model)
        and not prune.is_pruned(copy)
        and type(copy) is type(model)
        and held == {id(p) for p in copy.parameters()}
    )
    assert [n for n, _ in copy.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(not torch.signbit(p[~masks[n]]).any() for n, p in copy.named_parameters() if n in masks)
    assert same(deepcopy(copy), model)
    copy.train()
    for _ in range(2):
        copy(x).sum().backward()


def test_torchs_attention_out_projection_is_warned_of():
    model = attention()
    with pytest.warns(UserWarning, match="'self_attn.out_proj.weight'"):
        to_torch_prune(model, {'self_attn.out_proj.weight': torch.ones(16, 16, dtype=torch.bool)})
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        to_torch_prune(model, {'self_attn.in_proj_weight': torch.ones(48, 16, dtype=torch.bool)})


def by_l1(m):
    prune.l1_unstructured(m[3], 'weight', 0.5)


def by_random(m):
    prune.random_unstructured(m[1], 'bias', 7)


def by_rows(m):
    prune.ln_structured(m[1], 'weight', 0.25, n=2, dim=0)


def by_columns(m):
    prune.random_structured(m[1], 'weight', 0.25, dim=1)


def by_all(m):
    prune.global_unstructured([(m[1], 'weight'), (m[3], 'weight')], prune.L1Unstructured, amount=0.7)


def by_nothing(m):
    prune.identity(m[1], 'weight')


def by_many(m):
    for _ in range(3):
        prune.l1_unstructured(m[1], 'weight', 0.2)
    by_columns(m), by_all(m), by_random(m)


@pytest.mark.parametrize('how', [by_l1, by_random, by_rows, by_columns, by_all, by_nothing, by_many])
def test_from_each_of_torchs_methods(how):
    torch.manual_seed(0)
    model = mlp()
    how(model)
    wanted = {n.removesuffix('_mask'): b.bool() for n, b in model.named_buffers()}
    theirs = mlp()
    theirs.load_state_dict(
        {
            n: model.get_parameter(n + '_orig') * wanted[n] if n in wanted else model.get_parameter(n)
            for n, _ in theirs.named_parameters()
        }
    )
    masks = from_torch_prune(model)
    assert masks == wanted and prune.is_pruned(model)
    assert from_torch_prune(model, permanent=True) == wanted and same(model, theirs)
    with pytest.raises(ValueError, match='Sequential is not pruned'):
        from_torch_prune(model)


@pytest.mark.parametrize('opt', [SGD, None])
def test_a_learner_goes_on(learner, fit, opt):
    learn = fit(learner(**({} if opt is None else dict(opt_func=opt))), 1)
    names, params, state = (
        list(learn.model.state_dict()),
        list(learn.model.parameters()),
        {id(p): dict(s) for p, s in learn.opt.state.items()},
    )
    for m in learn.model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            prune.random_unstructured(m, 'weight', 0.5)
    fit(learn, 1)
    masks = learn.from_torch_prune()
    assert (
        masks == learn.masks
        and list(learn.model.state_dict()) == names
        and [id(p) for p in params] == [id(p) for p in learn.model.parameters()]
    )
    assert {id(p) for ps in learn.opt.param_lists for p in ps} == {id(p) for p in params} and state.keys() <= {
        id(p) for p in learn.opt.state
    }
    before = state_of(learn)
    fit(learn, 1)
    weights = prunable_weights(learn.model)
    assert (
        all(not weights[n][~m].any() and not torch.equal(weights[n], before[n]) for n, m in masks.items())
        and learn.masks == masks
    )
    fit(learn, 1, cbs=SparsifyCallback(0.8))
    assert learn.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    deepcopy(learn.model)


def test_masks_that_a_learner_has_stay(learner, fit):
    learn = learner()
    learn.prune(0.5)
    mine = learn.masks.copy()
    prune.random_unstructured(learn.model[-1], 'weight', 0.5)
    learn.from_torch_prune()
    assert (
        all(not (m & ~mine[n]).any() for n, m in learn.masks.items())
        and learn.masks.keys() == mine.keys()
        and learn.masks['5.weight'].float().mean() < 0.4
    )
    fit(learn, 1)
    prune.l1_unstructured(learn.model[-1], 'weight', 0.5)
    learn.remove_masks()
    for call in (
        lambda: fit(learn, 1, cbs=SparsifyCallback(0.3, include='0*')),
        lambda: fit(learn, 1, cbs=RigL(0.3)),
        lambda: learn.prune(0.3),
    ):
        with pytest.raises(
            ValueError, match="'5.weight' is pruned by torch.nn.utils.prune: call `learn.from_torch_prune"
        ):
            call()
    assert list(learn.from_torch_prune()) == ['5.weight']


def test_what_torch_pruning_cannot_be_taken_from():
    model = Tagger()
    prune.l1_unstructured(model.emb, 'weight', 0.5)
    with pytest.raises(ValueError, match="'emb.weight' and 'out.weight' are one parameter"):
        from_torch_prune(model, permanent=True)
    assert prune.is_pruned(model)
    prune.custom_from_mask(model.out, 'weight', model.emb.weight_mask)
    assert list(from_torch_prune(model)) == ['emb.weight']
    model = mlp()
    prune.custom_from_mask(model[1], 'weight', torch.full((32, 64), 0.5))
    with pytest.raises(ValueError, match="'1.weight' has values other than 0 and 1"):
        from_torch_prune(model)
    for f in (
        lambda m: to_torch_prune(m, {'3.weight': torch.ones(10, 32).bool()}),
        to_semi_structured,
        semi_structured_layers,
    ):
        with pytest.raises(
            ValueError, match="'1.weight' is pruned by torch.nn.utils.prune: call `learn.from_torch_prune"
        ):
            f(model)
    model = mlp()
    for masks, msg in (
        ({'3.weight': torch.ones(10, 32)}, 'bool tensor'),
        ({}, 'needs at least one'),
        (None, 'needs a dict'),
        ({'3.bias': torch.ones(11).bool()}, 'has shape'),
        ({'x': torch.ones(11).bool()}, "no weight 'x'"),
    ):
        with pytest.raises(ValueError, match=msg):
            to_torch_prune(model, masks)
    assert not prune.is_pruned(model)


def test_fastais_language_models_keep_a_graph():
    from fastai.text.models.awdlstm import AWD_LSTM, awd_lstm_lm_config
    from fastai.text.models.core import get_language_model

    model = get_language_model(AWD_LSTM, 20, config=dict(awd_lstm_lm_config, emb_sz=8, n_hid=12, n_layers=2))
    masks = compute_masks(prunable_weights(model), 0.5, absolute=True)
    copy, x = to_torch_prune(model, masks), torch.randint(2, 20, (3, 6))
    for _ in range(2):
        copy.train()(x)[0].sum().backward()
    masks.apply_(prunable_weights(model))
    for m in (model.eval(), copy.eval()):
        m.reset()
    with torch.no_grad():
        assert torch.equal(copy(x)[0], model(x)[0])
    assert from_torch_prune(copy, permanent=True) == masks
    assert copy.state_dict().keys() == model.state_dict().keys()


def test_wrapped_models():
    model = mlp()
    masks = compute_masks(prunable_weights(model), 0.5, absolute=True)
    copy = to_torch_prune(nn.DataParallel(model), masks)
    assert isinstance(copy, nn.Sequential) and from_torch_prune(nn.DataParallel(copy)) == masks
