"Groups of channels: counts by hand, exact positions, random networks"

import re
import warnings
from collections import defaultdict
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
import torchvision
from fastai.vision.all import create_unet_model, resnet18
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

from fastprune.all import Method, Sparsifier
from fastprune.core.channel_graph import find_channels, trace_channels
from fastprune.core.channel_zeros import check_zeros
from fastprune.core.channels import channel_masks, positions_kept

vision = torchvision.models
pytestmark = pytest.mark.cpu_only  # models of other libraries are made there


def image(side=32, channels=3):
    return torch.randn(2, channels, side, side)


def sizes(groups):
    return sorted(g.n for g in groups)


def half(groups, seed=0):
    "Half of the channels of each block, at random"
    rng = torch.Generator().manual_seed(seed)
    res = []
    for g in groups:
        n = g.n // g.blocks
        res.append((torch.rand(g.blocks, n, generator=rng).argsort(1) >= n // 2).flatten())
    return res


def randomize(model):
    "Random biases, norms, tokens and statistics"
    for p in model.parameters():
        if p.ndim < 2 or 1 in p.shape:
            p.data.uniform_(-1, 1)
        elif not p.any():
            p.data.normal_(0, 0.1)
    for n, b in model.named_buffers():
        if n.endswith('running_mean'):
            b.normal_()
        if n.endswith('running_var'):
            b.uniform_(0.5, 2)


def owners(model):
    "Name -> (module, attribute) of each tensor, all of a tied one"
    names = {id(t): n for o in (model.named_buffers, model.named_parameters) for n, t in o()}
    res = defaultdict(list)
    for m in model.modules():
        for o in (m._parameters, m._buffers):
            for a, t in o.items():
                if t is not None and id(t) in names:
                    res[names[id(t)]].append((m, a))
    return res


def norm_over(m, index):
    "A norm's forward over some of its channels"

    def forward(x):
        dim = 1 if isinstance(m, nn.GroupNorm) or '2d' in type(m).__name__ else x.ndim - 1
        w, b = (None if t is None else t[index] for t in (m.weight, getattr(m, 'bias', None)))
        part = x.index_select(dim, index)
        if isinstance(m, nn.GroupNorm):
            part = F.group_norm(part, m.num_groups, w, b, m.eps)
        else:
            part = F.layer_norm(part.movedim(dim, -1), (len(index),), w, b, m.eps).movedim(-1, dim)
        return torch.zeros_like(x).index_copy(dim, index, part)

    return forward


def masked(model, groups, kept):
    "A model with masked weights, whose norms average over the kept channels"
    model = deepcopy(model).eval()
    masks = channel_masks(groups, kept)
    for n, p in model.named_parameters():
        if n in masks:
            p.data *= masks[n]
    stay = {}
    for g, k in zip(groups, kept, strict=True):
        for p in g.places:
            if p.role == 'norm':
                stay[p.name] = stay.get(p.name, True) & positions_kept(p, k, g.shapes[p.name])
    for n, k in stay.items():
        m = model.get_submodule(n)
        m.forward = norm_over(m, k.nonzero().flatten())
    return model


def without(t, place, stay):
    "A tensor without the positions that go"
    if place.groups == 1:
        return t.index_select(place.dim, stay.nonzero().flatten())
    blocks = t.view(place.groups, -1, *t.shape[1:])
    rows = stay.view(place.groups, -1)
    return torch.cat([b[:, r] for b, r in zip(blocks, rows, strict=True)])


def multihead(m, size):
    "`nn.MultiheadAttention` with any number of heads"

    def forward(q, k, v, **kwargs):
        rows = [w.split(w.shape[0] // 3) for w in (m.in_proj_weight, m.in_proj_bias)]
        parts = [F.linear(x, w, b) for x, w, b in zip((q, k, v), *rows, strict=True)]
        q, k, v = (t.unflatten(-1, (-1, size)).transpose(1, 2) for t in parts)
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return F.linear(out, m.out_proj.weight, m.out_proj.bias), None

    return forward


def fit(model):
    "Counts that modules keep beside their tensors"
    for m in model.modules():
        if isinstance(m, nn.modules.conv._ConvNd) and m.groups == m.in_channels > 1:
            m.groups = m.weight.shape[0] // (m.out_channels // m.in_channels)
        elif isinstance(m, nn.LayerNorm):
            m.normalized_shape = (m.weight.numel(),)
        elif isinstance(m, nn.MultiheadAttention):
            m.forward = multihead(m, m.head_dim)
        elif hasattr(m, 'qkv'):
            m.num_heads = m.qkv.weight.shape[0] // 3 // m.head_dim
            m.attn_dim = m.num_heads * m.head_dim
        elif isinstance(m, vision.VisionTransformer):
            m.hidden_dim = m.conv_proj.weight.shape[0]


def sliced(model, groups, kept):
    "A smaller model, by slicing its tensors"
    model = deepcopy(model).eval()
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    where = owners(model)
    stays = defaultdict(lambda: True)
    for g, k in zip(groups, kept, strict=True):
        for p in g.places:
            if p.role != 'norm':
                stays[p.name, p.dim] = stays[p.name, p.dim] & positions_kept(p, k, g.shapes[p.name])
    places = {(p.name, p.dim): p for g in groups for p in g.places if p.role != 'norm'}
    for (name, dim), place in sorted(places.items(), key=lambda o: o[0]):
        tensors[name] = without(tensors[name].data, place, stays[name, dim])
    for name in {n for n, _ in places}:
        for m, a in where[name]:
            new = tensors[name]
            setattr(m, a, nn.Parameter(new) if a in m._parameters else new)
    fit(model)
    return model


def output(model, x):
    with torch.enable_grad():  # without it, attention goes through a fused kernel
        res = model(**x) if isinstance(x, dict) else model(x)
    return getattr(res, 'logits', res)


def check_exact(model, x, groups=None, tol=1e-5):
    "Half of the channels go, and the smaller model does what the masked one does"
    randomize(model)
    groups = find_channels(model, x) if groups is None else groups
    kept = half(groups)
    check_zeros(model, groups, x)
    a = output(masked(model, groups, kept), x)
    b = output(sliced(model, groups, kept), x)
    torch.testing.assert_close(a, b, rtol=0, atol=tol * float(a.detach().abs().max()))
    dense = output(deepcopy(model).eval(), x)
    assert not torch.allclose(dense, a), 'the cut channels made no difference'
    return groups


def left_whole(model, groups):
    "Names of parameters of which no group has a part"
    return [n for n, _ in model.named_parameters() if not any(n in g.shapes for g in groups)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# The models of the acceptance list, with the widths counted by hand


def test_resnet18():
    model = vision.resnet18(num_classes=10)
    groups = check_exact(model, image())
    assert sizes(groups) == sorted([64, 128, 256, 512] + [64] * 2 + [128] * 2 + [256] * 2 + [512] * 2)
    assert left_whole(model, groups) == ['fc.bias']
    stream = groups[0]
    assert stream.name == 'conv1.weight' and len(stream.shapes) == 3 * (1 + 4) + 4  # 3 writers with norms, 4 readers


def test_resnet50():
    model = vision.resnet50(num_classes=10)
    groups = find_channels(model, image())
    inner = [w for w, n in ((64, 3), (128, 4), (256, 6), (512, 3)) for _ in range(2 * n)]
    assert sizes(groups) == sorted([64, 256, 512, 1024, 2048] + inner)
    assert left_whole(model, groups) == ['fc.bias']


def test_mobilenet():
    model = vision.mobilenet_v2(num_classes=10)
    groups = check_exact(model, image())
    want, width = [32, 1280], 32
    for t, c, n, _ in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        want.append(c)
        for _ in range(n):
            want += [t * width] if t > 1 else []
            width = c
    assert sizes(groups) == sorted(want)
    assert left_whole(model, groups) == ['classifier.1.bias']


def test_efficientnet():
    model = vision.efficientnet_b0(num_classes=10).double()  # in single precision, rounding alone can exceed 1e-5
    groups = check_exact(model, image().double(), tol=1e-10)
    want, width = [32, 1280], 32
    for t, c, n in ((1, 16, 1), (6, 24, 2), (6, 40, 2), (6, 80, 3), (6, 112, 3), (6, 192, 4), (6, 320, 1)):
        want.append(c)
        for _ in range(n):
            want += [t * width] if t > 1 else []
            want.append(width // 4)  # the squeezed channels of squeeze-excite
            width = c
    assert sizes(groups) == sorted(want)
    assert left_whole(model, groups) == ['classifier.1.bias']


def test_convnext():
    block = vision.convnext.CNBlockConfig
    model = vision.ConvNeXt([block(16, 32, 2), block(32, None, 1)], num_classes=10)
    groups = check_exact(model, image())
    assert sizes(groups) == sorted([16, 32, 64, 64, 128])
    assert left_whole(model, groups) == ['classifier.2.bias']


def test_densenet():
    model = vision.DenseNet(8, (2, 3), 16, bn_size=2, num_classes=10)
    groups = check_exact(model, image())
    assert sizes(groups) == sorted([16] + [16, 8] * 2 + [16] + [16, 8] * 3)
    assert left_whole(model, groups) == ['classifier.bias']


def test_unet():
    model = create_unet_model(resnet18, 2, (64, 64), pretrained=False)
    model(image(64))  # its hooks keep tensors with a graph
    assert left_whole(model, find_channels(model, image(64))) == ['layers.12.0.bias']
    with torch.no_grad():
        model(image(64))
    groups = check_exact(model, image(64))
    body = [64, 128, 256, 512] + [64] * 2 + [128] * 2 + [256] * 2 + [512] * 2
    middle, ups = [1024, 512], [256, 512, 512, 256, 384, 384, 192, 256, 256, 128, 96, 96]
    assert sizes(groups) == sorted(body + middle + ups + [96, 99])  # the last stream has 3 channels of the image
    assert left_whole(model, groups) == ['layers.12.0.bias']


def test_vit_of_timm():
    timm = pytest.importorskip('timm')
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=2, num_classes=10)
    groups = check_exact(model, image())
    assert [(g.kind, g.n) for g in groups] == [('channel', 192)] + [('head', 3), ('channel', 768)] * 2
    assert left_whole(model, groups) == ['head.bias']


def test_vit_of_torchvision():
    model = vision.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10)
    groups = check_exact(model, image())
    assert [(g.kind, g.n) for g in groups] == [('channel', 32)] + [('head', 4), ('channel', 64)] * 2
    assert left_whole(model, groups) == ['heads.head.bias']


def hugging(kind, **kwargs):
    transformers = pytest.importorskip('transformers')
    config = {'vocab_size': 100, 'pad_token_id': 0, 'bos_token_id': 1, 'eos_token_id': 2, **kwargs}
    return transformers, config, {'input_ids': torch.randint(3, 100, (2, 9))}


small = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 64}


def test_bert():
    transformers, config, x = hugging('bert', **small)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**config))
    groups = check_exact(model, x)
    want = [('head', 4), ('channel', 32), ('channel', 64), ('head', 4), ('channel', 64), ('channel', 32)]
    assert [(g.kind, g.n) for g in groups] == want
    stream = groups[1]
    assert {p.role for p in stream.places if 'word_embeddings' in p.name} == {'other'}
    assert left_whole(model, groups) == ['classifier.bias']


def test_llama_cuts_heads_of_keys_with_their_queries():
    transformers, config, x = hugging('llama', num_key_value_heads=2, **small)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    groups = find_channels(model, x)
    check_zeros(model, groups, x)
    assert [g.n for g in groups if g.kind == 'head'] == [2, 2]
    rows = {p.name.split('.')[-2]: len(p.positions) for p in groups[0].places}
    assert rows == {'q_proj': 32, 'k_proj': 16, 'v_proj': 16, 'o_proj': 32}


def test_gpt2_has_transposed_weights():
    transformers, config, x = hugging('gpt2', n_embd=32, n_layer=2, n_head=4, n_positions=16)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
    groups = find_channels(model, x)
    check_zeros(model, groups, x)
    assert [(g.kind, g.n) for g in groups] == [('head', 4), ('channel', 32), ('channel', 128)] + [
        ('head', 4),
        ('channel', 128),
    ]
    assert [(p.dim, p.role, len(p.positions)) for p in groups[0].places] == [
        (1, 'filter', 96),
        (0, 'other', 96),
        (0, 'input', 32),
    ]


def test_t5_keeps_the_heads_that_share_a_bias():
    transformers, config, x = hugging('t5', d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**config))
    x['decoder_input_ids'] = x['input_ids']
    groups = find_channels(model, x)
    check_zeros(model, groups, x)
    assert [(g.kind, g.n) for g in groups] == [('channel', 64)] * 4  # its streams are outputs, too


