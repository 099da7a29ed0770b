"""HF Trainer: record on prose, tune on code with the pull, resume. Prints what was forgotten."""

import html.entities
import inspect
import json
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from alr_kernels.integrations.transformers import AlrCallback, alr_optimizer


def rows(text, count=512, length=48):
    """A byte is a token."""
    tokens = torch.tensor(list(text.encode()[: count * length])).view(-1, length)
    return [{"input_ids": row, "labels": row} for row in tokens]


@torch.no_grad()
def nll(model, data):
    tokens = torch.stack([row["labels"] for row in data[-64:]])
    return float(model.eval()(input_ids=tokens, labels=tokens).loss)


torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, tie_word_embeddings=True, **size))
general, domain = rows("".join(topics.values())), rows(inspect.getsource(html.entities))
quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}


def trained():
    return LlamaForCausalLM.from_pretrained("general/checkpoint-60")


def train(model, data, folder, steps, lr, resume=None, **options):
    args = TrainingArguments(folder, max_steps=steps, save_steps=steps // 2, max_grad_norm=0.0, **quiet)
    factory = (alr_optimizer, {"lr": lr, **options})
    trainer = Trainer(model, args, train_dataset=data[:-64], optimizer_cls_and_kwargs=factory)
    trainer.add_callback(AlrCallback(trainer))
    trainer.train(resume_from_checkpoint=resume)
    return model


train(model, general, "general", 60, 5e-3, record=True)  # 1. general text
pull = {"importance": "general/checkpoint-60/importance.safetensors", "reg_lambda": 0.3}
tuned = train(trained(), domain, "domain", 24, 2e-3, **pull)  # 2. the domain
resumed = train(trained(), domain, "domain", 24, 2e-3, "domain/checkpoint-12", **pull)  # 3. resume

plain = train(trained(), domain, "plain", 24, 2e-3)  # to compare: without the pull
same = all(map(torch.equal, tuned.parameters(), resumed.parameters()))
for name, each in {"before": trained(), "plain": plain, "tuned": tuned}.items():
    print(json.dumps({"model": name, "general": nll(each, general), "domain": nll(each, domain), "resumed": same}))
