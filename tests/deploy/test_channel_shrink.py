"Channels cut by groups: outputs, training and files stay the same, and the network is really smaller"

import copy
import math

import pytest
import torch
from channel_nets import Tower
from fastai.basics import (
    SGD,
    Adam,
    Callback,
    CrossEntropyLossFlat,
    DataLoaders,
    Learner,
    MSELossFlat,
    OptimWrapper,
    TfmdDL,
    load_learner,
    ranger,
)
from fastai.callback.tracker import SaveModelCallback
from helpers import randomise
from torch import nn

from fastprune.all import (
    Checkpoint,
    ShrinkCallback,
    Sparsifier,
    SparsifyCallback,
    cyclical,
    linear,
    load_shrunk,
    one_shot,
    save_shrunk,
    shrink,
    taylor,
)
from fastprune.core.channel_graph import find_channels
from fastprune.core.channel_index import Slots
from fastprune.core.channel_norms import hold_norms, release_norms
from fastprune.core.channels import channel_masks
from fastprune.core.masks import Masks
from fastprune.deploy.channel_attention import HeadAttention
from fastprune.deploy.channel_cut import cut_groups, groups_left
from fastprune.deploy.channel_shrink import shrink_channels
from fastprune.deploy.costs import count_flops
from fastprune.learner.inputs import as_inputs, tensors_in
from fastprune.zoo.data import TensorData

pytestmark = pytest.mark.cpu_only  # networks of torchvision, timm and transformers are made there
vision = pytest.importorskip('torchvision').models


def some(groups, seed=1):
    "Random channels to keep: half of each group, but three quarters of heads"
    gen, kept = torch.Generator().manual_seed(seed), []
    for g in groups:
        n = g.n // g.blocks
        left = max(1, round(n * (0.75 if g.kind == 'head' else 0.5)))
        kept.append((torch.rand(g.blocks, n, generator=gen).argsort(1) < left).flatten())
    return kept


def hold(model, groups, kept):
    "Mask channels, and let norms average over the others"
    Masks(channel_masks(groups, kept)).apply_(dict(model.named_parameters()))
    hold_norms(model, Slots(groups, ('norm',), torch.device('cpu')), kept)


def run(model, inputs):
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # of masked networks it would skip the norms' hooks
    try:
        return tensors_in(model(**inputs) if isinstance(inputs, dict) else model(inputs))[0]
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def apart(a, b):
    return float((a - b).abs().max() / a.abs().max())


def sizes_agree(model):
    "Do attributes and shapes of all layers agree?"
    for m in model.modules():
        if isinstance(m, nn.Linear):
            assert m.weight.shape == (m.out_features, m.in_features)
        elif isinstance(m, nn.modules.conv._ConvNd):
            shape = m.out_channels, m.in_channels // m.groups
            shape = (m.in_channels, m.out_channels // m.groups) if m.transposed else shape
            assert m.weight.shape[:2] == shape
        elif isinstance(m, nn.modules.batchnorm._BatchNorm):
            assert {m.num_features} == {len(t) for t in (m.weight, m.bias, m.running_mean, m.running_var)}
        elif isinstance(m, nn.LayerNorm):
            assert m.normalized_shape == m.weight.shape
        elif isinstance(m, (nn.MultiheadAttention, HeadAttention)):
            assert m.out_proj.weight.shape == (m.embed_dim, m.num_heads * m.head_dim)


image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def convnext():
    block = vision.convnext.CNBlockConfig
    return vision.ConvNeXt([block(32, 64, 1), block(64, None, 1)], num_classes=10)


def unet():
    from fastai.vision.all import create_unet_model

    return create_unet_model(vision.resnet18, 2, (32, 32), pretrained=False)


def timm_model(name, **kwargs):
    return lambda: pytest.importorskip('timm').create_model(name, num_classes=10, **kwargs)


def bert():
    t = pytest.importorskip('transformers')
    return t.BertForSequenceClassification(
        t.BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
        self.embed, self.encode, self.head = nn.Embedding(100, 32), nn.TransformerEncoder(layer, 2), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.encode(self.embed(x)).mean(1))


words = torch.randint(0, 100, (2, 7), generator=torch.Generator().manual_seed(0))
networks = {
    'resnet18': (lambda: vision.resnet18(num_classes=10), image, 0.28),
    'resnet50': (lambda: vision.resnet50(num_classes=10), image, 0.28),
    'mobilenet': (lambda: vision.mobilenet_v2(num_classes=10), image, 0.35),
    'efficientnet': (lambda: vision.efficientnet_b0(num_classes=10), image, 0.35),
    'densenet': (lambda: vision.DenseNet(8, (2, 2, 2), 16, num_classes=10), image, 0.35),
    'convnext': (convnext, image, 0.35),
    'groups': (
        lambda: vision.ResNet(vision.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10, groups=4, width_per_group=8),
        image,
        0.35,
    ),
    'unet': (unet, image, 0.35),
    'vit of torchvision': (lambda: vision.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10), image, 0.45),
    'vit of timm': (timm_model('vit_tiny_patch16_224', img_size=32, depth=2), image, 0.45),
    'bert': (bert, dict(input_ids=words), 0.45),
    'encoder': (Encoder, words, 0.55),
}


