"`learn.reconstruct` and `learn.prune(reconstruct=...)`: the solution, what stays as it was, and what is left out"

import copy

import numpy as np
import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, set_seed
from helpers import Conv1D
from torch import nn
from torch.nn import functional as F

from fastprune.all import CRITERIA, Masks, prunable_weights
from fastprune.core.least_squares import fit_rows
from fastprune.core.protocol import as_batches
from fastprune.criteria.layer_inputs import InputSums, linear_maps
from fastprune.learner.batches import undisturbed


def learner(model, *shape, n=32, bs=8, n_out=4, dtype=torch.float32):
    "A Learner with random batches in a fixed order"
    set_seed(0)
    items = [(torch.randn(*shape).to(dtype), torch.randint(0, n_out, ())) for _ in range(n)]
    dls = DataLoaders.from_dsets(items, items, bs=bs, device='cpu', num_workers=0)
    return Learner(dls, model, loss_func=CrossEntropyLossFlat())


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


class Block(nn.Module):
    "As in torchvision's ResNets: ReLU and the sum change their input in place, two layers have the same input"

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out)
        self.conv2, self.bn2 = nn.Conv2d(c_out, c_out, 3, 1, 1, groups=2), nn.BatchNorm2d(c_out)
        self.shortcut, self.relu = nn.Conv2d(c_in, c_out, 1, stride), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def resnet(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(Block(3, 4), Block(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 2)
    return net


LAYERS = {
    'linear': (lambda: nn.Linear(6, 5), (6,)),
    'linear, tokens': (lambda: nn.Linear(6, 5), (7, 6)),
    'in out': (lambda: Conv1D(6, 5), (7, 6)),
    'conv1d': (lambda: nn.Conv1d(4, 6, 3, padding=2, dilation=2, padding_mode='replicate'), (4, 9)),
    'conv2d': (lambda: nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(1, 0), bias=False), (3, 7, 8)),
    'same': (lambda: nn.Conv2d(3, 5, (2, 3), padding='same', padding_mode='reflect'), (3, 7, 8)),
    'groups': (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 7, 7)),
    'depthwise': (lambda: nn.Conv2d(4, 8, 3, groups=4, padding=1, padding_mode='circular'), (4, 7, 7)),
    'conv3d': (lambda: nn.Conv3d(2, 3, 2, stride=2), (2, 4, 5, 4)),
}


def column_inputs(layer, x):
    "The inputs of each weight, by the outputs of the layer for weights that are 1 alone: [weights, outputs]"
    columns = []
    for i in range(layer.weight.numel()):
        one = torch.zeros_like(layer.weight).view(-1)
        one[i] = 1
        with torch.no_grad():
            alone = torch.func.functional_call(layer, {'weight': one.view_as(layer.weight)}, (x,))
            alone -= torch.func.functional_call(layer, {'weight': torch.zeros_like(layer.weight)}, (x,))
        columns.append(alone.flatten())
    return torch.stack(columns)


@pytest.mark.parametrize('kind', LAYERS)
def test_the_solution_is_numpys(kind):
    "For each kind of layer, with inputs of the dense network that differ, and uneven supports"
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer = make().double()
    x, source = torch.randn(4, *shape).double(), torch.randn(4, *shape).double()
    dense = layer.weight.detach().clone()
    kept = torch.rand_like(dense) > 0.6
    each = linear_maps(layer, {'weight': layer.weight})['weight']
    sums = InputSums(each, each.rows(dense))
    for a, b in zip(x.split(3), source.split(3), strict=True):
        sums.add(a, a + b)
    start = each.rows(dense * kept)
    found = each.shaped(fit_rows(sums.gram, sums.cross, start, each.rows(kept), 0.01)).reshape(-1)
    columns, targets = column_inputs(layer, x).numpy(), column_inputs(layer, x + source).T @ dense.view(-1)
    rows = each.shaped(torch.arange(start.shape[0] * start.shape[1])[:, None].expand(-1, start.shape[2])[None])
    rows, mask, want = rows.reshape(-1).numpy(), kept.view(-1).numpy(), np.zeros(dense.numel())
    per_group = start.shape[1]
    for g in range(start.shape[0]):
        own = [np.flatnonzero(rows == r) for r in range(g * per_group, (g + 1) * per_group)]
        added = 0.01 * np.mean(np.square(columns[own[0]]).sum(1))
        for weights in own:
            s = weights[mask[weights]]
            gram = columns[s] @ columns[s].T + added * np.eye(len(s))
            right = columns[s] @ columns_target(columns, weights, targets.numpy()) + added * dense.view(-1).numpy()[s]
            want[s] = np.linalg.solve(gram, right)
    np.testing.assert_allclose(found.numpy(), want, rtol=1e-5, atol=1e-8)


