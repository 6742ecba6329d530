"Models that are very small, very deep, on several devices, or of other types"

import pytest
import torch
from fastai.basics import Callback
from torch import nn

from fastprune.all import SparsifyCallback, compute_masks, prunable_weights


class OffMeta(nn.Module):
    "A layer to prune, and one on the meta device that is not used"

    def __init__(self):
        super().__init__()
        self.here, self.later = nn.Linear(64, 10), nn.Linear(64, 1000, device='meta')

    def forward(self, x):
        return self.here(x.flatten(1))


def test_parameters_on_several_devices(learner, fit):
    learn = learner()
    learn.model = OffMeta()
    learn.dls.device = torch.device('cpu')
    before = learn.model.here.weight.detach().clone()
    for f in (
        lambda: learn.prune(0.5),
        lambda: compute_masks(prunable_weights(learn.model), 0.5, absolute=True),
        lambda: compute_masks(prunable_weights(learn.model), 0.5, 'global', absolute=True),
        lambda: SparsifyCallback(0.5).targets(learn.model, learn),
    ):
        with pytest.raises(ValueError, match="'later.weight' is on the meta device"):
            f()
    assert torch.equal(before, learn.model.here.weight) and learn.masks is None
    learn.prune(0.5, exclude='later')
    assert learn.masks.n_kept == 320 and learn.sparsity_report().loc['here.weight', 'sparsity'] == 0.5


@pytest.mark.parametrize('scope', ['local', 'global'])
def test_ten_weights(learner, fit, scope):
    model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(1, 10))
    for s in (0.04, 0.05, 0.06, 0.5, 0.95, 0.96, 0.999):
        learn = fit(learner(model), cbs=SparsifyCallback(s, scope=scope, interval=1))
        pruned = sum(int((~m).sum()) for m in (learn.masks or {}).values())
        assert pruned == round(s * 10) and int((model[2].weight == 0).sum()) >= pruned
        learn.remove_masks()
        nn.init.normal_(model[2].weight)


@pytest.mark.parametrize('scope', ['local', 'global', 'balanced'])
def test_on_from_a_layer_without_any_weight(learner, fit, scope):
    "97% of ten weights are all of them. A later fit starts there, and may grow some"
    learn = fit(
        learner(nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(1, 10))), cbs=SparsifyCallback(0.97, scope=scope)
    )
    assert learn.masks.n_kept == 0
    for s, left in ((0.985, 0), (0.5, 5)):
        fit(learn, 2, cbs=SparsifyCallback(s, scope=scope, interval=2, refresh=True))
        assert learn.masks.n_kept == left


@pytest.mark.parametrize('scope', ['local', 'global', 'erk'])
def test_a_thousand_layers(scope):
    weights = {f'{i}': torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(1000)}
    masks = compute_masks(weights, 0.73, scope, absolute=True)
    assert masks.n_kept == (1000 * (12 - round(0.73 * 12)) if scope == 'local' else 12000 - round(0.73 * 12000))
    if scope == 'global':
        flat = torch.cat([w.flatten().abs() for w in weights.values()])
        assert torch.equal(
            torch.cat([m.flatten() for m in masks.values()]), flat > flat.kthvalue(round(0.73 * 12000)).values
        )


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('scope', ['local', 'global'])
def test_weights_of_other_types(learner, fit, dtype, scope):
    class Cast(Callback):
        def before_batch(self):
            self.learn.xb = tuple(x.to(dtype) for x in self.xb)

        def after_pred(self):
            self.learn.pred = self.pred.float()

    learn = learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)).to(dtype))
    fit(learn, 2, 1e-3, cbs=[SparsifyCallback(0.9, scope=scope, interval=2), Cast()])
    n = sum(m.numel() for m in learn.masks.values())
    assert learn.masks.n_kept == (
        n - round(0.9 * n)
        if scope == 'global'
        else sum(m.numel() - round(0.9 * m.numel()) for m in learn.masks.values())
    )
    assert all(
        p.dtype == dtype and not p[~learn.masks[k]].any() for k, p in learn.model.named_parameters() if k in learn.masks
    )