@pytest.mark.sample(2)
@pytest.mark.parametrize('name', networks)
def test_outputs_stay_the_same(name, tmp_path):
    "Without masked channels, and from a file"
    make, x, most = networks[name]
    torch.manual_seed(0)
    model = randomise(make())
    groups, n = find_channels(model, x), sum(p.numel() for p in model.parameters())
    kept = some(groups)
    hold(model, groups, kept)
    with torch.no_grad():
        before, flops = run(model, x), count_flops(model, as_inputs(x, model))
        release_norms(model)
        cuts = cut_groups(model, groups, kept)
        after = run(model, x)
    assert apart(before, after) < 1e-5
    assert sum(p.numel() for p in model.parameters()) < most * n
    sizes_agree(model)
    if name == 'resnet50':
        assert count_flops(model, as_inputs(x, model)) <= 0.3 * flops
    for k, left in zip(kept, groups_left(groups, kept, cuts), strict=True):
        assert left.n == k.sum()
        for p in left.places:
            assert p.role == 'norm' or model.state_dict()[p.name].shape == left.shapes[p.name]
        assert all(set(p.channels.tolist()) <= set(range(left.n)) for p in left.places)
    save_shrunk(model, tmp_path / 'small')
    again = load_shrunk(tmp_path / 'small', make).eval()
    with torch.no_grad():
        assert torch.equal(run(again, x), after)
    assert not any(t.is_meta for t in again.state_dict().values())
    run(model.train(), x).float().square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


class Residual(nn.Module):
    def __init__(self, c, inner):
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(c, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, c, 3, padding=1, bias=False),
            nn.BatchNorm2d(c),
        )

    def forward(self, x):
        return (x + self.block(x)).relu()