def columns_target(columns, weights, targets):
    "The targets at the outputs that a row of weights makes, 0 elsewhere"
    reached = np.zeros(len(targets), bool)
    # a row's outputs follow from where its columns can be other than 0 in any of the inputs
    reached[np.abs(columns[weights]).sum(0) > 0] = True
    return np.where(reached, targets, 0)


def by_hand(learn, dense, masks, n_batches, damping):
    "Layer by layer with whole passes of two copies of the network, and numpy"
    with undisturbed(learn):
        taken = as_batches(learn).take(n_batches)
    x = torch.cat([b[0] for b in taken])
    pruned = copy.deepcopy(learn.model).eval()
    whole = copy.deepcopy(pruned)
    whole.load_state_dict(dense)
    order = ['0.conv1', '0.shortcut', '0.conv2', '1.conv1', '1.shortcut', '1.conv2', '4']
    for name in order:
        a, b = (dict(net.named_modules())[name] for net in (pruned, whole))
        ins = []
        for net, m in ((pruned, a), (whole, b)):
            hook = m.register_forward_pre_hook(lambda m, args, ins=ins: ins.append(args[0].clone()))
            with torch.no_grad():
                net(x)
            hook.remove()
        columns = []
        for t in ins:
            if isinstance(a, nn.Linear):
                columns.append(t.double().T[None].numpy())
                continue
            t = F.unfold(t.double(), a.kernel_size, padding=a.padding, stride=a.stride)
            t = t.unflatten(1, (a.groups, -1)).permute(1, 2, 0, 3)
            columns.append(t.flatten(2).numpy())
        new = np.zeros((len(columns[0]), len(a.weight) // len(columns[0]), columns[0].shape[1]))
        rows = lambda t, shape=new.shape: t.detach().double().view(shape).numpy()
        kept = masks[f'{name}.weight'].view(new.shape).numpy()
        for g, (xs, ys) in enumerate(zip(*columns, strict=True)):
            gram = xs @ xs.T
            added = damping * np.diag(gram).mean()
            for r in range(new.shape[1]):
                s = kept[g, r]
                right = xs[s] @ (rows(b.weight)[g, r] @ ys) + added * rows(a.weight)[g, r, s]
                new[g, r, s] = np.linalg.solve(gram[np.ix_(s, s)] + added * np.eye(s.sum()), right)
        with torch.no_grad():
            a.weight.copy_(torch.tensor(new).view_as(a.weight))
    return pruned.state_dict()


@pytest.fixture(scope='module')
def pruned_resnet():
    "A reconstructed Learner, its dense state, the state before, the table, and the state by hand"
    learn = learner(resnet(), 3, 8, 8)
    learn.create_opt()
    learn.opt.state[learn.model[4].weight]['mom'] = torch.ones(4, 8)
    dense = state(learn.model)
    learn.prune(0.6)
    before = state(learn.model)
    torch.manual_seed(3)
    drawn, want = torch.rand(1), by_hand(learn, dense, learn.masks, 3, 0.02)
    torch.manual_seed(3)
    table = learn.reconstruct(dense, n_batches=3, damping=0.02)
    assert torch.equal(torch.rand(1), drawn)  # random numbers go on as without it
    return learn, dense, before, table, want


def test_layer_by_layer_as_by_hand(pruned_resnet):
    learn, dense, before, table, want = pruned_resnet
    for n, t in learn.model.state_dict().items():
        assert torch.allclose(t, want[n], rtol=1e-5, atol=1e-6), n
    assert (table.after <= table.before).all() and (table.after < 0.9 * table.before).sum() >= 3
    assert list(table.index) == list(learn.masks)


def test_nothing_else_changes(pruned_resnet):
    learn, dense, before, table, want = pruned_resnet
    assert learn.model.training and torch.equal(learn.opt.state[learn.model[4].weight]['mom'], torch.ones(4, 8))
    for n, t in learn.model.state_dict().items():
        assert n in learn.masks or torch.equal(t, dense[n]), n
    for n, m in learn.masks.items():
        pruned = learn.model.state_dict()[n][~m]
        assert not pruned.any() and not pruned.signbit().any()
    assert not any('forward' in vars(m) for m in learn.model.modules())
    assert all(p.grad is None for p in learn.model.parameters())


@pytest.mark.sample(2)
@pytest.mark.parametrize('more', [dict(granularity='2:4'), dict(scope='global'), dict(include=nn.Linear)], ids=str)
def test_prune_reconstructs(more):
    "The masks and ALLR's change are those of pruning alone; what the layers give comes nearer to the dense network"
    learns = [learner(resnet(), 3, 8, 8) for _ in range(2)]
    dense = state(learns[0].model)
    sparsity = 0.5
    learns[0].prune(sparsity, **more)
    learns[1].prune(sparsity, reconstruct=4, **more)
    a, b = learns
    assert all(torch.equal(m, b.masks[n]) for n, m in a.masks.items()) and a.keep_masks.change == b.keep_masks.change
    assert all(torch.equal(t, dense[n]) for n, t in b.model.state_dict().items() if n not in b.masks)
    a.reconstruct(dense, 4)
    assert all(torch.equal(t, b.model.state_dict()[n]) for n, t in a.model.state_dict().items())
    again = b.reconstruct(dense, 4)
    assert (again.after <= again.before).all()


def test_again_after_a_first_prune_and_with_statistics():
    "The dense network is the one before this prune; BatchNorm's statistics come last, and belong to the new weights"
    learn = learner(resnet(), 3, 8, 8)
    learn.prune(0.3, reconstruct=2)
    first = state(learn.model)
    learn.prune(0.6, CRITERIA['obs'], n_batches=2, recover=False, iterations=2, reconstruct=4, recalibrate=4)
    other = learner(resnet(), 3, 8, 8)
    other.model.load_state_dict(first)
    other.masks = learn.masks
    other.reconstruct(first, 4, recalibrate=4)
    for n, t in other.model.state_dict().items():
        assert torch.allclose(t.float(), learn.model.state_dict()[n].float(), atol=1e-6), n


def test_channels():
    "What is left of a layer makes up for channels that have gone"
    learn = learner(nn.Sequential(*[nn.Sequential(nn.Conv2d(i, 8, 3), nn.ReLU()) for i in (3, 8)], nn.Flatten(),
                                  nn.Linear(128, 4)), 3, 8, 8)  # fmt: skip
    plain, dense = copy.deepcopy(learn.model), state(learn.model)
    learn.prune(0.5, granularity='channel')
    table = learn.reconstruct(dense, 4)
    solved = table.dropna()
    assert (solved.after <= solved.before).all() and solved.after['1.0.weight'] < 0.9 * solved.before['1.0.weight']
    x = learn.dls.one_batch()[0]
    assert learn.model(x).shape == plain(x).shape


class Shared(nn.Module):
    "A layer that is called twice, two modules with the same weight, a tied embedding, and a module without calls"

    def __init__(self):
        super().__init__()
        self.twice, self.a, self.b, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.twice(torch.relu(self.twice(x))) + self.a(x))


def test_shared_layers_sum_over_their_calls():
    torch.manual_seed(0)
    learn = learner(Shared(), 6, n_out=6)
    dense = state(learn.model)
    learn.prune(0.5)
    masked, masks = copy.deepcopy(learn.model), learn.masks
    table = learn.reconstruct(dense, 4, damping=0.01)
    assert table.loc['idle.weight'].isna().all() and table.loc[['twice.weight', 'a.weight']].notna().all(axis=None)
    with undisturbed(learn):
        x = torch.cat([b[0] for b in as_batches(learn).take(4)])
    whole = copy.deepcopy(masked)
    whole.load_state_dict(dense)
    ins = []
    for net in (masked, whole):
        with torch.no_grad():
            ins.append(torch.cat([x, torch.relu(net.twice(x))]).double().numpy().T)
    xs, ys = ins
    gram, w0 = xs @ xs.T, masked.twice.weight.detach().double().numpy()
    added = 0.01 * np.diag(gram).mean()
    for r, kept in enumerate(masks['twice.weight'].numpy()):
        right = xs[kept] @ (dense['twice.weight'][r].double().numpy() @ ys) + added * w0[r, kept]
        want = np.linalg.solve(gram[np.ix_(kept, kept)] + added * np.eye(kept.sum()), right)
        assert np.allclose(learn.model.twice.weight[r].detach().numpy()[kept], want, atol=1e-5)


def test_a_transformer_leaves_its_projections():
    "in_proj_weight has no module of its own, and attention does not call out_proj; the fast path stays on"
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.5)
    learn = learner(nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Flatten(), nn.Linear(40, 4)), 5, 8)
    dense = state(learn.model)
    learn.prune(0.5)
    pruned = state(learn.model)
    table = learn.reconstruct(dense, 4)
    left = [n for n in table.index if 'attn' in n]
    assert len(left) == 4 and table.loc[left].isna().all(axis=None)
    assert all(torch.equal(learn.model.state_dict()[n], pruned[n]) for n in left)
    solved = table.drop(left)
    assert (solved.after <= solved.before).all() and torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_and_frozen_weights(dtype):
    "Solved in float64 and rounded at the end, never worse; frozen weights count as in `learn.prune`"
    torch.manual_seed(0)
    learn = learner(nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4)).to(dtype), 12, dtype=dtype)
    learn.loss_func = lambda pred, y: F.cross_entropy(pred.float(), y)
    learn.model.requires_grad_(False)
    dense = state(learn.model)
    learn.prune(0.6)
    table = learn.reconstruct(dense)
    assert (table.after <= table.before).all() and table.after['2.weight'] < table.before['2.weight']
    assert learn.model[0].weight.dtype == dtype


