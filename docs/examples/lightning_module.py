"""Lightning: record on prose, tune on code with the pull, resume. Prints what was forgotten."""

import copy
import html.entities
import inspect
import json
from pydoc_data.topics import topics

import torch
from lightning.pytorch import LightningModule, Trainer, callbacks
from transformers import LlamaConfig, LlamaForCausalLM

from alr_kernels import AlrAdamW, Importance
from alr_kernels.integrations import param_groups
from alr_kernels.integrations.lightning import AlrCallback


def rows(text, count=512, length=48):  # a byte is a token
    return torch.tensor(list(text.encode()[: count * length])).view(-1, length)


def nll(module, data):
    return module.lm(input_ids=data[-64:], labels=data[-64:]).loss.item()


torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
lm = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=64, tie_word_embeddings=True, **size))
general, domain = rows("".join(topics.values())), rows(inspect.getsource(html.entities))
quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


class Module(LightningModule):
    def __init__(self, lm, **options):
        super().__init__()
        self.lm, self.options = copy.deepcopy(lm), options

    def training_step(self, batch, index):
        return self.lm(input_ids=batch, labels=batch).loss

    def configure_optimizers(self):
        return AlrAdamW(param_groups(self), **self.options)


def fit(module, data, folder, steps, resume=None):
    keep = callbacks.ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=steps // 2)
    trainer = Trainer(max_steps=steps, callbacks=[keep, AlrCallback()], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8), ckpt_path=resume)
    return module


before = fit(Module(lm, lr=5e-3, record=True), general[:240], "general", 60)  # 1. general text
pull = {"importance": Importance.load("general/step=60.importance.safetensors"), "reg_lambda": 0.3, "lr": 2e-3}
tuned = fit(Module(before.lm, **pull), domain[:96], "domain", 24)  # 2. the domain
again = fit(Module(lm, **pull), domain[:96], "domain", 24, "domain/step=12.ckpt")  # 3. resume

plain = fit(Module(before.lm, lr=2e-3), domain[:96], "plain", 24)  # to compare: without the pull
same = all(map(torch.equal, tuned.parameters(), again.parameters()))
for name, each in {"before": before, "plain": plain, "tuned": tuned}.items():
    print(json.dumps({"model": name, "general": nll(each, general), "domain": nll(each, domain), "resumed": same}))