def small_resnet():
    stem = nn.Sequential(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    return nn.Sequential(stem, nn.Sequential(Residual(12, 8), Residual(12, 16)), head)


class Track(Callback):
    order = 60

    def before_fit(self):
        self.values = []

    def after_loss(self):
        if self.training:
            self.values.append(float(self.loss.detach()))


def learner(opt=SGD, seed=0, **kwargs):
    "A Learner of a small network, without shuffling, with masks of channels"
    torch.manual_seed(seed)
    x, y = torch.randn(80, 1, 8, 8), torch.randint(0, 10, (80,))
    model = randomise(small_resnet())
    splitter = lambda m: [list(o.parameters()) for o in m]
    learn = Learner(make_dls(x, y), model, CrossEntropyLossFlat(), opt, splitter=splitter, cbs=Track(), **kwargs)
    groups = find_channels(model, x[:2])
    learn.masks = channel_masks(groups, some(groups))
    return learn


def make_dls(x, y):
    data, few = (TensorData(x[:n], y[:n], list(range(10))) for n in (80, 8))
    return DataLoaders(*(TfmdDL(o, bs=8, num_workers=0) for o in (data, few)))


def fit(learn, n=1, lr=1e-2):
    with learn.no_bar(), learn.no_logging():
        learn.fit(n, lr)
    return torch.tensor(learn.track.values)


def torch_adam(params, lr, **kwargs):
    return OptimWrapper(params, torch.optim.Adam, lr=lr)


@pytest.mark.sample(2)
@pytest.mark.parametrize('opt', [SGD, Adam, ranger, torch_adam], ids=['sgd', 'adam', 'lookahead', 'torch'])
def test_training_goes_on_as_with_masks(opt):
    kwargs = dict(moms=(0.9, 0.9, 0.9)) if opt is not torch_adam else {}
    both = [learner(opt, **kwargs) for _ in range(2)]
    assert torch.equal(*(fit(o) for o in both))
    masked, small = both
    optimizer, rates = small.opt, [h['lr'] for h in small.opt.hypers]
    table = small.shrink(n_items=4, repeats=1)
    assert small.opt is optimizer and [h['lr'] for h in optimizer.hypers] == rates
    n = [sum(p.numel() for p in o.model.parameters()) for o in both]
    assert n[1] < 0.35 * n[0] and table.loc['total', 'weights_after'] == n[1]
    assert table.loc['total', 'FLOPs_after'] < 0.35 * table.loc['total', 'FLOPs']
    losses = [fit(o, 2, slice(1e-3, 1e-2)) for o in both]
    assert len(losses[0]) == 20
    torch.testing.assert_close(*losses, atol=1e-4, rtol=0)
    assert small.masks is None  # nothing is left to prune


def test_freezing_and_groups_survive():
    learn = learner(Adam)
    learn.create_opt()
    learn.freeze_to(1)
    frozen = [[p.requires_grad for p in ps] for ps in learn.opt.param_lists]
    learn.shrink(n_items=4, repeats=0)
    assert learn.opt.frozen_idx == 1 and [[p.requires_grad for p in ps] for ps in learn.opt.param_lists] == frozen
    sizes = [[p.shape for p in ps] for ps in learn.opt.param_lists]
    assert sizes == [[p.shape for p in o.parameters()] for o in learn.model]
    learn.unfreeze()
    assert fit(learn).isfinite().all()


class Average(Callback):
    "Copies of weights, as other libraries keep them"

    def before_fit(self):
        if hasattr(self, 'model_copy'):
            return
        self.model_copy = torch.optim.swa_utils.AveragedModel(self.model)
        self.by_name = {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def after_step(self):
        self.model_copy.update_parameters(self.model)


def test_averages_are_cut():
    learn = learner()
    learn.add_cb(Average())
    fit(learn)
    x = learn.dls.one_batch()[0]
    with torch.no_grad():
        before = learn.average.model_copy.module.eval()(x)
    learn.shrink(n_items=4, repeats=0)
    with torch.no_grad():
        assert apart(before, learn.average.model_copy(x)) < 1e-5
    assert [t.shape for t in learn.average.by_name.values()] == [p.shape for p in learn.model.parameters()]
    fit(learn)


class Boxed(nn.Module):
    "A copy of the model inside a module, as timm's averages are"

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)


def test_copies_in_a_box_are_cut():
    learn = learner()
    fit(learn)
    keeper = Callback()
    keeper.box, x = Boxed(learn.model), learn.dls.one_batch()[0]
    learn.add_cb(keeper)
    box = keeper.box.module.eval()
    with torch.no_grad():
        before = box(x)
        learn.shrink(n_items=4, repeats=0)
        assert apart(before, box(x)) < 1e-5
    assert [p.shape for p in box.parameters()] == [p.shape for p in learn.model.parameters()]


@pytest.mark.parametrize('norm', [nn.BatchNorm2d, lambda n: nn.GroupNorm(1, n)])
def test_other_masks_instead_of_channels(norm):
    x, y = torch.randn(80, 1, 8, 8), torch.randint(0, 10, (80,))
    learn = Learner(make_dls(x, y), Tower(norm), CrossEntropyLossFlat(), cbs=Track())
    learn.prune(0.5, granularity='channel')
    weights = Masks({n: m for n, m in learn.masks.items() if m.ndim > 1})
    learn.keep_masks.hold(weights, (taylor, 'local', 'weight'))
    if norm is nn.BatchNorm2d:
        learn.shrink(n_items=4, repeats=0)
        assert learn.keep_masks.channels is None
        fit(learn)
    else:
        with pytest.raises(ValueError, match='averages over the channels that masks'):
            learn.shrink(n_items=4, repeats=0)


def test_masks_that_norms_know_of_are_cut():
    "Those of a Sparsifier, which leaves its hooks on norms over channels"
    torch.manual_seed(0)
    model, x = Tower(lambda n: nn.GroupNorm(1, n)), torch.randn(8, 1, 8, 8)
    opt = torch.optim.SGD(model.parameters(), 0.01)
    pruner = Sparsifier(model, SparsifyCallback(0.5, granularity='channel', schedule=linear), 3, opt, example=x)
    for _ in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        pruner.step()
    pruner.finish()
    small, table = shrink(model.eval(), x, repeats=0, masks=pruner.masks)
    assert table.loc['total', 'weights_after'] < 0.6 * table.loc['total', 'weights']
    with torch.no_grad():
        assert torch.allclose(small(x), model(x), atol=1e-5)


def test_the_table_counts_outputs():
    up = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2), nn.ReLU(), nn.Conv2d(8, 2, 1))
    x, y = torch.randn(20, 1, 8, 8), torch.randn(20, 2, 7, 7)
    learn = Learner(make_dls(x, y), up, MSELossFlat())
    learn.prune(0.5, granularity='channel', include='2')
    table = learn.shrink(n_items=4, repeats=0)
    assert table.loc['2', ['filters', 'filters_after']].tolist() == [8, 4]


