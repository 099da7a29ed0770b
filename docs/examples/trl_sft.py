"""TRL: record on prose, tune on code with the pull, resume. Prints what was forgotten."""

import html.entities
import inspect
import json
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from alr_kernels.integrations.transformers import AlrCallback, alr_optimizer

# A byte is a token: nothing is downloaded. A trained tokenizer takes the same place.
byte_level = Tokenizer(models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
byte_level.pre_tokenizer, byte_level.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<eos>", pad_token="<pad>")


def texts_of(text, count=512, length=48):
    return Dataset.from_dict({"text": [text[i * length : (i + 1) * length] for i in range(count)]})


@torch.no_grad()
def nll(model, data):
    tokens = tokenizer(data["text"][-64:], return_tensors="pt", padding=True).input_ids
    return float(model.eval()(input_ids=tokens, labels=tokens.masked_fill(tokens >= 256, -100)).loss)


torch.manual_seed(0)
size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=64, tie_word_embeddings=True, **size))
general, domain = texts_of("".join(topics.values())), texts_of(inspect.getsource(html.entities))
quiet = {"report_to": "none", "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_strategy": "no"}


def trained():
    return LlamaForCausalLM.from_pretrained("general/checkpoint-60")


def train(model, data, folder, steps, lr, resume=None, **options):
    args = SFTConfig(folder, max_steps=steps, save_steps=steps // 2, max_grad_norm=0.0, **quiet)
    factory = (alr_optimizer, {"lr": lr, **options})
    trainer = SFTTrainer(model, args, None, data, processing_class=tokenizer, optimizer_cls_and_kwargs=factory)
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