def test_attention_with_another_order_of_heads_stays_whole():
    class Interleaved(nn.Module):
        "Names as in timm, but the output has the heads side by side in each channel"

        def __init__(self):
            super().__init__()
            self.num_heads, self.qkv, self.proj = 2, nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return self.proj(F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).flatten(2))

    model = nn.Sequential(nn.Linear(3, 8), Interleaved(), nn.Linear(8, 2))
    assert [(g.kind, g.n) for g in find_channels(model, torch.randn(2, 5, 3))] == [('channel', 8)] * 2


def test_swin_has_a_table_for_each_head():
    model = vision.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=10)
    groups = find_channels(model, image())
    check_zeros(model, groups, image())
    heads = [g for g in groups if g.kind == 'head']
    assert [g.n for g in heads] == [2, 2, 4, 4]
    table = next(p for p in heads[0].places if 'table' in p.name)
    assert (table.dim, table.role, table.positions.tolist()) == (1, 'other', [0, 1])


# Layers that are not in these models


def shapes_of_places(group):
    return [(p.name, p.dim, p.role, len(p.positions)) for p in group.places]


class Apply(nn.Module):
    "A function of tensors as a module"

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Both(nn.Module):
    "Two modules that read the same, joined by a function"

    def __init__(self, a, b, f=torch.add):
        super().__init__()
        self.a, self.b, self.f = a, b, f

    def forward(self, x):
        return self.f(self.a(x), self.b(x))