def test_dead_inputs_and_empty_rows_stay():
    "No solution is no change: columns of zeros, and rows that keep nothing"
    learn = learner(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 4)
    with torch.no_grad():
        learn.model[0].bias.fill_(-100)
    dense = state(learn.model)
    learn.masks = Masks({n: torch.arange(4)[:, None].expand(4, 4) > 1 for n in prunable_weights(learn.model)})
    before = state(learn.model)
    table = learn.reconstruct(dense)
    assert torch.equal(learn.model[2].weight, before['2.weight']) and table.after['2.weight'] == 0
    assert torch.equal(learn.model[0].weight[:2], torch.zeros(2, 4))


def test_a_failure_changes_nothing():
    class Fails(nn.Module):
        fails = False

        def forward(self, x):
            if self.fails and not torch.equal(x, x.abs()):
                raise RuntimeError('out of order')
            return x

    learn = learner(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), Fails(), nn.Linear(6, 4)), 6)
    dense = state(learn.model)
    learn.model[3].fails = True
    with pytest.raises(RuntimeError, match='out of order'):
        learn.prune(0.5, reconstruct=True)
    assert learn.masks is None and all(torch.equal(t, dense[n]) for n, t in learn.model.state_dict().items())
    learn.model[3].fails = False
    learn.prune(0.3)
    masks, pruned, change = learn.masks, state(learn.model), learn.keep_masks.change
    learn.model[3].fails = True
    with pytest.raises(RuntimeError, match='out of order'):
        learn.prune(0.6, reconstruct=True)
    assert all(torch.equal(m, masks[n]) for n, m in learn.masks.items()) and learn.keep_masks.change == change
    assert all(torch.equal(t, pruned[n]) for n, t in learn.model.state_dict().items())
    with pytest.raises(RuntimeError, match='out of order'):
        learn.reconstruct(dense)
    assert all(torch.equal(t, pruned[n]) for n, t in learn.model.state_dict().items())
    assert not any('forward' in vars(m) for m in learn.model.modules())