def test_round_to():
    learn = learner()
    with pytest.raises(ValueError, match='round_to=64: the widest group has 16'):
        learn.shrink(round_to=64, repeats=0)
    learn.shrink(n_items=4, repeats=0, round_to=4)
    widths = [m.out_channels for m in learn.model.modules() if isinstance(m, nn.Conv2d)]
    assert widths == [8, 4, 8, 8, 8]
    assert learn.masks.sparsity > 0  # zeros that stay are held
    fit(learn)


def test_files(tmp_path):
    learn = learner()
    learn.path = tmp_path
    learn.save('wide')
    learn.shrink(n_items=4, repeats=0)
    with pytest.raises(ValueError, match='load_shrunk'):
        learn.load('wide')
    x = learn.dls.one_batch()[0]
    with torch.no_grad():
        before = learn.model.eval()(x)
    learn.save('small')
    learn.load('small')
    learn.export()
    loaded = load_learner(tmp_path / 'export.pkl')
    with torch.no_grad():
        assert torch.equal(loaded.model.eval()(x), before)
        save_shrunk(learn, tmp_path / 'small')
        assert torch.equal(load_shrunk(tmp_path / 'small', small_resnet).eval()(x), before)


def test_attention_that_was_cut_is_found_again(tmp_path):
    "Its heads can be cut further, and the file is that of the model"
    torch.manual_seed(0)
    model = randomise(Encoder())
    groups = find_channels(model, words)
    kept = some(groups)
    left = groups_left(groups, kept, cut_groups(model, groups, kept))
    assert isinstance(model.encode.layers[0].self_attn, HeadAttention)
    again = find_channels(model, words)
    assert [(g.name, g.n, g.kind) for g in again] == [(g.name, g.n, g.kind) for g in left]
    kept = some(again, seed=2)
    hold(model, again, kept)
    with pytest.raises(ValueError, match='call `shrink` first'):
        save_shrunk(model, tmp_path / 'small')
    with torch.no_grad():
        before = run(model, words)
        release_norms(model)
        cut_groups(model, again, kept)
        assert apart(before, run(model, words)) < 1e-5
        save_shrunk(model, tmp_path / 'small')
        assert torch.equal(run(load_shrunk(tmp_path / 'small', Encoder).eval(), words), run(model, words))


