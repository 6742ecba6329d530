"Models for inference give the same, whatever they are made of, and say what became of each layer"

import copy
import io
import threading

import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from fastprune.all import SparsifyCallback, compute_masks, digits_convnet, latency, prunable_weights, sparse_inference
from fastprune.deploy import attention, fold, forms, inference, timing
from fastprune.deploy.kernel import SparseLinear
from fastprune.learner.inputs import tensors_in

pytestmark = pytest.mark.cpu_only  # the kernel is for the CPU


def pruned(model, sparsity=0.9):
    "Zeros, and BatchNorm that does something"
    weights = prunable_weights(model)
    compute_masks(weights, sparsity, absolute=True).apply_({n: p.data for n, p in weights.items()})
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.affine:
            for t, lo, hi in (
                (m.weight, 0.5, 2),
                (m.bias, -1, 1),
                (m.running_mean, -0.3, 0.3),
                (m.running_var, 0.5, 2),
            ):
                if t is not None:
                    t.data.uniform_(lo, hi)
    return model.eval()


def forced(model, *inputs, form='sparse', monkeypatch=None, **kwargs):
    "With each layer in `form` where it has it, whatever is faster"
    with monkeypatch.context() as m:
        m.setattr(timing.LayerTrial, 'best', lambda t: form if form in t.forms else 'dense')
        m.setattr(
            inference, 'latency', lambda models, *_: pd.DataFrame({'ms': {n: float(n != 'sparse') for n in models}})
        )
        return sparse_inference(model, inputs, seconds=0.01, **kwargs)


def same(a, b, tol=1e-5):
    a, b = tensors_in(a), tensors_in(b)
    return len(a) == len(b) and all(
        x.shape == y.shape and (x - y).abs().max() <= tol * y.abs().max() for x, y in zip(a, b, strict=True)
    )


class Odd(nn.Module):
    """Outputs of several kinds, a convolution whose output is used twice, one that is never called, one called twice, a
    weight that is read"""

    def __init__(self):
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.b, self.bn_b = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.never, self.twice, self.read = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 8)
        self.bn_twice = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2)

    def forward(self, x, scale=None):
        x = self.a(x)
        y = self.bn_a(x) + x
        z = self.bn_b(self.b(y)).relu()
        z = self.bn_twice(self.twice(self.twice(z)))
        flat = nn.functional.linear(z.mean((2, 3)), self.read.weight)
        return {'map': self.up(z), 'rest': [flat, (z.argmax(),)]}


class Seq(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.l, self.h = nn.Embedding(20, 16), nn.LSTM(16, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, x):
        return self.h(self.l(self.e(x))[0][:, -1])


def encoder(**kw):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, **kw), 2)


models = {
    'odd': lambda: (Odd(), torch.randn(2, 3, 9, 9)),
    'lstm': lambda: (Seq(), torch.randint(20, (3, 7))),
    'encoder': lambda: (encoder(batch_first=True), torch.randn(2, 10, 32)),
    'encoder, gelu, norm first': lambda: (
        encoder(batch_first=True, norm_first=True, activation='gelu', bias=False),
        torch.randn(2, 10, 32),
    ),
    'encoder, length first': lambda: (encoder(), torch.randn(10, 2, 32)),
    'conv1d': lambda: (
        nn.Sequential(
            nn.Conv1d(4, 16, 5, stride=2, padding=2),
            nn.BatchNorm1d(16),
            nn.ReLU(),
            nn.Conv1d(16, 8, 3, dilation=2),
            nn.Flatten(),
            nn.LazyLinear(6),
            nn.BatchNorm1d(6),
        ),
        torch.randn(4, 4, 40),
    ),
    'conv3d': lambda: (
        nn.Sequential(nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(6)),
        torch.randn(2, 2, 6, 6, 6),
    ),
    'batchnorm over positions': lambda: (
        nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(10), nn.Linear(16, 4)),
        torch.randn(3, 10, 8),
    ),
    'no statistics': lambda: (
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8, track_running_stats=False),
            nn.Conv2d(8, 4, 3),
            nn.BatchNorm2d(4, affine=False),
        ),
        torch.randn(2, 3, 9, 9),
    ),
    'weight norm': lambda: (
        nn.Sequential(parametrizations.weight_norm(nn.Linear(128, 32)), nn.ReLU(), nn.Linear(32, 4)),
        torch.randn(5, 128),
    ),
    'circular': lambda: (
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode='circular'), nn.Conv2d(8, 4, 3, padding='same')),
        torch.randn(2, 3, 8, 8),
    ),
    'tied': lambda: tied(),
    'float64': lambda: (
        nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).double(),
        torch.randn(5, 16).double(),
    ),
    'channels last': lambda: (
        digits_convnet(widths=(8, 16, 16)).to(memory_format=torch.channels_last),
        torch.randn(4, 1, 8, 8).to(memory_format=torch.channels_last),
    ),
}


