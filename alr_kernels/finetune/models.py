"""A model of the user's, ready to train or to measure: its precision, adapters, device and tokenizer.

Where ``--model`` is an adapter's folder its base model is loaded and the adapter is trained on, without ``--lora``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import _validate_finetune, _validate_models
from .lora_spec import LoraSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from .options import ModelOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)  # a folder without any of them has no tokenizer
LONGEST = 10**9  # tokenizers without a maximum say more than this


@dataclass
class Loaded:
    """A model and what goes with it.

    Attributes:
        model: a causal language model of transformers, or PEFT's model around one.
        tokenizer: with a pad token, which may be its eos token.
        facts: what results say of the model.
        longest: tokens that the model takes at most; None where it does not say.
        device: "cpu" or "cuda".
    """

    model: nn.Module
    tokenizer: Any
    facts: dict[str, Any]
    longest: int | None
    device: str
    padded_with_eos: bool = False
    use_cache: bool | None = None

    @property
    def base(self) -> Any:
        """The transformers model, without PEFT."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @property
    def has_adapter(self) -> bool:
        """Whether LoRA adapters are trained."""
        return hasattr(self.model, "peft_config")


def load(options: ModelOptions, *, trainable: bool, seed: int = 0) -> Loaded:
    """Load a model and its tokenizer; to measure, the model goes to its device, too.

    Args:
        options: see there.
        trainable: to train it: the adapter that the folder has, new adapters where ``--lora`` asks for them, or all
            weights.
        seed: of new adapters.

    Raises:
        ValueError: a model or tokenizer that is not there or does not fit, or options that do not.
        ImportError: PEFT or bitsandbytes is needed and not installed.
    """
    name = options.model
    lora = None if options.lora is None else LoraSpec.parse(options.lora)
    device = device_of(options.device)
    _validate_finetune.model_folder("--model", name)
    adapter = (Path(name) / "adapter_config.json").is_file()
    if adapter and lora is not None:
        _validate_models.lora_on_adapter(name)
    if options.quantize != "none" and trainable and not (adapter or lora is not None):
        _validate_models.quantized_alone(options.quantize)
    base_name = _base_of(name) if adapter else name
    tokenizer, padded = tokenizer_of(options, base_name)
    base = _base(base_name, options, device)
    _validate_models.vocabulary(options.tokenizer or name, len(tokenizer), base.get_input_embeddings().num_embeddings)
    _make_savable(base)
    use_cache = getattr(base.config, "use_cache", None)
    dtype = NAMES.get(base.dtype, str(base.dtype))
    parameters = base.num_parameters()
    if trainable and options.quantize != "none":
        base = _prepared(base)
    model: Any = base
    if adapter:
        model = _with_adapter(base, name, trainable)
    elif lora is not None:
        model = _with_lora(base, lora, seed)
    elif trainable:
        _validate_models.fp16_weights(name, dtype)
    if options.gradient_checkpointing and trainable:
        _recompute(model)
    if not trainable and options.quantize == "none":
        model.to(device).eval()
    facts = {
        "name": name,
        "architecture": type(base).__name__,
        "parameters": parameters,
        "trained_parameters": sum(param.numel() for param in model.parameters() if param.requires_grad),
        "space": "lora" if model is not base else "full",
        "lora": _lora_facts(model) if model is not base else None,
        "dtype": dtype if options.quantize == "none" else options.quantize,
    }
    return Loaded(model, tokenizer, facts, longest_of(base, tokenizer), device, padded, use_cache)


def device_of(asked: str) -> str:
    """Return "cpu" or "cuda" for --device; auto takes a GPU where there is one."""
    available = torch.cuda.is_available()
    _validate_finetune.device("--device", asked, available, torch.version.cuda is None)
    return ("cuda" if available else "cpu") if asked == "auto" else asked


def tokenizer_of(options: ModelOptions, base: str) -> tuple[Any, bool]:
    """Return the tokenizer, and whether its eos token was made its pad token because it had none.

    An adapter's folder may have none: then it is that of the base model.
    """
    from transformers import AutoTokenizer

    said, name = ("--tokenizer", options.tokenizer) if options.tokenizer else ("tokenizer of --model", options.model)
    if name != base and options.tokenizer is None and not (Path(name) / "tokenizer_config.json").is_file():
        name = base
    if Path(name).is_dir() and not any((Path(name) / file).is_file() for file in TOKENIZER_FILES):
        _validate_models.no_tokenizer(said, name)
    with _told(lambda error: _validate_finetune.model_not_loaded(said, name, error)):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=options.trust_remote_code)
    if options.chat_template is not None:
        try:
            tokenizer.chat_template = Path(options.chat_template).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            _validate_models.chat_template(options.chat_template, error)
    if tokenizer.pad_token_id is not None:
        return tokenizer, False
    if tokenizer.eos_token is None:
        _validate_finetune.no_padding(name)
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, True


def longest_of(base: Any, tokenizer: Any) -> int | None:
    """Return how many tokens the model takes at most, by its configuration and its tokenizer."""
    config = base.config.get_text_config()
    known = [getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "n_ctx")]
    known.append(tokenizer.model_max_length)
    lengths = [int(length) for length in known if length and 0 < length < LONGEST]
    return min(lengths, default=None)