def test_export_for_where_fastprune_is_not_installed(tmp_path):
    learn = learner()
    learn.cbs, learn.path = learn.cbs.filter(lambda cb: not isinstance(cb, Track)), tmp_path
    learn.model = nn.Sequential(*learn.model)
    learn.shrink(n_items=4, repeats=0)
    hooks = len(learn.model._load_state_dict_pre_hooks)
    learn.model[1][0].block = nn.Sequential(*learn.model[1][0].block)
    assert learn.export_plain('plain.pkl').exists()
    assert hooks == len(learn.model._load_state_dict_pre_hooks) == 1


def test_wrong_files(tmp_path):
    learn = learner()
    learn.shrink(n_items=4, repeats=0)
    save_shrunk(learn.model, tmp_path / 'small')
    with pytest.raises(ValueError, match='another architecture'):
        load_shrunk(tmp_path / 'small', lambda: vision.resnet18(num_classes=10))
    with pytest.raises(ValueError, match='meta device'):
        load_shrunk(tmp_path / 'small', lambda: torch.ones(1).item())
    with pytest.raises(ValueError, match="can't be read"):
        load_shrunk(tmp_path / 'none', small_resnet)


def test_masks_that_do_not_fit_are_named():
    learn = learner()
    groups = find_channels(learn.model, learn.dls.one_batch()[0])
    kept = some(groups)
    with torch.no_grad():
        learn.model[0][1].bias.fill_(1)
        learn.model[2][2].weight.fill_(1)
    with pytest.raises(ValueError, match="those of '0.0.weight'"):
        shrink_channels(learn.model, as_inputs(learn.dls.one_batch()[0], learn.model), groups, kept, repeats=0)


def small_mlp():
    "A network with a LayerNorm over channels that are cut, and dropout of 0"
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 24), nn.LayerNorm(24), nn.GELU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 10)
    )


def trained(make, opt, pruning, shrinking, epochs=4, **kwargs):
    "Losses of a fit, and the Learner"
    torch.manual_seed(0)
    x, y = torch.randn(80, 1, 8, 8), torch.randint(0, 10, (80,))
    learn = Learner(make_dls(x, y), randomise(make()), CrossEntropyLossFlat(), opt, cbs=Track(), **kwargs)
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, 1e-2, cbs=[pruning(), *([shrinking] if shrinking else [])])
    return torch.tensor(learn.track.values), learn


schedules = {
    'no recovery': dict(recover=False),
    'no recovery, global': dict(recover=False, scope='global', schedule=one_shot),
    'one shot': dict(schedule=one_shot),
    "cyclical": dict(schedule=cyclical(linear, 2)),
    'by taylor': dict(recover=False, criterion=taylor),
}


fits = [('no recovery', small_resnet), *((k, small_mlp) for k in schedules), ('one shot', small_resnet)]


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind, make', fits, ids=lambda o: o if isinstance(o, str) else o.__name__)
def test_cutting_during_a_fit_changes_no_loss(kind, make):
    "The same losses and channels as with masks alone"
    pruning = lambda: SparsifyCallback(0.5, granularity='channel', **schedules[kind])
    opt = SGD if make is small_mlp else Adam
    shrinking = ShrinkCallback()
    (before, masked), (after, small) = (trained(make, opt, pruning, s) for s in (None, shrinking))
    torch.testing.assert_close(before, after, atol=1e-4, rtol=0)
    table = masked.shrink(n_items=4, repeats=0)
    sizes = [[tuple(p.shape) for p in o.model.parameters()] for o in (masked, small)]
    assert sizes[0] == sizes[1]
    for a, b in zip(masked.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)
    assert shrinking.weights == sorted(shrinking.weights, reverse=True) and len(shrinking.items_per_s) == 4
    assert table.loc['total', 'weights_after'] == sum(p.numel() for p in small.model.parameters())
    if kind == 'cyclical':
        assert len(set(shrinking.weights)) == 1  # channels could return until the end
    elif kind != 'by taylor':
        assert shrinking.weights[-1] < shrinking.weights[0]
    assert small.recorder.values[-1][-2] == masked.recorder.values[-1][-1] == pytest.approx(0.5, abs=0.05)