def tied():
    m = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    m[2].weight = m[0].weight
    return m, torch.randn(5, 16)


@pytest.mark.sample(2)
@pytest.mark.parametrize('form', ['sparse', 'csr'])
@pytest.mark.parametrize('name', models)
def test_same_outputs(name, form, monkeypatch):
    torch.manual_seed(0)
    model, x = models[name]()
    with torch.no_grad():
        model.eval()(x)
    pruned(model)
    before = copy.deepcopy(model.state_dict())
    res = forced(model, x, form=form, monkeypatch=monkeypatch)
    with torch.no_grad():
        assert same(res(x), model(x))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and not res.training
    report = res.inference_report
    none = form == 'sparse' and name == 'float64' or form == 'csr' and name == 'circular'
    assert (report.form[:-1] == form).any() != none and (report.why[report.form == 'dense'] != '').all()


def of_torchvision(arch):
    "The network, or one of its family with fewer and narrower layers of the same kinds"
    tv = pytest.importorskip('torchvision').models
    if arch == 'densenet':
        return tv.DenseNet(8, (2, 3, 2, 2), 16, num_classes=10)
    if arch == 'convnext':
        block = tv.convnext.CNBlockConfig
        return tv.ConvNeXt([block(24, 32, 1), block(32, 48, 1), block(48, 64, 2), block(64, None, 1)], num_classes=10)
    if arch == 'vit':
        return tv.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10)
    if arch == 'swin':
        return tv.SwinTransformer([4, 4], 24, [2, 2, 2, 2], [2, 2, 4, 8], [7, 7], num_classes=10)
    if arch == 'efficientnet':
        stages = [(1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 1), (6, 5, 1, 40, 64, 2)]
        blocks = [tv.efficientnet.MBConvConfig(*stage, width_mult=0.5) for stage in stages]
        return tv.EfficientNet(blocks, 0.2, num_classes=10)
    if arch == 'googlenet':
        return tv.googlenet(aux_logits=False, init_weights=False)
    return getattr(tv, arch)(num_classes=10)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'arch',
    [
        'resnet18',
        'mobilenet_v2',
        'shufflenet_v2_x0_5',
        'convnext',
        'vit',
        'efficientnet',
        *(pytest.param(n, marks=pytest.mark.slow) for n in ('densenet', 'googlenet', 'swin', 'regnet_y_400mf')),
    ],
)
def test_torchvision(arch, monkeypatch):
    torch.manual_seed(0)
    model, x = pruned(of_torchvision(arch), 0.8), torch.randn(2, 3, 32, 32)
    res = forced(model, x, monkeypatch=monkeypatch, rtol=1e-3)
    with torch.no_grad():
        assert same(res(x), model(x), 1e-3) and same(
            res(x[:1].repeat(3, 1, 1, 1)), model(x[:1].repeat(3, 1, 1, 1)), 1e-3
        )
    r = res.inference_report
    assert (r.form == 'sparse').sum() > len(r) / 2
    if arch in ('resnet18', 'mobilenet_v2'):
        assert not any(type(m) is nn.BatchNorm2d for m in res.modules())


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'arch',
    [
        'resnet10t',
        'mobilenetv3_small_050',
        'vit_tiny_patch16_224',
        pytest.param('efficientnet_lite0', marks=pytest.mark.slow),
    ],
)
def test_timm(arch, monkeypatch):
    timm = pytest.importorskip('timm')
    torch.manual_seed(0)
    kw = {'img_size': 32, 'depth': 3} if 'vit' in arch else {}
    model, x = pruned(timm.create_model(arch, num_classes=10, **kw), 0.8), torch.randn(2, 3, 32, 32)
    res = forced(model, x, monkeypatch=monkeypatch, rtol=1e-3)
    with torch.no_grad():
        assert same(res(x), model(x), 1e-3)
    assert (res.inference_report.form == 'sparse').any() and not any(
        type(m).__name__ == 'BatchNormAct2d' for m in res.modules()
    )


