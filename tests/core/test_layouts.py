"Which side of a weight the inputs are on: [out, in], [in, out], and experts in one tensor"

import pytest
import torch
import torch.nn.functional as F
from fastai.basics import CrossEntropyLossFlat, DataLoader, DataLoaders, Learner
from torch import nn

from fastprune.all import DST, SparsifyCallback, compute_masks, prunable_weights, sparse_inference, wanda
from fastprune.core.granularity import count_units
from fastprune.core.layouts import transposed_groups

OUT_IN, IN_OUT = '[experts, out, in]', '[experts, in, out]'


class Conv1D(nn.Module):
    "As in GPT-2"

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n_in, n_out) / 8), nn.Parameter(torch.randn(n_out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class Product(nn.Module):
    "A user's own"

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_in, n_out) / 8)

    def forward(self, x):
        return x @ self.weight


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 64) / 8), nn.Parameter(torch.randn(3, 4, 16) / 4)

    def forward(self, x):
        return sum(F.linear(F.linear(x, self.up[i]).relu(), self.down[i]) for i in range(3))


class Turned(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 64, 16) / 8), nn.Parameter(torch.randn(3, 16, 4) / 4)

    def forward(self, x):
        return torch.einsum('ebf,efd->bd', torch.bmm(x.expand(3, -1, -1), self.up).relu(), self.down)


layers = {
    'Conv1D': (lambda: Conv1D(64, 4), {'0.weight': 1}),
    'x @ weight': (lambda: Product(64, 4), {'0.weight': 1}),
    'experts': (Experts, {'0.up': OUT_IN, '0.down': OUT_IN}),
    'experts, turned': (Turned, {'0.up': IN_OUT, '0.down': IN_OUT}),
    'Linear': (lambda: nn.Linear(64, 4), {}),
}


def make(kind, *more):
    torch.manual_seed(0)
    dl = DataLoader([(torch.randn(64), torch.tensor(i % 4)) for i in range(64)], bs=16, drop_last=True)
    return Learner(DataLoaders(dl, dl), nn.Sequential(layers[kind][0](), *more), loss_func=CrossEntropyLossFlat())


def fit(learn, *args, **kwargs):
    with learn.no_bar(), learn.no_logging():
        learn.fit(*args, **kwargs)
    return learn


def rows_of(t, layout):
    return (
        t.t()
        if layout == 1
        else t.flatten(0, 1)
        if layout == OUT_IN
        else t.transpose(1, 2).flatten(0, 1)
        if layout == IN_OUT
        else t
    )


@pytest.mark.parametrize('kind', layers)
def test_layouts_are_read_from_code(kind):
    assert transposed_groups(make(kind).model) == layers[kind][1]