@pytest.mark.parametrize('scale', [1, 1e-25, 1e25])
@pytest.mark.parametrize('kind', ['linear, tokens', 'conv2d', 'same', 'conv1d', 'depthwise', 'positions'])
def test_products_in_float32_give_the_same(kind, scale):
    "Sums of damped problems, for inputs of any size"
    torch.manual_seed(0)
    positions = lambda: nn.Conv2d(4, 6, 3, padding=1, dilation=(2, 1)), (4, 3, 9)
    make, shape = {**LAYERS, 'positions': positions}[kind]
    layer = make()
    each = linear_maps(layer, {'weight': layer.weight})['weight']
    all_sums = [InputSums(each, each.rows(layer.weight.detach()), damping) for damping in (0.01, 0.0)]
    for _ in range(2):
        x, source = scale * torch.rand(40, *shape), scale * torch.rand(40, *shape)
        for sums in all_sums:
            sums.add(x, source)
    single, exact = all_sums
    assert single.like.dtype == torch.float32 and exact.like.dtype == torch.float64
    for name in ('gram', 'cross', 'squares'):
        found, want = getattr(single, name), getattr(exact, name)
        assert found.dtype == torch.float64 and want.any()
        assert (found - want).abs().max() < 1e-6 * want.abs().max(), name
    kept = torch.rand_like(each.rows(layer.weight)) > 0.5
    start = each.rows(layer.weight.detach()).double() * kept
    found, want = (fit_rows(s.gram, s.cross, start, kept, 0.01) for s in all_sums)
    assert torch.allclose(found, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))