def conv(c_in, c_out, size=3, **kwargs):
    return nn.Conv2d(c_in, c_out, size, padding=size // 2, **kwargs)


def test_flatten_has_several_columns_a_channel():
    model = nn.Sequential(conv(3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    groups = check_exact(model, image(4))
    assert shapes_of_places(groups[0]) == [
        ('0.weight', 0, 'filter', 4),
        ('0.bias', 0, 'other', 4),
        ('3.weight', 1, 'input', 64),
    ]
    assert groups[0].places[2].channels.tolist() == [i for i in range(4) for _ in range(16)]


def test_halves_are_told_apart_whatever_is_used_first():
    def halves(x):
        a, b = x.chunk(2, 1)
        return torch.cat([b.relu(), a], 1)

    model = nn.Sequential(conv(3, 8), Apply(halves), conv(8, 2))
    group = check_exact(model, image(8))[0]
    assert group.places[2].channels.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    assert group.blocks == 2


def test_a_gated_layer_has_both_halves_in_a_unit():
    model = nn.Sequential(conv(3, 8), nn.GLU(1), conv(4, 2))
    groups = find_channels(model, image(8))
    assert [(g.n, len(g.places[0].positions)) for g in groups] == [(4, 8)]


def test_a_product_of_halves_has_both_in_a_unit():
    model = nn.Sequential(conv(3, 8), Apply(lambda x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid()), conv(4, 2))
    assert sizes(check_exact(model, image(8))) == [4]


def test_shuffled_pixels_and_channels():
    layers = (
        conv(3, 16),
        nn.PixelShuffle(2),
        conv(4, 3),
        nn.PixelUnshuffle(2),
        conv(12, 8),
        nn.ChannelShuffle(4),
        conv(8, 2),
    )
    groups = check_exact(nn.Sequential(*layers), image(8))
    assert [g.n for g in groups] == [4, 3, 2]
    # the first channels of all blocks come before the second ones, in a smaller network, too
    assert groups[2].places[0].channels.tolist() == [0, 1] * 4 and groups[2].blocks == 1
    assert groups[2].places[-1].channels.tolist() == [0] * 4 + [1] * 4


class Scaled(nn.Module):
    "A product with a constant"

    def __init__(self, *shape, divide=False, buffer=True):
        super().__init__()
        self.a, self.b, self.divide = nn.Linear(3, 8), nn.Linear(8, 2), divide
        self.register_buffer('factor', torch.rand(shape) + 1) if buffer else setattr(self, 'factor', torch.ones(shape))

    def forward(self, x):
        x = self.a(x)
        return self.b(x / self.factor if self.divide else self.factor.view_as(self.factor) * x)


def test_products_with_constants_as_wide_as_the_channels_keep_them():
    x = torch.randn(2, 5, 3)
    for wide in (Scaled(8), Scaled(5, 8, divide=True), Scaled(1, 5, 8, buffer=False)):
        groups, why = trace_channels(wide, x)
        assert groups == [] and why == {'a.weight': 'Div' if wide.divide else 'Mul', 'b.weight': why['b.weight']}
    for narrow in (Scaled(), Scaled(5, 1), Scaled(1, divide=True)):
        assert sizes(check_exact(narrow, x)) == [8]


def test_a_product_with_what_has_no_channels_of_its_own():
    "The other factor is as wide, whatever is cut"
    model = nn.Sequential(nn.Linear(3, 8), Apply(lambda x: x.sin() * x.cumsum(-1)), nn.Linear(8, 2))
    assert find_channels(model, torch.randn(2, 3)) == []


def test_shuffled_channels_that_a_grouped_convolution_reads():
    model = nn.Sequential(conv(3, 16), nn.ChannelShuffle(4), conv(16, 8, groups=2), nn.ReLU(), conv(8, 2))
    groups = check_exact(model, image(8))
    assert [(g.n, g.blocks) for g in groups] == [(4, 2), (8, 2)]
    one_each = nn.Sequential(conv(3, 16), nn.ChannelShuffle(4), conv(16, 8, groups=4), nn.ReLU(), conv(8, 2))
    assert [(g.n, g.blocks) for g in check_exact(one_each, image(8))] == [(8, 4)]


def test_convolutions_with_groups_lose_equally_many_in_each():
    model = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), conv(8, 12, groups=4), nn.ReLU(), conv(12, 2))
    groups = check_exact(model, image(8))
    assert [(g.n, g.blocks) for g in groups] == [(8, 4), (12, 4)]
    assert [(p.name, p.groups) for p in groups[0].places if p.role == 'input'] == [('2.weight', 4)]


def test_depthwise_convolutions_with_two_filters_a_channel():
    model = nn.Sequential(conv(3, 4), conv(4, 8, groups=4), nn.BatchNorm2d(8), conv(8, 2))
    groups = check_exact(model, image(8))
    assert [(g.n, g.blocks) for g in groups] == [(4, 1)]


def test_transposed_convolutions():
    model = nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 6, 2, 2), nn.PReLU(6), conv(6, 2))
    groups = check_exact(model, image(8))
    assert [shapes_of_places(g)[-1] for g in groups] == [('1.weight', 0, 'input', 4), ('3.weight', 1, 'input', 6)]
    grouped = nn.Sequential(conv(3, 4), nn.ConvTranspose2d(4, 6, 2, 2, groups=2), conv(6, 2))
    groups = find_channels(grouped, image(8))
    check_zeros(grouped, groups, image(8))
    assert [(g.n, g.blocks, g.places[0].groups) for g in groups] == [(4, 2, 1), (6, 2, 2)]


