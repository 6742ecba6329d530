"All weights are found, and nothing else"

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastprune.all import prunable_weights
from fastprune.core.layouts import transposed_groups

P = lambda *shape: nn.Parameter(torch.randn(*shape))


class Raw(nn.Module):
    "A module that never uses its parameters"

    def __init__(self, **params):
        super().__init__()
        for n, p in params.items():
            setattr(self, n, p)


def names(model, **kwargs):
    return list(prunable_weights(model, **kwargs))


@pytest.mark.parametrize(
    'name',
    'gain scale layer_scale gamma gamma_1 beta alpha temperature logit_scale rel_pos_h rel_pos_w '
    'relative_position_bias_table attention_biases A_log latents latent_query codebook codevectors prompts '
    'prompt_embed queries query_tokens probe cls_token mask_token register_tokens pos_embed position_embeddings '
    'absolute_pos_embed emb_rel_k sinks lambda_init freqs log_decay prototypes norm_weight q_bias bias_u weight_g '
    'weight_scale dt_bias D memory state h0 anything'.split(),
)
def test_what_is_no_weight_is_left_out(name):
    for shape in ((16, 8), (1, 16, 8), (4, 1, 1), (8, 1)):
        assert names(Raw(**{name: P(*shape)})) == []
        assert names(Raw(**{name: P(*shape)}), include=name) == [name]  # unless it is asked for


@pytest.mark.parametrize(
    'name',
    'weight kernel w w1 W in_proj_weight qkv_weight out_proj text_projection gate_up_proj lora_A x_proj_weight '
    'pos_proj fc_w Wq rel_kernel'.split(),
)
def test_raw_matrices_are_found_by_name(name):
    assert names(Raw(**{name: P(16, 8)})) == [name]
    assert names(Raw(**{name: P(4, 16, 8)})) == [name]
    assert names(Raw(**{name: P(8)})) == names(Raw(**{name: P(8, 1, 1)})) == []


class Used(nn.Module):
    "Names that tell nothing: only the code does"

    def __init__(self):
        super().__init__()
        for n, shape in dict(
            a=(8, 8),
            b=(8, 8),
            c=(8, 8),
            d=(8, 8),
            e=(3, 8, 8),
            f=(8, 8),
            g=(8, 8),
            h=(2, 8),
            i=(5, 8),
            j=(8, 8),
            k=(8, 8),
            m=(8, 8),
            o=(8, 3),
        ).items():
            setattr(self, n, P(*shape))
        self.list, self.dict = nn.ParameterList([P(8, 8), P(8, 8)]), nn.ParameterDict({'x': P(8, 8)})

    def forward(self, x):
        x = F.linear(x, self.a) @ self.b
        w = self.c.t().contiguous()
        x = torch.matmul(x, w[:, :8])
        x = torch.einsum('bi,oi->bo', x, self.d)
        x = torch.bmm(x[None].expand(3, -1, -1), self.e)[0]
        x = (self.f * 2) @ x.t()
        x = x.t().matmul(self.g if self.training else self.g)
        x = x + self.h[:1] + self.i.mean(0)  # tables
        x = x * self.j[:1]  # scales, of which the product is what is multiplied next
        x = x @ self.k
        for p in self.list:
            x = x @ p
        x = torch.addmm(self.m[0], x, self.dict['x'])
        return torch.cat([x, self.o.t()])


def test_raw_matrices_are_found_by_their_use():
    assert names(Used()) == ['a', 'b', 'c', 'd', 'e', 'f', 'g', 'k', 'list.0', 'list.1', 'dict.x']
    Used()(torch.randn(2, 8))


class Norm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = P(4, 6), P(4, 6)

    def forward(self, x):
        return x * self.weight + self.bias


class Stretch(Norm2d):
    pass  # its name says nothing, its code scales


class Table(nn.Embedding):
    def attend(self, x):
        return F.linear(x, self.weight)


class CodebookHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = P(3, 4, 6)

    def forward(self, x, i):
        return F.linear(x, self.weight[i])


class NormedLinear(nn.Linear):
    def forward(self, x):
        return F.linear(F.normalize(x), F.normalize(self.weight))


class Gained(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 4, 3)
        self.gain, self.mask_scores = P(4, 1, 1, 1), P(4, 3, 3, 3)

    def forward(self, x):
        return F.conv2d(x, self.weight * self.gain)


def test_norms_by_hand_embeddings_and_layers_with_more():
    assert names(Norm2d()) == names(Stretch()) == names(Table(5, 4)) == []
    assert names(CodebookHead()) == names(NormedLinear(4, 3)) == names(Gained()) == ['weight']
    tied = nn.ModuleDict({'emb': nn.Embedding(5, 4), 'head': nn.Linear(4, 5, bias=False), 'mid': nn.Linear(4, 4)})
    tied['head'].weight = tied['emb'].weight
    assert names(tied) == ['mid.weight'] and names(tied, include='emb') == ['emb.weight']


def test_parametrized_embeddings_are_no_weights():
    assert names(nn.utils.parametrizations.spectral_norm(nn.Embedding(5, 4))) == []
    assert names(nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4))) == ['parametrizations.weight.original']


def test_without_source_code_names_decide():
    code = '''
class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.theta, self.latents = (nn.Parameter(torch.ones(8, 4)) for _ in range(3))
    def forward(self, x): return x @ self.weight + (x @ self.theta)
'''
    defined = {'nn': nn, 'torch': torch}
    exec(compile(code, '<no file>', 'exec'), defined)
    assert names(defined['Conv1D']()) == ['weight'] and transposed_groups(defined['Conv1D']()) == {'weight': 1}


@pytest.mark.parametrize(
    'arch', ['test_nfnet', 'eca_nfnet_l0', 'mvitv2_tiny', 'levit_128s', 'efficientvim_m1', 'samvit_base_patch16']
)
def test_timm(arch):
    timm = pytest.importorskip('timm')
    if not timm.is_model(arch):
        pytest.skip(f'timm {timm.__version__} has no {arch}')
    with torch.device('meta'):
        model = timm.create_model(arch)
    found, layers = set(prunable_weights(model)), (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)
    assert found == {f'{n}.weight' for n, m in model.named_modules() if isinstance(m, layers)}


def test_what_a_pattern_can_ask_for():
    model = nn.Sequential(Raw(pos_embed=P(1, 5, 8), weight=P(8, 8)), nn.LayerNorm(8))
    assert names(model) == ['0.weight'] and names(model, include='0') == ['0.weight']
    assert names(model, include=['*.pos_embed', '1.bias']) == ['0.pos_embed', '1.bias']
    with pytest.raises(ValueError, match="include: '2' matches no weight. Names look like '0.weight'"):
        names(model, include='2')
    with pytest.raises(ValueError, match="include: 'x' matches no weight$"):
        names(nn.LayerNorm(8), include='x')