@pytest.mark.sample(2)
@pytest.mark.parametrize('kind', layers)
@pytest.mark.parametrize('how', ['prune', 'fit'])
def test_rows_and_blocks_go_along_the_inputs(kind, how):
    for granularity in ('row', '2:4', '2x4', *(['filter'] if 'experts' in kind else ['column'])):
        learn = make(kind)
        if how == 'prune':
            learn.prune(0.5, granularity=granularity)
        else:
            fit(learn, 2, cbs=SparsifyCallback(0.5, granularity=granularity))
        for n, m in learn.masks.items():
            rows = rows_of(m, layers[kind][1].get(n, 0))
            if granularity == '2:4':
                assert (rows.reshape(len(rows), -1, 4).sum(2) == 2).all()
            elif granularity == '2x4':
                blocks = rows.reshape(len(rows) // 2, 2, -1, 4)
                assert torch.equal(blocks.amax((1, 3)), blocks.amin((1, 3)))
                assert 2 * int((~rows).sum()) == rows.numel()
            elif granularity == 'column':
                assert ((rows.all(0)) | ~rows.any(0)).all()
            else:
                assert (rows.all(1) | ~rows.any(1)).all() and int((~rows.any(1)).sum()) == len(rows) // 2
            w = learn.model.get_parameter(n)
            assert torch.equal(w != 0, m) and m.is_contiguous()


@pytest.mark.parametrize('layout, shape', [(1, (6, 8)), (OUT_IN, (3, 6, 8)), (IN_OUT, (3, 8, 6))])
@pytest.mark.parametrize('granularity', ['row', '2:4', '1:2', '3x4'])
@pytest.mark.parametrize('scope', ['local', 'global', 'erk'])
def test_masks_equal_those_of_the_matrix_as_it_is_in_a_linear_layer(layout, shape, granularity, scope):
    torch.manual_seed(0)
    w = torch.randn(shape) if layout != 1 else torch.randn(8, 6)
    rows = rows_of(w, layout)
    keep = torch.rand(w.shape) > 0.1
    for kept in (None, {'w': keep}):
        mine = compute_masks({'w': w}, 0.4, scope, granularity, keep=kept, absolute=True, transposed={'w': layout})['w']
        plain = compute_masks(
            {'w': rows}, 0.4, scope, granularity, keep=kept and {'w': rows_of(keep, layout)}, absolute=True
        )['w']
        assert mine.shape == w.shape and torch.equal(rows_of(mine, layout), plain)
    assert count_units('w', w.shape, granularity, layout) == count_units('w', rows.shape, granularity)


def test_units_that_experts_do_not_have():
    for granularity in ('column', 'kernel', '2:5', '5x4'):
        with pytest.raises(ValueError, match=f"granularity='{granularity}' does not fit '0.up'"):
            make('experts').prune(0.5, granularity=granularity)


@pytest.mark.parametrize('kind', ['experts', 'experts, turned', 'Conv1D'])
def test_thresholds_of_neurons_and_dead_filters(kind):
    learn = make(kind)
    cb = DST(alpha=1e-3)
    fit(learn, 1, 0.01, cbs=[cb])
    assert learn.masks.sparsity > 0
    learn = fit(make(kind), 2, 1e-2, cbs=SparsifyCallback(0.9, recover='alive', interval=1))
    assert learn.masks.sparsity == pytest.approx(0.9, abs=1e-2)


@pytest.mark.parametrize('kind', ['Conv1D', 'x @ weight'])
def test_wanda_weighs_the_inputs(kind):
    learn = make(kind)
    x = torch.cat([x for x, _ in [next(iter(learn.dls.train))]])
    score = wanda(prunable_weights(learn.model), learn, 1)['0.weight']
    assert torch.allclose(score, learn.model[0].weight.abs() * x.norm(dim=0)[:, None], rtol=1e-4)
    learn.prune(0.5, criterion=wanda, granularity='2:4')
    assert (learn.masks['0.weight'].view(16, 4, 4).sum(1) == 2).all()
    with pytest.raises(ValueError, match="'0.up' is of Experts"):
        make('experts').prune(0.5, criterion=wanda)


@pytest.mark.parametrize('kind', ['Conv1D', 'x @ weight'])
def test_such_layers_have_a_sparse_form(kind):
    torch.manual_seed(0)
    make_layer = {'Conv1D': Conv1D, 'x @ weight': Product}[kind]
    model = nn.Sequential(make_layer(512, 2048), nn.ReLU(), make_layer(2048, 512)).eval()
    compute_masks(prunable_weights(model), 0.98, absolute=True).apply_(
        {n: p.data for n, p in prunable_weights(model).items()}
    )
    x = torch.randn(2, 3, 512)
    fast = sparse_inference(model, x, seconds=0.05)
    assert 'no sparse form' not in ' '.join(map(str, fast.inference_report.why)) and list(
        fast.inference_report.index
    ) == ['0', '2', 'total']
    assert torch.allclose(fast(x), model(x), rtol=1e-3, atol=1e-4) and type(model[0]) is make_layer


def test_flops_count_zeros_on_either_side():
    learn = make('Conv1D')
    learn.prune(0.75)
    row = learn.flops().loc['0.weight']
    assert row.dense == 2 * 64 * 4 and row.nonzero == row.dense / 4


def test_gpt2():
    transformers = pytest.importorskip('transformers', reason='the layout of its Conv1D and experts')
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    with torch.device('meta'):
        gpt2 = transformers.GPT2Model(
            transformers.GPT2Config(
                n_layer=1, n_embd=8, n_head=2, vocab_size=50, n_positions=16, bos_token_id=0, eos_token_id=0
            )
        )
        mixtral = MixtralExperts(transformers.MixtralConfig(hidden_size=8, intermediate_size=16))
        oss, llama = (
            GptOssExperts(transformers.GptOssConfig(hidden_size=8, intermediate_size=16)),
            Llama4TextExperts(transformers.Llama4TextConfig(hidden_size=8, intermediate_size=16)),
        )
    assert list(transposed_groups(gpt2).values()) == [1] * 4 and set(transposed_groups(gpt2)) == set(
        prunable_weights(gpt2)
    )
    for model, layout in ((mixtral, OUT_IN), (oss, IN_OUT), (llama, IN_OUT)):
        assert transposed_groups(model) == {'gate_up_proj': layout, 'down_proj': layout} and set(
            prunable_weights(model)
        ) == set(transposed_groups(model))
