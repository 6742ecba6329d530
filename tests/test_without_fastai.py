"The plain loop and the Trainer callback of docs/without_fastai.md run as they stand there, and end exactly"

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastprune.all import RigL

page = Path(__file__).parent.parent / 'docs' / 'without_fastai.md'
sparsities = pytest.mark.parametrize('method', ('0.9', 'RigL(0.9)'))


def block(contains):
    "The one block of Python of the page with this text in it"
    blocks = re.findall(r'^```python\n(.*?)^```', page.read_text(encoding='utf-8'), re.DOTALL | re.MULTILINE)
    (found,) = [b for b in blocks if contains in b]
    return found


def loop():
    return block('in loader:')


def callback():
    return block('TrainerCallback')


def lines(code):
    return [line for line in code.splitlines() if line.strip()]


def with_method(code, method):
    "The same code with another method in the place of 0.9"
    assert code.count(' 0.9,') == 1
    return code.replace(' 0.9,', f' {method},')


def check_exact(sparsifier, parameters, method):
    "0.9 prunes exactly 90% of each tensor; RigL's ERK exactly 90% of all together"
    masks, weights = sparsifier.masks, dict(parameters)
    pruned = {n: int((~m).sum()) for n, m in masks.items()}
    if method == '0.9':
        assert pruned == {n: round(0.9 * m.numel()) for n, m in masks.items()}
    else:
        assert sum(pruned.values()) == round(0.9 * sum(m.numel() for m in masks.values()))
    assert all((weights[n][~m] == 0).all() for n, m in masks.items())


loader = '''
import sys, torch
torch.manual_seed(0)
loader = [(torch.randn(16, 1, 8, 8), torch.randint(10, (16,))) for _ in range(4)]
'''


def test_loop_has_12_lines_and_needs_no_fastai():
    assert len(lines(loop())) <= 12
    check = '''
assert not [m for m in sys.modules if m.split('.')[0] in ('fastai', 'torchvision', 'matplotlib')]
for n, m in sparsifier.masks.items():
    assert int((~m).sum()) == round(0.9 * m.numel()) and (model.get_parameter(n)[~m] == 0).all()
assert len(sparsifier.masks) == 2 and sparsifier.method.iters == list(range(20))
'''
    r = subprocess.run([sys.executable, '-c', loader + loop() + check], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


@sparsities
def test_loop_is_exact(method):
    names = dict(RigL=RigL)
    exec(loader + with_method(loop(), method), names)
    check_exact(names['sparsifier'], names['model'].named_parameters(), method)
    assert len(names['sparsifier'].method.iters) == 20


class Tokens(torch.utils.data.Dataset):
    "Sequences of tokens; the label says whether the first one is of the upper half"

    def __init__(self):
        torch.manual_seed(0)
        self.tokens = torch.randint(50, (64, 8))

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return dict(input_ids=self.tokens[i], labels=int(self.tokens[i, 0] >= 25))


def trained(cbs, folder):
    "A Trainer of a tiny BERT, after 24 steps of two batches each"
    from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        weight_decay=0.01,
        use_cpu=True,
        disable_tqdm=True,
        report_to='none',
        save_strategy='no',
        logging_strategy='no',
    )
    model = BertForSequenceClassification(BertConfig(**sizes, max_position_embeddings=16))
    trainer = Trainer(model, args, train_dataset=Tokens(), callbacks=cbs)
    trainer.train()
    return trainer


@sparsities
def test_trainer_callback_has_ten_lines_and_is_exact(method, tmp_path):
    transformers = pytest.importorskip('transformers', reason='the Trainer is in transformers')
    pytest.importorskip('accelerate', reason="transformers' Trainer needs accelerate")
    code = callback()
    assert len(lines(code[code.index('class ') :])) <= 10

    class Still(transformers.TrainerCallback):
        "Notes the steps that the optimizer has not made"

        steps = ()

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            self.before = model.classifier.bias.detach().clone()

        def on_optimizer_step(self, args, state, control, model, **kwargs):
            if torch.equal(self.before, model.classifier.bias):
                self.steps = (*self.steps, state.global_step)

    names = dict(RigL=RigL)
    exec(with_method(code, method), names)
    sparsify, still = names['Sparsify'](), Still()
    trainer = trained([sparsify, still], tmp_path)
    assert isinstance(trainer.model, nn.Module) and sparsify.sparsifier.method.iters == list(range(24))
    check_exact(sparsify.sparsifier, trainer.model.named_parameters(), method)
    changes = getattr(sparsify.sparsifier.method, 'changes', [])
    assert list(still.steps) == [c['iteration'] for c in changes]  # a move takes the place of the optimizer's step
    assert bool(changes) == (method != '0.9')


def test_files_of_the_page_give_the_same_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(loader + loop(), names)
    before = {n: w.clone() for n, w in names['model'].state_dict().items()}
    exec(block('save_sparse'), names)
    assert (tmp_path / 'model.safetensors').exists()
    assert all(torch.equal(w, before[n]) for n, w in names['model'].state_dict().items())