def test_group_norms_make_blocks():
    model = nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 6), nn.GroupNorm(1, 6), conv(6, 2))
    groups = check_exact(model, image(8))
    assert [(g.n, g.blocks) for g in groups] == [(8, 2), (6, 1)]
    assert [p.name for g in groups for p in g.places if p.role == 'norm'] == ['1', '4']


def test_a_norm_over_what_was_joined_keeps_it_whole():
    joined = Both(conv(4, 4), conv(4, 4), lambda a, b: torch.cat([a, b], 1))
    model = nn.Sequential(conv(3, 4), joined, nn.GroupNorm(4, 8), conv(8, 2))
    assert [g.name for g in find_channels(model, image(8))] == ['0.weight']


def test_a_module_that_is_called_twice():
    shared = conv(4, 4)
    model = nn.Sequential(conv(3, 4), shared, nn.ReLU(), shared, conv(4, 2))
    assert [(g.name, g.n) for g in check_exact(model, image(8))] == [('0.weight', 4)]


def test_weights_that_are_used_twice():
    model = nn.Sequential(
        nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 20)
    )
    model[5].weight = model[0].weight
    groups = find_channels(model, torch.randint(20, (2, 5)))
    assert [(g.name, g.n) for g in groups] == [('2.weight', 16), ('4.weight', 8)] or [g.n for g in groups] == [8, 16]


