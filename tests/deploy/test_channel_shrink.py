"Channels cut by groups: outputs, training and files stay the same, and the network is really smaller"


import pytest
import torch
from torch import nn

from fastprune.core.channel_graph import find_channels
from fastprune.core.channel_index import Slots
from fastprune.core.channel_norms import hold_norms, release_norms
from fastprune.core.channels import channel_masks
from fastprune.core.masks import Masks
from fastprune.deploy.channel_attention import HeadAttention
from fastprune.deploy.channel_cut import cut_groups, groups_left
from fastprune.deploy.costs import count_flops
from fastprune.deploy.shrunk_file import load_shrunk, save_shrunk
from fastprune.learner.inputs import as_inputs, tensors_in

pytestmark = pytest.mark.cpu_only  # networks of torchvision, timm and transformers are made there
vision = pytest.importorskip('torchvision').models


def randomise(model, seed=0):
    "Random biases, norms, running statistics, tokens, scales and heads, in evaluation mode"
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, t in [*model.named_parameters(), *model.named_buffers()]:
            tables = ('token', 'pos_emb', 'scale', 'gamma')
            if not t.is_floating_point() or not (t.ndim <= 1 or not t.any() or any(o in n for o in tables)):
                continue
            r = torch.randn(t.shape, generator=gen)
            t.copy_(0.5 + r**2 if n.endswith('running_var') else 0.3 * r + n.endswith('weight'))
    return model.eval()


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
    'convnext': (convnext, image, 0.6),
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
    for g, k, left in zip(groups, kept, groups_left(groups, kept, cuts), strict=True):
        assert left.n == k.sum()
        for p in left.places:
            assert p.role == 'norm' or model.state_dict()[p.name].shape == left.shapes[p.name]
        assert {len(p.positions) for p in left.places} <= {len(p.positions[k[p.channels]]) for p in g.places}
    save_shrunk(model, tmp_path / 'small')
    again = load_shrunk(tmp_path / 'small', make).eval()
    with torch.no_grad():
        assert torch.equal(run(again, x), after)
    assert not any(t.is_meta for t in again.state_dict().values())
    run(model.train(), x).float().square().mean().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())