@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(batch_first=True),
        dict(kdim=24, vdim=16),
        dict(bias=False),
        dict(add_bias_kv=True),
        dict(add_zero_attn=True),
    ],
)
@pytest.mark.parametrize('itself', [True, False])
def test_attention(kw, itself, monkeypatch):
    "All that `nn.MultiheadAttention` takes"
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 4, **kw)

        def forward(self, q, k, v, **more):
            return self.attn(q, k, v, **more)

    if itself and 'kdim' in kw:
        pytest.skip('keys of another width are not the queries')
    net, first = pruned(Net(), 0.7), kw.get('batch_first')
    shape = lambda n, d: (2, n, d) if first else (n, 2, d)
    q = torch.randn(shape(6, 32))
    k, v = (q, q) if itself else (torch.randn(shape(9, kw.get('kdim', 32))), torch.randn(shape(9, kw.get('vdim', 32))))
    res = forced(net, q, k, v, monkeypatch=monkeypatch)
    assert isinstance(res.attn, attention.OpenAttention) == (not kw.get('add_bias_kv') and not kw.get('add_zero_attn'))
    n, s = 6, k.shape[1 if first else 0]
    padding = torch.zeros(2, s, dtype=torch.bool)
    padding[1, -2:] = True
    more = [
        {},
        dict(need_weights=False),
        dict(average_attn_weights=False),
        dict(key_padding_mask=padding),
        dict(attn_mask=torch.ones(n, s, dtype=torch.bool).triu(1)),
        dict(attn_mask=torch.randn(n, s)),
        dict(attn_mask=torch.ones(n, s, dtype=torch.bool).triu(2), is_causal=False, need_weights=False),
        dict(attn_mask=torch.randn(8, n, s), key_padding_mask=padding.float(), need_weights=False),
    ]
    with torch.no_grad():
        for m in more:
            assert same(res(q, k, v, **m), net(q, k, v, **m)), m
        if 'kdim' not in kw:
            other = torch.randn(shape(4, 32))
            assert same(res(other, q, q), net(other, q, q)) and same(
                res(other, other, other), net(other, other, other)
            )  # called otherwise than in the example
            one = (lambda t: t[0]) if first else (lambda t: t[:, 0])
            assert same(res(one(q), one(k), one(v)), net(one(q), one(k), one(v)))  # no batch


def test_padding_in_encoder(monkeypatch):
    torch.manual_seed(0)
    model, x = pruned(encoder(batch_first=True)), torch.randn(3, 8, 32)
    res = forced(model, x, monkeypatch=monkeypatch)
    padding = torch.zeros(3, 8, dtype=torch.bool)
    padding[0, 5:] = True
    with torch.no_grad():
        a, b = res(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding)
    assert same(a[~padding], b[~padding])  # what is padded is nobody's business


def test_decoder(monkeypatch):
    torch.manual_seed(0)
    model = pruned(nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2))
    x, memory = torch.randn(2, 5, 32), torch.randn(2, 7, 32)
    res = forced(model, x, memory, monkeypatch=monkeypatch)
    with torch.no_grad():
        assert same(res(x, memory), model(x, memory))
    assert (res.inference_report.form[:-1] == 'sparse').sum() == 2 * (1 + 1 + 3 + 1 + 2)
    assert {'layers.0.self_attn.in_proj_weight', 'layers.1.multihead_attn.k_proj_weight', 'layers.1.linear2'} < set(
        res.inference_report.index
    )