def test_inputs_that_are_not_finite():
    "The layer is named, and weights and masks are as before"
    learn = learner(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), 6)
    learn.dls.train_ds[3][0][0] = torch.nan
    dense = state(learn.model)
    with pytest.raises(ValueError, match="the inputs of '0.weight' or its dense weights are not finite"):
        learn.prune(0.5, reconstruct=4)
    assert learn.masks is None and all(torch.equal(t, dense[n]) for n, t in learn.model.state_dict().items())
    with pytest.raises(ValueError, match="'0.weight'.*has NaN"):
        learn.prune(0.5, CRITERIA['obs'], n_batches=4)


def test_the_dense_state_of_a_wrapped_model():
    "A `state_dict` of `torch.compile(model)`, a model like it, and one of the model inside are the same"
    tables = []
    for given in (state, copy.deepcopy, lambda model: state(model._orig_mod)):
        torch.manual_seed(0)
        model = torch.compile(nn.Sequential(nn.Linear(6, 4)), backend='eager')
        learn = learner(model, 6)
        dense = given(learn.model)
        learn.prune(0.5)
        tables.append(learn.reconstruct(dense, 2))
    assert all(t.equals(tables[0]) and t.notna().all(axis=None) for t in tables)


def test_what_it_says_about_arguments():
    learn = learner(nn.Sequential(nn.Linear(6, 4)), 6)
    dense = state(learn.model)
    for wrong in (0, -1, 1.5, None, 'yes'):
        with pytest.raises(ValueError, match=f'reconstruct={wrong!r}: needs True, False, or a whole number'):
            learn.prune(0.5, reconstruct=wrong)
    assert learn.masks is None
    with pytest.raises(ValueError, match='nothing is pruned: call'):
        learn.reconstruct(dense)
    learn.prune(0.5)
    with pytest.raises(ValueError, match='n_batches=0: needs'):
        learn.reconstruct(dense, 0)
    with pytest.raises(ValueError, match='damping=0: needs a number above 0'):
        learn.reconstruct(dense, damping=0)
    with pytest.raises(ValueError, match="is the pruned weight itself. Copy the network before"):
        learn.reconstruct(learn.model.state_dict())
    with pytest.raises(ValueError, match=r"dense\['0.weight'\]: needs a tensor of shape \(4, 6\), got none"):
        learn.reconstruct({})
    with pytest.raises(ValueError, match='dense=list: needs the dense network'):
        learn.reconstruct([])
    recurrent = learner(nn.Sequential(nn.LSTM(6, 4)), 5, 6)
    with pytest.raises(ValueError, match='none of the pruned weights belongs to a linear layer'):
        recurrent.prune(0.5, reconstruct=True)
    assert recurrent.masks is None


def test_compiled_models_run_eagerly():
    torch.manual_seed(0)
    learns = [learner(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)), 6) for _ in range(3)]
    learns[1].model.load_state_dict(learns[0].model.state_dict())
    learns[2].model.load_state_dict(learns[0].model.state_dict())
    learns[1].model = torch.compile(learns[1].model, backend='eager')
    learns[2].model.compile(backend='eager')
    for learn in learns:
        learn.prune(0.5, reconstruct=2)
    want, *found = [list(learn.model.parameters()) for learn in learns]
    for params in found:
        assert all(torch.equal(a, b) for a, b in zip(want, params, strict=True))
