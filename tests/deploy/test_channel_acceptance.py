"From a dense network of a library to half of its channels by one callback and `learn.shrink()`"

import copy
from functools import partial

import pytest
import torch
from fastai.basics import SGD, CrossEntropyLossFlat, DataLoaders, Learner, TfmdDL
from helpers import randomise
from torch import nn

from fastprune.all import SparsifyCallback
from fastprune.zoo.data import TensorData

pytestmark = pytest.mark.cpu_only  # networks of torchvision, timm and transformers are made there
vision = pytest.importorskip('torchvision').models


class Part(nn.Module):
    "One of a model's outputs, and a classifier on it if there is a width"

    def __init__(self, model, name, width=None):
        super().__init__()
        self.model, self.name, self.head = model, name, nn.Linear(width, 2) if width else nn.Identity()

    def forward(self, x):
        return self.head(getattr(self.model(x), self.name))


def bert(kind, *part):
    t = pytest.importorskip('transformers')
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    drop = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return Part(getattr(t, kind)(t.BertConfig(vocab_size=100, max_position_embeddings=32, **sizes, **drop)), *part)


def unet():
    from fastai.vision.all import create_unet_model

    return create_unet_model(vision.resnet18, 2, (64, 64), pretrained=False)


def vit_of_timm():
    timm = pytest.importorskip('timm')
    return timm.create_model('vit_tiny_patch16_224', num_classes=10, img_size=32, depth=3, num_heads=4)


# name -> network, size of its images (0: words), what is left of its parameters and FLOPs at most, and names of the
# dimensions that inputs and outputs hold (tensor, dimension)
slow = partial(pytest.param, marks=pytest.mark.slow)
stem, fc = ('conv1.weight', 1), [('fc.weight', 0), ('fc.bias', 0)]
last = [('classifier.1.weight', 0), ('classifier.1.bias', 0)]
embed, scored = 'embeddings.', [('model.classifier.weight', 0), ('model.classifier.bias', 0)]
tables = [(f'{t}_embeddings.weight', 0) for t in ('word', 'position', 'token_type')]
networks = [
    ('resnet18', lambda: vision.resnet18(num_classes=10), 32, 0.28, 0.3, [stem, *fc]),
    slow('resnet50', lambda: vision.resnet50(num_classes=10), 64, 0.28, 0.3, [stem, *fc]),
    ('mobilenet', lambda: vision.mobilenet_v2(num_classes=10), 32, 0.35, 0.35, [('features.0.0.weight', 1), *last]),
    slow(
        *('efficientnet', lambda: vision.efficientnet_b0(num_classes=10), 64, 0.35, 0.35),
        [('features.0.0.weight', 1), *last],
    ),
    slow(
        *('convnext', lambda: vision.convnext_tiny(num_classes=10), 32, 0.35, 0.35),
        [('features.0.0.weight', 1), ('classifier.2.weight', 0), ('classifier.2.bias', 0)],
    ),
    slow(
        *('densenet', lambda: vision.densenet121(num_classes=10), 64, 0.35, 0.35),
        [('features.conv0.weight', 1), ('classifier.weight', 0), ('classifier.bias', 0)],
    ),
    slow(
        *('unet', unet, 64, 0.35, 0.35),  # at the end, the image is joined to its stream
        [('layers.0.0.weight', 1), ('layers.11.convpath.0.0.weight', 1), ('layers.11.convpath.1.0.weight', 0)]
        + [('layers.11.convpath.1.0.bias', 0), *((f'layers.12.0.{n}', 0) for n in ('weight', 'bias'))]
        + [('layers.12.0.weight', 1)],
    ),
    (
        *('vit of timm', vit_of_timm, 32, 0.35, 0.35),
        [('patch_embed.proj.weight', 1), ('head.weight', 0), ('head.bias', 0), ('pos_embed', 1)],
    ),
    (
        *('vit of torchvision', lambda: vision.VisionTransformer(32, 8, 2, 4, 64, 128, num_classes=10), 32, 0.35, 0.35),
        [('conv_proj.weight', 1), ('heads.head.weight', 0), ('heads.head.bias', 0), ('encoder.pos_embedding', 1)],
    ),
    (
        *('bert that classifies', lambda: bert('BertForSequenceClassification', 'logits'), 0, 0.35, 0.35),
        [*scored, *((f'model.bert.{embed}{n}', d) for n, d in tables)],
    ),
    (
        *('bert', lambda: bert('BertModel', 'pooler_output', 64), 0, 0.35, 0.35),
        [('head.weight', 0), ('head.bias', 0), *((f'model.{embed}{n}', d) for n, d in tables)],
    ),
]


def learner(name, make, size):
    "A Learner with a network whose biases, norms, running statistics and tokens are random"
    torch.manual_seed(0)
    model, gen = randomise(make()), torch.Generator().manual_seed(1)
    x = torch.randn(8, 3, size, size, generator=gen) if size else torch.randint(0, 100, (8, 12), generator=gen)
    y = torch.randint(0, 2, (8, size, size) if name == 'unet' else (8,), generator=gen)
    data, loss = TensorData(x, y, [0, 1]), CrossEntropyLossFlat(axis=1) if y.ndim == 3 else nn.CrossEntropyLoss()
    dls = DataLoaders(TfmdDL(data, bs=4, shuffle=True), TfmdDL(data, bs=4))
    return Learner(dls, model, loss_func=loss, opt_func=partial(SGD, mom=0.9)), x[:4]


def outputs(learn, x):
    learn.model.eval()
    with torch.no_grad():
        return learn.model(x)


def sizes(model):
    return sum(p.numel() for p in model.parameters())


def halved(model, dense, held):
    "Names of dimensions that are not half as large as they were, rounded up or down, though nothing holds them"
    old = dict(dense.named_parameters())
    for n, p in model.named_parameters():
        for d, (a, b) in enumerate(zip(p.shape, old[n].shape, strict=True)):
            inside = d > 1 or d == 1 and old[n].shape[1] == 1  # the kernel, or the one column of a depthwise filter
            if not inside and (n, d) not in held and a not in (b // 2, b - b // 2):
                yield n, d, b, a


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    'name, make, size, parameters, flops, held', networks, ids=lambda o: o if isinstance(o, str) else ''
)
def test_half_of_the_channels(name, make, size, parameters, flops, held):
    learn, x = learner(name, make, size)
    dense, cost = copy.deepcopy(learn.model), learn.flops().dense['total']
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, 1e-3, cbs=SparsifyCallback(0.5, granularity='channel', interval=1))
    channels = learn.keep_masks.channels
    kept = [int(k.sum()) for k in channels.kept(learn.masks)]
    assert kept == [g.n - round(g.n / 2) for g in channels.channels]
    masked = outputs(learn, x)
    assert masked.isfinite().all()
    learn.shrink(n_items=2, repeats=1)
    small = outputs(learn, x)
    assert (masked - small).abs().max() <= 1e-5 * masked.abs().max()
    places = set(held) | {(n, 0) for n, p in dense.named_parameters() if n.endswith(('cls_token', 'class_token'))}
    places |= {(n, 0) for n, p in dense.named_parameters() if p.ndim == 3}
    assert list(halved(learn.model, dense, places)) == []
    assert sizes(learn.model) <= parameters * sizes(dense)
    assert learn.flops().dense['total'] <= flops * cost
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-3)
    assert outputs(learn, x).isfinite().all()