def test_report():
    torch.manual_seed(0)
    model = pruned(Odd())
    model.b.register_forward_hook(lambda *a: None)
    res = sparse_inference(model, torch.randn(2, 3, 9, 9), seconds=0.05)
    r = res.inference_report
    assert (
        r.why['never'] == r.why['read'] == 'the example does not reach it'
        and r.why['b'] == 'it has hooks'
        and r.kind['up'] == 'ConvTranspose2d'
        and r.dense_ms['up'] > 0
    )
    assert list(r.index)[-1] == 'total' and r.ms['total'] > 0
    assert r.form['total'] in ('graph', 'sparse', 'folded', 'as it was')
    assert (
        sparse_inference(model, torch.randn(2, 3, 9, 9), min_sparsity=0.95, seconds=0.05).inference_report.why['a']
        == 'fewer zeros than min_sparsity=0.95'
    )


def test_a_fast_model_in_its_learner_predicts_only(learner, fit):
    learn = fit(learner(), 1, cbs=SparsifyCallback(0.95))
    learn.model = learn.sparse_inference(bs=1, seconds=0.05)
    for call in (
        lambda: fit(learn, 1),
        learn.sparsity_report,
        learn.flops,
        lambda: learn.compare(seconds=0, onnx=False),
    ):
        with pytest.raises(ValueError, match='learn.model is the fast form that sparse_inference made, which predicts'):
            call()
    with learn.no_bar():
        assert len(learn.validate()) == 2


def test_folding_takes_only_what_it_may():
    torch.manual_seed(0)
    model, x = pruned(Odd()), torch.randn(2, 3, 9, 9)
    whole = copy.deepcopy(model)
    assert (
        fold.fold_batchnorm(whole, (x,)) == ['b']
        and type(whole.bn_b) is nn.Identity
        and type(whole.bn_a) is type(whole.bn_twice) is nn.BatchNorm2d
    )
    with torch.no_grad():
        assert same(whole(x), model(x))


def test_norms_without_a_weight_are_folded_too(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64, affine=False), nn.ReLU(), nn.Linear(64, 8))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    model, x = pruned(model), torch.randn(4, 64)
    assert fold.fold_batchnorm(whole := copy.deepcopy(model), (x,)) == ['0']
    with torch.no_grad():
        assert same(whole(x), model(x)) and same(forced(model, x, monkeypatch=monkeypatch)(x), model(x))


class ByName(nn.Module):
    "Reads its own first parameter, and calls a layer by the name of its argument"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Conv1d(64, 8, 1)

    def forward(self, x):
        x = self.a(input=x.to(next(self.parameters()).device)).relu()
        return self.c(input=self.b(input=x)[..., None])


@pytest.mark.parametrize('form', ['sparse', 'csr'])
def test_forms_are_called_as_layers_are(monkeypatch, form):
    torch.manual_seed(0)
    model, x = pruned(ByName()), torch.randn(4, 64)
    res = forced(model, x, form=form, monkeypatch=monkeypatch)
    assert (res.inference_report.form[:-1] == form).all()
    with torch.no_grad():
        assert same(res(x), model(x))


def test_a_model_that_has_no_use_for_forms_keeps_its_layers(monkeypatch):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return x @ self.fc.weight.T.contiguous() + self.fc(x)

    torch.manual_seed(0)
    model, x = pruned(Odd()), torch.randn(4, 64)
    res = forced(model, x, form='csr', monkeypatch=monkeypatch)
    assert type(res.fc) is nn.Linear
    assert "the model's own code can't run with sparse layers" in res.inference_report.why['fc']


def test_a_layer_alone_is_told_to_be_put_into_a_model():
    model = pruned(nn.Linear(64, 64))
    res = sparse_inference(model, torch.randn(4, 64), seconds=0.01)
    assert 'put it into an `nn.Sequential`' in res.inference_report.why['']


def test_without_kernel(monkeypatch):
    "numba or MKL missing: what is left is tried, and the report says why"
    for module in ('kernel', 'graph_choice'):
        monkeypatch.setattr(f'fastprune.deploy.{module}.kernel_missing', lambda: "numba can't be imported")
    torch.manual_seed(0)
    model, x = pruned(nn.Sequential(nn.Linear(512, 512), nn.Conv1d(4, 4, 1)), 0.97), torch.randn(4, 512)
    res = sparse_inference(model, x, seconds=0.05)
    assert res.inference_report.form['0'] in ('csr', 'dense')
    monkeypatch.setattr(
        forms.CSRLayer,
        'product',
        lambda *_: (_ for _ in ()).throw(
            RuntimeError('Calling addmm on a sparse CPU tensor requires Linux platform\nmore')
        ),
    )
    res = sparse_inference(model, x, seconds=0.05)
    assert res.inference_report.form['0'] == 'dense' and res.inference_report.form['total'] == 'as it was'
    assert (
        "sparse: there is no sparse kernel here: numba can't be imported" in res.inference_report.why['0']
        and 'csr: Calling addmm on a sparse CPU tensor requires Linux platform' in res.inference_report.why['0']
    )