def test_an_embedding_alone_is_what_makes_the_channels():
    model = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), nn.Linear(8, 3))
    groups = check_exact(model, torch.randint(20, (2, 5)))
    assert [(g.name, g.places[0].role) for g in groups] == [('0.weight', 'filter')]


def test_channels_of_the_input_stay():
    model = nn.Sequential(
        Both(nn.Identity(), conv(3, 3)), conv(3, 4), Both(conv(4, 3), conv(4, 2), lambda a, b: (a, b))
    )
    assert [g.name for g in find_channels(model, image(8))] == ['1.weight']


def test_what_is_not_understood_stays_whole():
    lstm = nn.LSTM(8, 8, batch_first=True)
    model = nn.Sequential(nn.Linear(3, 8), lstm, Apply(lambda o: o[0]), nn.Linear(8, 4), nn.Linear(4, 2))
    assert [g.name for g in find_channels(model, torch.randn(2, 5, 3))] == ['3.weight']
    computed = parametrizations.spectral_norm(conv(4, 4))
    model = nn.Sequential(conv(3, 4), computed, conv(4, 6), conv(6, 2))
    assert [g.name for g in find_channels(model, image(8))] == ['2.weight']
    mixed = nn.Sequential(nn.Linear(3, 8), Apply(lambda x: x @ x.mT @ x), nn.Linear(8, 6), nn.Linear(6, 2))
    assert [g.name for g in find_channels(mixed, torch.randn(2, 5, 3))] == ['2.weight']
    near = nn.Sequential(conv(3, 8), nn.LocalResponseNorm(3), conv(8, 6), conv(6, 2))
    assert [g.name for g in find_channels(near, image(8))] == ['2.weight']
    tokens = nn.Sequential(
        nn.Linear(3, 5), Apply(lambda x: x.mT), nn.Linear(5, 5), Apply(lambda x: x.mT), nn.Linear(5, 2)
    )
    assert find_channels(tokens, torch.randn(2, 5, 3)) == []
    taken = nn.Sequential(nn.Linear(3, 8), Apply(lambda x: x[..., :4]), nn.Linear(4, 6), nn.Linear(6, 2))
    assert [g.name for g in find_channels(taken, torch.randn(2, 5, 3))] == ['2.weight']
    mean = nn.Sequential(
        nn.Linear(3, 8), Apply(lambda x: x - x.mean(-1, keepdim=True)), nn.Linear(8, 6), nn.Linear(6, 2)
    )
    assert [g.name for g in find_channels(mean, torch.randn(2, 5, 3))] == ['2.weight']


