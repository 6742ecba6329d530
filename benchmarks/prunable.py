"""List which parameters are pruned by default: one row for each class and parameter name, in the smallest model of each
timm family and in small transformers models, without values. Parameters that only larger models of a timm family have
are listed as well.
`python benchmarks/prunable.py` needs `pip install timm transformers`"""

import csv
import os
import re
import warnings

warnings.filterwarnings('ignore')
os.environ['HF_HUB_OFFLINE'] = '1'
import timm
import torch
import transformers
from common import here
from timm.models._registry import _module_to_models

from fastprune.all import prunable_weights
from fastprune.core.layouts import transposed_groups
from fastprune.core.names import parameter_names

small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=99)
grouped, audio = (
    {**small, 'num_key_value_heads': 2},
    dict(conv_dim=[32] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
)
experts = {**grouped, 'num_local_experts': 4, 'num_experts': 4, 'moe_intermediate_size': 16}
configs = dict(
    bert=small,
    roberta=small,
    deberta=dict(**small, relative_attention=True, pos_att_type=['c2p', 'p2c']),
    electra=small,
    albert=small,
    distilbert=dict(dim=32, n_layers=2, n_heads=4, hidden_dim=64, vocab_size=99),
    xlnet=dict(d_model=32, n_layer=2, n_head=4, d_inner=64, vocab_size=99),
    longformer=dict(**small, attention_window=[4, 4]),
    gpt2=dict(n_embd=32, n_layer=2, n_head=4, vocab_size=99, n_positions=16),
    gpt_neo=dict(hidden_size=32, num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]], vocab_size=99),
    gpt_neox=small,
    opt=small,
    llama=grouped,
    mistral=grouped,
    qwen2=grouped,
    qwen3=grouped,
    gemma3_text={**grouped, 'head_dim': 8},
    mixtral=experts,
    qwen3_moe=experts,
    gpt_oss={**experts, 'head_dim': 8},
    llama4_text={**experts, 'head_dim': 8, 'intermediate_size_mlp': 64},
    rwkv=dict(hidden_size=32, num_hidden_layers=2, vocab_size=99, attention_hidden_size=32),
    mamba=dict(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=4),
    mamba2=dict(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=4, num_heads=8, head_dim=8, n_groups=1),
    recurrent_gemma=dict(**grouped, lru_width=32),
    t5=dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=99),
    bart=dict(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=99,
    ),
    whisper=dict(
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=99,
        pad_token_id=0,
    ),
    wav2vec2=dict(**small, **audio),
    wavlm=dict(**small, **audio),
    vits=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64, flow_size=32),
    encodec={},
    vit=small,
    deit=small,
    beit=dict(**small, use_relative_position_bias=True),
    dinov2=dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    swin=dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4]),
    swinv2=dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4]),
    convnextv2=dict(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1]),
    segformer={},
    clip={},
    siglip={},
    blip_2={},
    sam={},
    sam2={},
    detr=dict(d_model=32, encoder_layers=1, decoder_layers=1),
    perceiver=dict(num_latents=8, d_latents=32, d_model=32, num_self_attends_per_block=2),
    groupvit={},
    vit_mae=small,
    videomae=small,
    tapas=small,
    x_clip={},
)
tasks = dict(wav2vec2=transformers.Wav2Vec2ForPreTraining, perceiver=transformers.PerceiverForMaskedLM)


def hf(kind):
    config = transformers.AutoConfig.for_model(
        kind.replace('blip_2', 'blip-2').replace('x_clip', 'xclip').replace('vit_mae', 'vit_mae'), **configs[kind]
    )
    return tasks[kind](config) if kind in tasks else transformers.AutoModel.from_config(config)


def rows_of(model):
    "(class, parameter) -> its row; for layers of torch, the class alone"
    weights, layouts, names, res = prunable_weights(model), transposed_groups(model), parameter_names(model), {}
    for m in model.modules():
        for k, p in m._parameters.items():
            if p is None:
                continue
            n = names[id(p)]
            owner = f'{type(m).__module__.split(".")[0]}.{type(m).__name__}'
            key = owner, re.sub(r'\d+', '#', k), n in weights
            if key not in res or p.ndim > len(res[key]['shape'].split('x')):
                res[key] = {
                    'class': owner,
                    'parameter': key[1],
                    'example': re.sub(r'\d+', '#', n),
                    'shape': 'x'.join(map(str, p.shape)),
                    'prunable': 'yes' if n in weights else 'no',
                    'layout': layouts.get(n, '') if n in weights else '',
                }
    return res


def family(names):
    "Rows of the smallest model of a timm family, and parameters that only its larger models have"
    size, found = {}, {}
    for n in names:
        with torch.device('meta'):
            model = timm.create_model(n)
        size[n], found[n] = sum(p.numel() for p in model.parameters()), rows_of(model)
    seen = {}
    for n in sorted(names, key=size.get):
        for k, row in found[n].items():
            seen.setdefault(k, dict(model=n, **row))
    return list(seen.values())


def main():
    "Write prunable.csv"
    rows, all_names = [], timm.list_models()
    for module, names in sorted(_module_to_models.items()):
        rows += [dict(library='timm', family=module, **r) for r in family(sorted(n for n in all_names if n in names))]
    for kind in configs:
        with torch.device('meta'):
            model = hf(kind)
        rows += [
            dict(library='transformers', family=kind, model=type(model).__name__, **r) for r in rows_of(model).values()
        ]
    with open(here / 'prunable.csv', 'w', newline='') as f:
        out = csv.DictWriter(f, [*rows[0]])
        out.writeheader()
        out.writerows(rows)


if __name__ == '__main__':
    main()