def test_slower_as_a_whole_is_left_alone(monkeypatch):
    monkeypatch.setattr(timing.LayerTrial, 'best', lambda t: 'sparse')
    monkeypatch.setattr(
        inference, 'latency', lambda models, *_: pd.DataFrame({'ms': {n: 1.0 + (n == 'sparse') for n in models}})
    )
    model = pruned(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)))
    res = sparse_inference(model, torch.randn(4, 64), seconds=0.01)
    assert (
        set(res.inference_report.form) == {'dense', 'as it was'}
        and type(res[0]) is nn.Linear
        and (res.inference_report.why[:-1] == 'the whole model is not faster with sparse layers').all()
    )


def test_copied_saved_and_in_threads(monkeypatch):
    torch.manual_seed(0)
    model, x = pruned(encoder(batch_first=True)), torch.randn(2, 10, 32)
    res = forced(model, x, monkeypatch=monkeypatch)
    f = io.BytesIO()
    torch.save(res, f)
    f.seek(0)
    got = []
    with torch.no_grad():
        want = res(x)
        for again in (copy.deepcopy(res), torch.load(f, weights_only=False)):
            assert torch.equal(again(x), want) and again.inference_report.equals(res.inference_report)
    ts = [threading.Thread(target=lambda: got.append(torch.equal(torch.no_grad()(res)(x), want))) for _ in range(4)]
    for t in ts:
        t.start()
    for t in ts:
        t.join()
    assert got == [True] * 4


def test_learner(learner, fit):
    learn = learner()
    fit(learn, 1, cbs=SparsifyCallback(0.9))
    state, masks = copy.deepcopy(learn.model.state_dict()), learn.masks.copy()
    for bs in (1, 5, 500):
        res = learn.sparse_inference(bs=bs, seconds=0.05)
        x = learn.dls.valid.one_batch()[0]
        with torch.no_grad():
            assert same(res(x), learn.model.eval()(x), 1e-4)
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items()) and learn.masks == masks
    fit(learn, 1)
    with pytest.raises(ValueError, match='bs=0: needs a whole number'):
        learn.sparse_inference(bs=0)


class Alias(nn.Module):
    "A convolution by two names"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.seq = nn.Sequential(self.conv, nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x):
        return self.seq(x)


class Looks(nn.Module):
    "Looks at its layers, and uses a weight that BatchNorm follows"

    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.out = nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Conv1d(1, 4, 3, stride=2)

    def forward(self, x):
        y = nn.functional.linear(self.bn(self.fc(x.view(-1, self.fc.in_features))), self.fc.weight.t())
        return self.out(y[:, None]) * self.out.stride[0]


class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Alias()

    def forward(self, x):
        return self.net(x).mean((2, 3)).argmax(1)