def test_a_map_of_one_channel_stays():
    model = nn.Sequential(
        conv(3, 6), Both(nn.Identity(), nn.Sequential(conv(6, 1), nn.Sigmoid()), torch.mul), conv(6, 2)
    )
    assert [(g.name, g.n) for g in check_exact(model, image(8))] == [('0.weight', 6)]


@pytest.mark.parametrize('own', [{}, {'kdim': 6, 'vdim': 6}])
def test_attention_across_sequences(own):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(3, own.get('kdim', 8))
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True, **own)
            self.c = nn.Linear(8, 2)

        def forward(self, x):
            b = self.b(x)
            return self.c(self.attention(self.a(x), b, b)[0])

    groups = find_channels(Cross(), torch.randn(2, 5, 3))
    check_zeros(Cross(), groups, torch.randn(2, 5, 3))
    heads = [g for g in groups if g.kind == 'head']
    assert [(g.n, sum(len(p.positions) for p in g.places)) for g in heads] == [(4, 24 + 24 + 8)]
    assert sizes(groups) == ([4, 8, 8] if not own else [4, 6, 8, 8])


def test_encoder_of_torch():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, norm_first=True)
    model = nn.Sequential(
        nn.Linear(3, 16), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 2)
    )
    groups = check_exact(model, torch.randn(2, 5, 3))
    assert [(g.kind, g.n) for g in groups] == [('channel', 16)] + [('head', 4), ('channel', 32)] * 2


def test_weights_of_attention_that_are_used_keep_the_heads():
    class Shown(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.attention, self.c = nn.Linear(3, 8), nn.MultiheadAttention(8, 4), nn.Linear(8, 2)

        def forward(self, x):
            x = self.a(x)
            x, w = self.attention(x, x, x)
            return self.c(x), w

    assert [g.kind for g in find_channels(Shown(), torch.randn(2, 5, 3))] == ['channel', 'channel']


# Errors, and what stays as it was


@pytest.mark.parametrize('act', [nn.Sigmoid(), nn.Softmax(1), nn.Softplus(), nn.BatchNorm2d(4, affine=False)])
def test_what_makes_something_of_zero_is_named(act):
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), act, conv(4, 2))
    groups = find_channels(model, image(8))
    with pytest.raises(ValueError, match=rf"2 \({type(act).__name__}\).*Exclude '0.weight'"):
        check_zeros(model, groups, image(8))
    check_zeros(model, [], image(8))


