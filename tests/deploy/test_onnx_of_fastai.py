"Networks of fastai's in ONNX, and what to do where a network can't be exported"

import pytest
import torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, nn
from fastai.callback.rnn import ModelResetter
from fastai.data.core import TfmdDL
from fastai.layers import ConvLayer
from fastai.text.models import (
    AWD_LSTM,
    awd_lstm_clas_config,
    awd_lstm_lm_config,
    get_language_model,
    get_text_classifier,
)
from fastai.vision.models.unet import DynamicUnet

from fastprune.all import to_onnx

pytestmark = [
    pytest.mark.filterwarnings('ignore'),
    pytest.mark.cpu_only,  # onnxruntime runs there
    pytest.mark.usefixtures('one_registry'),
]


def same(a, b):
    assert torch.allclose(a, b, atol=1e-5)


def session(path):
    ort = pytest.importorskip('onnxruntime')
    return ort.InferenceSession(path, providers=['CPUExecutionProvider'])


def test_onnx_of_a_unet(tmp_path):
    body = nn.Sequential(*[ConvLayer(i, o, stride=2) for i, o in ((3, 4), (4, 8), (8, 8))])
    unet, images = DynamicUnet(body, 2, (16, 16)).eval(), torch.randn(3, 3, 16, 16)
    kinds = [type(m) for m in unet.modules()]
    run = session(to_onnx(unet, images[:2], tmp_path / 'u.onnx'))
    same(torch.tensor(run.run(None, {run.get_inputs()[0].name: images.numpy()})[0]), unet(images).detach())
    assert [type(m) for m in unet.modules()] == kinds  # the user's own is as it was


def tokens():
    ids = torch.randint(2, 40, (4, 11), generator=torch.Generator().manual_seed(1))
    ids[2, 6:], ids[3, 3:] = 1, 1  # padded
    return ids


def text_model(what):
    torch.manual_seed(0)
    sizes = dict(emb_sz=6, n_hid=8, n_layers=2 if what == 'language model' else 1)
    if what == 'language model':
        return get_language_model(AWD_LSTM, 40, config=dict(awd_lstm_lm_config, **sizes)).eval()
    return get_text_classifier(
        AWD_LSTM, 40, 3, seq_len=6, config=dict(awd_lstm_clas_config, bidir=what == 'both directions', **sizes)
    ).eval()


def runs_as(run, model, batches):
    "Does onnxruntime return what the model does, for batches of other sizes, too?"
    for some in batches:
        model.reset()
        same(torch.tensor(run.run(None, {run.get_inputs()[0].name: some.numpy()})[0]), model.eval()(some)[0].detach())


@pytest.mark.parametrize('what', ['language model', pytest.param('both directions', marks=pytest.mark.slow)])
def test_onnx_of_text(what, tmp_path):
    model, ids = text_model(what), tokens()
    runs_as(session(to_onnx(model, ids, tmp_path / 't.onnx')), model, (ids, ids[:3]))


def test_onnx_of_a_text_learner(tmp_path):
    ids, y = tokens().repeat(4, 1), torch.arange(16) % 3
    dls = DataLoaders(*(TfmdDL(list(zip(ids, y, strict=True)), bs=4) for _ in range(2)))
    learn = Learner(dls, text_model('classifier'), loss_func=CrossEntropyLossFlat(), cbs=ModelResetter())
    learn.prune(0.5)
    state = {k: v.clone() for k, v in learn.model.state_dict().items()}
    run = session(learn.to_onnx(tmp_path / 't.onnx'))
    runs_as(run, learn.model, (ids[:4], ids[:3], ids[:8].flip(0)))  # rows that end early come back, too
    assert all(torch.equal(v, state[k]) for k, v in learn.model.state_dict().items())
    assert learn.flops().loc['total', 'dense'] > 0


class ByValue(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 3)

    def forward(self, v):
        return self.l(v) if v.sum() > 0 else self.l(-v)


class OneSize(nn.Module):
    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 3)

    def forward(self, v):
        return self.l(v)[: len(v)] * len(v) if len(v) == 2 else self.l(v)


def test_what_can_not_be_exported_says_what_to_do(tmp_path):
    for model, match in (
        (ByValue(), 'must not branch or loop by the values of tensors'),
        (OneSize(), 'Use dynamic_batch=False'),
    ):
        with pytest.raises(ValueError, match=match):
            to_onnx(model, torch.randn(2, 4), tmp_path / 'm.onnx')
    assert not list(tmp_path.iterdir())
    assert to_onnx(OneSize(), torch.randn(2, 4), tmp_path / 'm.onnx', dynamic_batch=False).exists()
