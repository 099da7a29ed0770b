"""Tiny models with LoRA adapters of PEFT."""

from __future__ import annotations

import peft
import torch
import transformers
from torch import nn

PREFIX = "base_model.model."
MIXED = ["table", "line", "picture", "point", "volume", "linear"]


def llama(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2} | options
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32, **sizes)
    )


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, num_labels=3
    )
    return transformers.BertForSequenceClassification(config)


class Mixed(nn.Module):
    """One layer of every kind that PEFT adapts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(11, 6)
        self.line = nn.Conv1d(3, 4, 3, bias=False)
        self.picture = nn.Conv2d(3, 5, (3, 2), stride=2, padding=1)
        self.point = nn.Conv2d(4, 5, 1)
        self.volume = nn.Conv3d(2, 3, 2)
        self.linear = nn.Linear(7, 5)


def config(targets, **options):
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "target_modules": targets} | options)


def filled(model):
    """Give B (and embeddings' A), which start at zero, values."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                param.normal_(0, 0.3)
    return model


def adapted(model, targets, **options):
    return filled(peft.get_peft_model(model, config(targets, **options)))