def test_a_function_that_makes_something_of_zero():
    model = nn.Sequential(conv(3, 4), Apply(lambda x: x + 1), conv(4, 2))
    with pytest.raises(ValueError, match="1 \\(Apply\\).*'0.weight'"):
        check_zeros(model, find_channels(model, image(8)), image(8))


def test_shares_of_channels_stay_whole():
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(4, 4, 1), nn.Softmax(1))
    model = nn.Sequential(conv(3, 4), Both(nn.Identity(), gate, torch.mul), conv(4, 2))
    assert find_channels(model, image(8)) == []


def test_nothing_changes():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(), conv(4, 2)).train()
    model[0].weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    rng, x = torch.get_rng_state(), image(8)
    state = torch.get_rng_state()
    with torch.no_grad():
        check_zeros(model, find_channels(model, x), x)
    assert torch.equal(state, torch.get_rng_state()) and not torch.equal(rng, state)
    assert all(m.training for m in model.modules()) and 'forward' not in vars(model[0])
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_wrapped_model_has_the_names_of_the_model():
    model = nn.Sequential(conv(3, 4), conv(4, 2))
    groups = find_channels(nn.DataParallel(model, device_ids=[]), image(8))
    assert [g.name for g in groups] == ['0.weight']


@pytest.mark.parametrize('name', ['1 (Linear)', 'forward (Broken)'])
def test_a_model_that_cannot_be_traced(name):
    class Broken(nn.Sequential):
        def forward(self, x):
            x = super().forward(x)
            return x.no_such_method() if 'Broken' in name else x

    model = Broken(nn.Linear(3, 4), nn.Linear(4 if 'Broken' in name else 5, 2))
    with pytest.raises(ValueError, match=rf"can't trace Broken: {re.escape(name)} failed"):
        find_channels(model, torch.randn(2, 3))
    with pytest.raises(ValueError, match="can't trace Sequential: no output depends on a weight"):
        find_channels(nn.Sequential(nn.Linear(3, 4), Apply(torch.Tensor.detach)), torch.randn(2, 3))


def test_what_is_only_read_while_training():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.aux = conv(3, 4), conv(4, 6), conv(6, 2), conv(4, 2)

        def forward(self, x):
            x = self.a(x)
            y = self.c(self.b(x))
            return (y, self.aux(x)) if self.training else y

    groups = find_channels(Deep(), image(8))
    assert [p.name for p in groups[0].places if p.role == 'input'] == ['b.weight', 'aux.weight']


# Random networks


@st.composite
def networks(draw):
    "Blocks that add, join or gate, with groups and norms"
    width = draw(st.sampled_from([4, 8]))
    layers = [conv(3, width)]
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(['add', 'join', 'gate', 'plain', 'groups', 'depthwise', 'halves']))
        inner = 4 * draw(st.integers(1, 2))
        norm = draw(st.sampled_from([nn.BatchNorm2d, lambda c: nn.GroupNorm(2, c), lambda c: nn.Identity()]))
        if kind == 'add':
            path = nn.Sequential(conv(width, inner), norm(inner), nn.ReLU(), conv(inner, width))
            layers.append(Both(nn.Identity(), path))
        elif kind == 'join':
            layers.append(Both(nn.Identity(), conv(width, inner), lambda a, b: torch.cat([b, a], 1)))
            width += inner
        elif kind == 'gate':
            gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(width, 4, 1), nn.ReLU(), conv(4, width, 1), nn.Sigmoid())
            layers.append(Both(nn.Identity(), gate, torch.mul))
        elif kind == 'plain':
            layers += [conv(width, inner), norm(inner), nn.GELU()]
            width = inner
        elif kind == 'groups':
            layers += [conv(width, inner, 1), conv(inner, inner, groups=2), norm(inner)]
            width = inner
        elif kind == 'depthwise':
            layers += [conv(width, inner), conv(inner, inner, groups=inner), norm(inner)]
            width = inner
        else:
            layers.append(Both(conv(width, width), nn.Identity(), lambda a, b: a.chunk(2, 1)[1] + b.chunk(2, 1)[0]))
            width //= 2
            layers.append(conv(width, 4))
            width = 4
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * width, 2))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(networks())
def test_random_networks(model):
    torch.manual_seed(0)
    x = image(4)
    randomize(model)
    groups = find_channels(model, x)
    seen = defaultdict(list)
    for g in groups:
        assert g.n % g.blocks == 0
        for p in g.places:
            assert len(p.channels) == len(p.positions) and set(p.channels.tolist()) <= set(range(g.n))
            seen[p.name, p.dim] += p.positions.tolist()
    assert all(len(set(o)) == len(o) for o in seen.values())  # a position is in one group, once
    assert len({g.name for g in groups}) == len(groups)
    check_zeros(model, groups, x)
    kept = half(groups)
    torch.testing.assert_close(
        output(masked(model, groups, kept), x), output(sliced(model, groups, kept), x), rtol=1e-4, atol=1e-4
    )