def test_held_masks_are_cut_in_a_plain_fit():
    learn, shrinking = learner(), ShrinkCallback(every=2)
    with learn.no_bar(), learn.no_logging():
        learn.fit(4, 1e-2, cbs=shrinking)
    assert learn.masks is None
    assert shrinking.weights[0] == shrinking.weights[1] > shrinking.weights[2] == shrinking.weights[3]


def test_shrinking_in_a_fit_refuses_what_loads_wide_weights(tmp_path):
    learn = learner()
    learn.path = tmp_path
    for other in (Checkpoint('fit'), SaveModelCallback()):
        with pytest.raises(ValueError, match='call `learn.shrink'), learn.no_bar(), learn.no_logging():
            learn.fit(1, 1e-2, cbs=[ShrinkCallback(), other])


attention = {
    'self': dict(),
    'batch first': dict(batch_first=True),
    'other keys': dict(kdim=12, vdim=10),
    'no bias': dict(bias=False),
}


@pytest.mark.parametrize('kind', attention)
def test_attention_is_as_torch(kind):
    "All arguments, with weights and without"
    torch.manual_seed(0)
    m = randomise(nn.MultiheadAttention(16, 4, **attention[kind]))
    ours, first = HeadAttention(copy.deepcopy(m)), m.batch_first
    q, k, v = (torch.randn(2, n, d) for n, d in ((5, 16), (6, m.kdim), (6, m.vdim)))
    if kind != 'other keys':
        q = k = v = torch.randn(2, 6, 16)
    inputs = [t if first else t.transpose(0, 1) for t in (q, k, v)]
    causal = torch.full((q.shape[1], 6), -math.inf).triu(1)
    padding = torch.arange(6).expand(2, 6) > 3
    for given in (
        {},
        dict(attn_mask=causal),
        dict(attn_mask=causal < 0),
        dict(attn_mask=causal.expand(8, -1, -1)),
        dict(key_padding_mask=padding),
        dict(key_padding_mask=padding, attn_mask=causal < 0),
        dict(attn_mask=causal, is_causal=True),
    ):
        for more in (dict(need_weights=False), dict(), dict(average_attn_weights=False)):
            a, b = m(*inputs, **given, **more), ours(*inputs, **given, **more)
            torch.testing.assert_close(a[0], b[0], atol=1e-5, rtol=0)
            assert (a[1] is None) == (b[1] is None)
            if a[1] is not None:
                torch.testing.assert_close(a[1], b[1], atol=1e-5, rtol=0)
    one = [t[0] for t in (q, k, v)]
    torch.testing.assert_close(m(*one)[0], ours(*one)[0], atol=1e-5, rtol=0)


def test_the_table_has_a_column_for_speed(capsys):
    learn, shrinking = learner(), ShrinkCallback()
    learn.remove_masks()
    learn.fit(2, cbs=[SparsifyCallback(0.5, granularity='channel', recover=False), shrinking])
    names = learn.recorder.metric_names
    assert list(names)[-2:] == ['items/s', 'time'] and 'items/s' in capsys.readouterr().out
    assert [v[-1] for v in learn.recorder.values] == shrinking.items_per_s
    assert all(len(v) == len(names) - 2 for v in learn.recorder.values)


def test_cuts_need_channels():
    learn = learner()
    learn.remove_masks()
    with pytest.raises(ValueError, match="granularity='weight': use granularity='channel'"):
        learn.fit(1, cbs=[SparsifyCallback(0.5), ShrinkCallback()])
    assert learn.masks is None


