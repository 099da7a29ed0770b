"""Accelerate: record on prose, tune on code with the pull, resume. Prints what was forgotten."""

import copy
import html.entities
import inspect
import json
from pydoc_data.topics import topics

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from alr_kernels import AlrAdamW, Importance
from alr_kernels.integrations import param_groups


def rows(text, count=512, length=48):  # a byte is a token
    return torch.tensor(list(text.encode()[: count * length])).view(-1, length)


@torch.no_grad()
def nll(model, data):
    return float(model(input_ids=data[-64:], labels=data[-64:]).loss)


def train(model, optimizer, data, steps):
    for step in steps:
        batch = data[step * 8 % 448 :][:8]
        accelerator.backward(model(input_ids=batch, labels=batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy(model.state_dict())


torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, tie_word_embeddings=True, **size))
general, domain = rows("".join(topics.values())), rows(inspect.getsource(html.entities))

accelerator = Accelerator(cpu=True)
before, optimizer = accelerator.prepare(model, AlrAdamW(param_groups(model), lr=5e-3, record=True))
train(before, optimizer, general, range(60))  # 1. general text
optimizer.optimizer.save_importance("importance.safetensors")
accelerator.free_memory()

pull = {"importance": Importance.load("importance.safetensors"), "reg_lambda": 0.3}
tuned, optimizer = accelerator.prepare(tuned := copy.deepcopy(model), AlrAdamW(param_groups(tuned), lr=2e-3, **pull))
train(tuned, optimizer, domain, range(12))  # 2. the domain
accelerator.save_state("state")
whole = train(tuned, optimizer, domain, range(12, 24))
accelerator.load_state("state")  # 3. resume
again = train(tuned, optimizer, domain, range(12, 24))

plain, optimizer = accelerator.prepare(plain := copy.deepcopy(model), AlrAdamW(param_groups(plain), lr=2e-3))
train(plain, optimizer, domain, range(24))  # to compare: without the pull
same = all(torch.equal(value, again[name]) for name, value in whole.items())
for name, each in {"before": model, "plain": plain, "tuned": tuned}.items():
    print(json.dumps({"model": name, "general": nll(each, general), "domain": nll(each, domain), "resumed": same}))