names = 'resnet18', 'mobilenet_v2', 'efficientnet_b0', 'densenet121', 'convnext_tiny', 'squeezenet1_1', 'mnasnet0_5'


@pytest.mark.sample(2)
@pytest.mark.parametrize('name', [pytest.param(n, marks=[pytest.mark.slow] * (n == 'densenet121')) for n in names])
def test_as_torch_pruning_finds(name):
    tp = pytest.importorskip('torch_pruning')
    model, x = getattr(vision, name)(num_classes=7), image(64)
    weights = {m: f'{n}.weight' for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    last = [m for m in weights if 7 in (getattr(m, 'out_features', 0), getattr(m, 'out_channels', 0))]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        graph = tp.DependencyGraph().build_dependency(model, x, verbose=False)
        found = list(graph.get_all_groups(ignored_layers=last))
    theirs = set()
    for g in found:
        members = set()
        for o in g:
            m, reads = o.dep.target.module, o.dep.handler.__name__ == 'prune_in_channels'
            if m in weights:
                depthwise = getattr(m, 'groups', 1) > 1
                members.add((weights[m], int(reads and not depthwise)))
        theirs.add((len(g[0].idxs), frozenset(members)))
    ours = {
        (g.n, frozenset((p.name, p.dim) for p in g.places if p.role in ('filter', 'input')))
        for g in find_channels(model, x)
    }
    assert ours == theirs


class Recurrent(nn.Module):
    "A convolution, an LSTM and a head; `own` channels of the head are its own"

    def __init__(self, own=0):
        super().__init__()
        self.conv, self.rnn = nn.Conv1d(3, 8, 3), nn.LSTM(8, 6, batch_first=True)
        self.head = nn.Sequential(nn.Linear(6, own), nn.ReLU(), nn.Linear(own, 2)) if own else nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.rnn(self.conv(x).transpose(1, 2))[0][:, -1])


class Mixed(nn.Module):
    "A view puts two channels into one"

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 6, 3), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).unflatten(1, (4, 2)).mean(2)).mean((2, 3)))


def test_what_is_in_the_way_of_channels():
    groups, whole = trace_channels(Recurrent(), torch.randn(2, 3, 9))
    rnn = dict.fromkeys(['conv.weight', 'rnn.weight_ih_l0', 'rnn.weight_hh_l0'], 'rnn (LSTM)')
    assert groups == [] and whole == {**rnn, 'head.weight': 'an output of the model'}
    groups, whole = trace_channels(Recurrent(4), torch.randn(2, 3, 9))
    assert [g.name for g in groups] == ['head.0.weight'] and whole == rnn
    groups, whole = trace_channels(Mixed(), image())
    assert [g.name for g in groups] == ['second.weight'] and list(whole) == ['first.weight']
    assert trace_channels(vision.resnet18(), image())[1] == {}


def test_a_model_that_stays_whole_for_the_most_part_is_told():
    model, method = Recurrent(4), Method(0.5, granularity='channel')
    opt = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"93% of the weights stay, .* because of rnn \(LSTM\) \('rnn.weight_ih_l0' "):
        Sparsifier(model, method, 4, opt, example=torch.randn(2, 3, 9)).begin()