class Flat(Callback):
    "As NonNativeMixedPrecision(flat_master=True), which needs a GPU"

    flat_master = True

    def before_fit(self):
        self.master_pgs, self.model_pgs = [[]], [[]]


def test_one_tensor_for_all_parameters_is_an_error_before_anything_is_cut():
    learn, fitted = learner(), Callback()
    state = {n: t.shape for n, t in learn.model.state_dict().items()}
    fitted.after_batch = lambda: pytest.fail('it trains')
    with pytest.raises(ValueError, match='flat_master=True'), learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2, cbs=[ShrinkCallback(), Flat(), fitted])
    learn.add_cb(Flat()).flat.before_fit()
    with pytest.raises(ValueError, match='flat_master=True'):
        learn.shrink(repeats=0)
    assert {n: t.shape for n, t in learn.model.state_dict().items()} == state


def test_the_table_counts_flops_for_one_item():
    "As `learn.flops` does, for whatever number of items is timed"
    learn = learner()
    dense = learn.flops().dense['total']
    table = learn.shrink(n_items=4, repeats=0)
    assert table.loc['total', ['FLOPs', 'FLOPs_after']].tolist() == [dense, learn.flops().dense['total']]


@pytest.mark.parametrize('opt', [SGD, Adam])
def test_grouped_convolutions_train_on_after_a_cut(opt):
    "Their gradients are cut in blocks"
    model = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    learn = Learner(
        make_dls(torch.randn(32, 1, 8, 8), torch.arange(32) % 4), model, nn.CrossEntropyLoss(), opt, cbs=Track()
    )
    fit(learn)
    learn.prune(0.5, granularity='channel')
    fit(learn)
    learn.shrink()
    assert model[2].weight.shape == (8, 2, 3, 3) and not any(
        p.grad is not None and p.grad._is_view() for p in model.parameters()
    )
    before = model[2].weight.clone()
    fit(learn)
    assert not torch.equal(before, model[2].weight)


class EncoderDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 16)
        self.transformer = nn.Transformer(16, 4, 1, 1, 24, batch_first=True)
        self.query, self.out = nn.Parameter(torch.randn(1, 3, 16)), nn.Linear(16, 4)

    def forward(self, x):
        return self.out(self.transformer(self.inner(x), self.query.expand(len(x), -1, -1)).mean(1))


def test_a_transformer_that_compares_widths_keeps_them():
    "`nn.Transformer.forward` raises an error for inputs of another width than its own"
    learn = Learner(
        make_dls(torch.randn(32, 5, 4), torch.arange(32) % 4), EncoderDecoder(), nn.CrossEntropyLoss(), cbs=Track()
    )
    fit(learn)
    learn.prune(0.5, granularity='channel')
    before, x = learn.model.eval()(torch.ones(2, 5, 4)), torch.ones(2, 5, 4)
    learn.shrink()
    model = learn.model
    assert model.inner.out_features == 16 and model.transformer.encoder.layers[0].linear1.out_features == 12
    assert torch.allclose(before, model.eval()(x), atol=1e-5)
    fit(learn)


def test_retraining_after_a_cut():
    learn = learner()
    fit(learn)
    learn.prune(0.5, granularity='channel')
    learn.shrink()
    assert learn.masks is None
    with learn.no_bar(), learn.no_logging():
        learn.retrain(1, 'llr')
        with pytest.raises(ValueError, match='ALLR needs the change by pruning'):
            learn.retrain(1, 'allr')
        with pytest.raises(ValueError, match='nothing is pruned'):
            learn.retrain(1, 'llr', params='norm')
    assert max(learn.recorder.lrs) > 0


def test_a_model_without_channels_says_what_is_in_the_way():
    learn = Learner(make_dls(torch.randn(32, 5, 4), torch.arange(32) % 4), nn.Sequential(), nn.CrossEntropyLoss())
    learn.model.append(nn.Flatten()).append(nn.Linear(20, 4))
    with pytest.raises(ValueError, match="can be cut, because of an output of the model \\('1.weight'\\)"):
        learn.prune(0.5, granularity='channel')