class Resets(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def reset(self):
        nn.init.ones_(self.fc.weight)

    def forward(self, x):
        return self.fc(x)


@pytest.mark.parametrize('form', ['sparse', 'csr'])
@pytest.mark.parametrize(
    'make,shape', [(Alias, (4, 3, 9, 9)), (Looks, (5, 64)), (Classes, (200, 3, 6, 6)), (Resets, (5, 64))]
)
def test_unusual_models(make, shape, form, monkeypatch):
    torch.manual_seed(0)
    model, x = pruned(make()), torch.randn(*shape)
    res = forced(model, x, form=form, monkeypatch=monkeypatch)
    with torch.no_grad():
        assert same(res(x).float(), model(x).float()) and same(copy.deepcopy(res)(x).float(), model(x).float())
    assert (
        (res.inference_report.form[:-1] == form).any() or make is Looks and form == 'csr'
    )  # whose weight is a CSR tensor, which the model can't use
    if form == 'csr' and make is Resets:
        with torch.no_grad():
            assert res(x[:0]).shape == (0, 64)


def test_padding_in_the_example():
    "Where torch's fused path zeroes what is padded, sparse layers would not"
    torch.manual_seed(0)
    model, x, padding = pruned(encoder(batch_first=True)), torch.randn(3, 8, 32), torch.zeros(3, 8, dtype=torch.bool)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = model

        def forward(self, x, padding):
            return self.e(x, src_key_padding_mask=padding)

    for n in (8, 5):
        padding[0, n:] = True
        res = sparse_inference(Net().eval(), (x, padding), seconds=0.05)
        with torch.no_grad():
            assert same(res(x, padding), model(x, src_key_padding_mask=padding))


def test_attention_refuses_what_torch_does(monkeypatch):
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, *a, **k):
            return self.attn(*a, **k)

    q = torch.randn(2, 6, 32)
    res = forced(pruned(Net(), 0.7), q, q, q, monkeypatch=monkeypatch)
    for call, says in (
        (lambda: res(q, q, q, is_causal=True), 'is_causal=True: needs attn_mask'),
        (lambda: res(q, q[:1], q[:1]), 'the same batch size, got 2, 1 and 1'),
        (lambda: res(q, q, q, attn_mask=torch.ones(6, 6).long()), 'got int64'),
    ):
        with pytest.raises(ValueError, match=says), torch.no_grad():
            call()


def test_layers_that_are_moved_or_loaded():
    torch.manual_seed(0)
    a, b, x = nn.Linear(64, 64), nn.Linear(64, 64), torch.randn(20, 64)
    m = torch.rand(64, 64).argsort(1) < 6
    with torch.no_grad():
        a.weight.mul_(m)
        b.weight.mul_(m[:, torch.randperm(64)])
        sa, sb = SparseLinear(a), SparseLinear(b)
        sa(x)
        sa.load_state_dict(sb.state_dict())
        assert same(sa(x), b(x)) and same(sa(torch._neg_view(x)), b(-x))
        for moved in (lambda s: s.half(), lambda s: s.double(), lambda s: s.to('meta')):
            with pytest.raises(ValueError, match='a sparse layer works in float32 on a CPU'):
                moved(copy.deepcopy(sa))(x)


def test_unet_after_a_pass_with_a_graph():
    from fastai.vision.models.unet import DynamicUnet

    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()
    )
    torch.manual_seed(0)
    model, x = pruned(DynamicUnet(body, 2, (16, 16))), torch.randn(1, 3, 16, 16)
    model(x).mean().backward()
    res = sparse_inference(model, x, seconds=0.05)
    with torch.no_grad():
        assert same(res(x), model(x), 1e-4)


def test_wrong_arguments():
    model, x = pruned(nn.Sequential(nn.Linear(8, 8))), torch.randn(2, 8)
    for call, says in (
        (lambda: sparse_inference(model, x, min_sparsity=90), 'did you mean 0.9'),
        (lambda: sparse_inference(model, x, seconds=0), 'seconds=0: needs a number above 0'),
        (lambda: sparse_inference(model, x, rtol='a'), "rtol='a'"),
        (lambda: sparse_inference(model, None), 'example=NoneType: needs a tensor'),
        (lambda: sparse_inference(model, torch.randn(2, 9)), "the model can't take it"),
        (lambda: sparse_inference('m', x), 'model=str: needs a module'),
        (lambda: sparse_inference(model, x * float('nan')), 'not finite'),
        (lambda: sparse_inference(nn.Sequential(nn.Linear(8, 8), Noise()), x), 'from one call to the next'),
        (lambda: sparse_inference(model, x, seconds=float('inf')), 'seconds=inf'),
        (lambda: sparse_inference(nn.LazyLinear(3), x), 'run a batch through'),
        (lambda: latency({}, x), 'models=dict'),
        (lambda: latency([model], x), 'models=list'),
        (lambda: latency({'a': nn.Linear(8, 8)}, x), r"models\['a'\] is in training mode"),
        (lambda: latency({'a': model}, x, seconds='a'), "seconds='a'"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)
