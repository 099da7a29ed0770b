"""Plain torch: record on prose, tune on code with the pull, resume. Prints what was forgotten."""

import copy
import html.entities
import inspect
import json
from pydoc_data.topics import topics

import torch
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
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, tie_word_embeddings=True, **size))
resumed = copy.deepcopy(model)
general, domain = rows("".join(topics.values())), rows(inspect.getsource(html.entities))

optimizer = AlrAdamW(param_groups(model), lr=5e-3, record=True)  # 1. general text
train(model, optimizer, general, range(60))
optimizer.save_importance("importance.safetensors")

importance = Importance.load("importance.safetensors")  # 2. the domain
tuning = AlrAdamW(param_groups(tuned := copy.deepcopy(model)), importance, lr=2e-3, reg_lambda=0.3)
train(tuned, tuning, domain, range(12))
torch.save({"model": tuned.state_dict(), "optimizer": tuning.state_dict()}, "checkpoint.pt")

saved = torch.load("checkpoint.pt")  # 3. resume
resumed.load_state_dict(saved["model"])
optimizer = AlrAdamW(param_groups(resumed), importance, lr=2e-3, reg_lambda=0.3)
optimizer.load_state_dict(saved["optimizer"])
train(resumed, optimizer, domain, range(12, 24))

train(tuned, tuning, domain, range(12, 24))  # to compare: not interrupted, and without the pull
plain = copy.deepcopy(model)
train(plain, AlrAdamW(param_groups(plain), lr=2e-3), domain, range(24))
same = all(map(torch.equal, tuned.parameters(), resumed.parameters()))
for name, each in {"before": model, "plain": plain, "tuned": tuned}.items():
    print(json.dumps({"model": name, "general": nll(each, general), "domain": nll(each, domain), "resumed": same}))