def save(loaded: Loaded, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Save model or adapter and tokenizer as ``from_pretrained`` reads them, as little changed as training allows.

    Args:
        loaded: the model may be wrapped meanwhile; what is saved is ``loaded.model``.
        folder: exists.
        state: the whole state dict, where the model's own is sharded.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    config = loaded.base.config
    trained = getattr(config, "use_cache", None)
    if loaded.use_cache is not None:
        config.use_cache = loaded.use_cache  # Trainer turns it off
    if loaded.padded_with_eos:
        tokenizer.pad_token = None
    try:
        model.save_pretrained(folder, state_dict=state)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's: a form to fill in
    finally:
        if loaded.padded_with_eos:
            tokenizer.pad_token = tokenizer.eos_token
        if loaded.use_cache is not None:
            config.use_cache = trained


@contextmanager
def _told(refuse: Callable[[Exception], Any]) -> Iterator[None]:
    """Turn what a library says of the user's input into a message of ours."""
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, LookupError, ImportError, TypeError, AttributeError, RuntimeError) as error:
        refuse(error)
    except SafetensorError as error:  # weights that are cut off; it is none of these
        refuse(error)


def _base(name: str, options: ModelOptions, device: str) -> Any:
    from transformers import AutoModelForCausalLM

    more: dict[str, Any] = {"dtype": "auto" if options.dtype == "auto" else DTYPES[options.dtype]}
    if options.attention is not None:
        more["attn_implementation"] = options.attention
    if options.quantize != "none":
        more |= _quantized(options, device)
    with _told(lambda error: _not_loaded(name, options, error)):
        model, found = AutoModelForCausalLM.from_pretrained(
            name, trust_remote_code=options.trust_remote_code, output_loading_info=True, **more
        )
    _validate_models.whole_weights(name, found["missing_keys"])
    if Path(name).is_dir():
        model.config._name_or_path = model.name_or_path = str(Path(name).resolve())  # what an adapter will look for
    return model


def _make_savable(base: Any) -> None:
    """Mend a generation configuration that transformers reads but refuses to write: sampling options without it."""
    generation = getattr(base, "generation_config", None)
    if generation is not None:
        try:
            generation.validate(strict=True)
        except ValueError:
            generation.do_sample = True


def _not_loaded(name: str, options: ModelOptions, error: Exception) -> None:
    if options.quantize != "none":
        _validate_models.bitsandbytes_failed(options.quantize, name, error)
    _validate_finetune.model_not_loaded("--model", name, error)


def _quantized(options: ModelOptions, device: str) -> dict[str, Any]:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None:
        _validate_finetune.missing_package(["bitsandbytes"], "quantize", f"--quantize {options.quantize}")
    from transformers import BitsAndBytesConfig

    compute = DTYPES.get(options.dtype, torch.bfloat16)
    if options.quantize == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    index = torch.cuda.current_device() if device == "cuda" else "cpu"
    return {"quantization_config": config, "device_map": {"": index}}


def _prepared(base: Any) -> Any:
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)


def _need_peft(what: str) -> None:
    from importlib.util import find_spec

    if find_spec("peft") is None:
        _validate_finetune.missing_package(["peft"], "peft", what)


def _base_of(folder: str) -> str:
    """Return the name of an adapter's base model."""
    _need_peft(f"the adapter in {folder!r}")
    from peft import PeftConfig

    with _told(lambda error: _validate_finetune.model_not_loaded("--model", folder, error)):
        config = PeftConfig.from_pretrained(folder)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        _validate_models.adapter_kind(folder, kind)
    name = str(config.base_model_name_or_path)
    _validate_finetune.model_folder(f"base model of the adapter {folder}", name)
    return name


def _with_adapter(base: Any, folder: str, trainable: bool) -> Any:
    from peft import PeftModel

    with _told(lambda error: _validate_finetune.model_not_loaded("--model", folder, error)):
        return PeftModel.from_pretrained(base, folder, is_trainable=trainable)


def _with_lora(base: Any, lora: LoraSpec, seed: int) -> Any:
    _need_peft("--lora")
    from peft import LoraConfig, get_peft_model

    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    config = LoraConfig(
        r=lora.r, lora_alpha=alpha, target_modules=list(lora.targets) if lora.targets else None,
        lora_dropout=lora.dropout, use_rslora=lora.rslora, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    linear = sorted({path.rpartition(".")[2] for path, module in base.named_modules() if _is_linear(module)})
    with torch.random.fork_rng(), _told(lambda error: _validate_models.lora_modules(lora.targets, error, linear)):
        torch.manual_seed(seed)
        return get_peft_model(base, config)


def _is_linear(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return "Linear" in type(module).__name__ or (type(module).__name__ == "Conv1D" and weight is not None)


def _lora_facts(model: Any) -> dict[str, Any]:
    config = model.peft_config[model.active_adapter]
    targets = config.target_modules
    return {
        "r": config.r,
        "alpha": config.lora_alpha,
        "targets": targets if isinstance(targets, str) else sorted(targets or ()),
        "dropout": config.lora_dropout,
        "rslora": bool(config.use_rslora),
    }


def _recompute(model: Any) -> None:
    """Recompute activations in the backward pass; without reentry, which needs no gradient of the inputs."""
    how = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):  # transformers ≥ 5.20, where the other name is deprecated
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
