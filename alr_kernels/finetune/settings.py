"""Flags over a configuration file over defaults: all options of a run, checked and typed before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from .. import _validate_finetune, _validate_values
from . import config_file, effects
from .effects import EXCLUSIVE, adapter_folder
from .lora_spec import LoraSpec
from .options import PARTS, REQUIRED, ModelOptions, OptimizerOptions, PullOptions, RunOptions, TrainOptions, fields_of

Part = TypeVar("Part")

FULL_LR, LORA_LR = 2e-5, 2e-4
FULL_LAMBDA, LORA_LAMBDA = 0.1, 0.002  # what the demo's validation chose in either space
SMALLEST_XI = 1e-30  # as importance/recorder.py

NUMBERS: dict[str, dict[str, Any]] = {
    "held_out": {"high": 1.0},
    "epochs": {"open_low": True},
    "record_epochs": {"open_low": True},
    "lr": {"open_low": True},
    "record_lr": {"open_low": True},
    "warmup": {"high": 1.0},
    "eps": {},
    "weight_decay": {},
    "max_grad_norm": {},
    "xi": {"low": SMALLEST_XI},
    "record_after": {"high": 1.0},
}  # name → its interval, for _validate_values.number
INTEGERS = {
    **dict.fromkeys(("max_rows", "steps", "batch", "accumulate", "save_every", "keep", "eval_every", "eval_batch"), 1),
    **dict.fromkeys(("log_every", "rebalance_every", "record_steps"), 1),
    "max_length": 2,  # one token has nothing to be predicted from
    "workers": 0,
}  # name → smallest value
OF_DATA = {
    "data": ("data", "columns", "split", "subset", "max_rows", "held_out_data"),
    "general": ("general", "general_columns", "general_split", "general_subset", "max_rows", "general_held_out_data"),
}  # a source → options that make it another one
FOLLOWS = {
    "lr": ("lora", "model"),
    "reg_lambda": ("lora", "model"),
    "layers_by": ("lora", "model"),
    "eval_batch": ("batch",),
    "record_lr": ("lr", "lora", "model"),
    "record_steps": ("steps", "epochs"),
    "record_epochs": ("steps", "epochs"),
}  # name → options that its default hangs on; a card has the value that came of them


@dataclass(frozen=True)
class Settings:
    """All options of one run; made by :func:`resolve`.

    Args:
        verb: "record", "tune" or "run".
        parts: class → its options.
        explicit: names of options that were given, as a flag or in the file.
        said: name → how a message calls it.
        card: what the repeated run's card says, when it was given as the configuration.
        anew: names that flags gave over a card.
    """

    verb: str
    parts: Mapping[type, Any]
    explicit: frozenset[str]
    said: Mapping[str, str] = field(default_factory=dict, repr=False)
    card: Mapping[str, Any] | None = field(default=None, repr=False)
    card_path: Path | None = None
    anew: frozenset[str] = frozenset()

    def of(self, part: type[Part]) -> Part:
        """Return one part: ``settings.of(ModelOptions).model``."""
        return self.parts[part]

    def has(self, part: type) -> bool:
        """Whether the verb has these options."""
        return part in self.parts

    def as_dict(self) -> dict[str, Any]:
        """Return every option by name."""
        return {entry.name: getattr(part, entry.name) for part in self.parts.values() for entry in fields(part)}

    @property
    def lora(self) -> LoraSpec | None:
        """What adapters are made with, or None."""
        text = self.of(ModelOptions).lora
        return None if text is None else LoraSpec.parse(text)

    @property
    def betas(self) -> tuple[float, float]:
        """AdamW's two."""
        return _validate_finetune.betas("--betas", self.of(OptimizerOptions).betas)

    @property
    def in_lora_space(self) -> bool:
        """Whether adapters are trained: new ones, or those of the folder that is the model."""
        options = self.of(ModelOptions)
        return options.lora is not None or adapter_folder(options.model)

    def changed(self, **values: Any) -> Settings:
        """Return settings with other values of some options; they are not checked again."""
        parts = {
            part: replace(options, **{name: values[name] for name in values if name in _names(part)})
            for part, options in self.parts.items()
        }
        return replace(self, parts=parts)

    def same_data(self, option: str, facts: Mapping[str, Any]) -> None:
        """Refuse data that changed since the run that is repeated.

        Args:
            option: "data" or "general".
            facts: with "fingerprint" and "source".

        Raises:
            ValueError: the card has another fingerprint, and the source was not given anew.
        """
        was = self._in_card("data").get(option) or {}
        if was and was["fingerprint"] != facts["fingerprint"] and not self.anew & set(OF_DATA[option]):
            prints = was["fingerprint"], facts["fingerprint"]
            _validate_finetune.changed_data(option, str(facts["source"]), *prints, str(self.card_path))

    def same_importance(self, fingerprint: str) -> None:
        """Refuse an importance that changed since the run that is repeated, unless it was given anew."""
        was = self._in_card("importance").get("fingerprint")
        if self.verb == "tune" and was and was != fingerprint and "importance" not in self.anew:
            _validate_finetune.changed_importance(was, fingerprint, str(self.card_path))

    def _in_card(self, section: str) -> Mapping[str, Any]:
        return (self.card or {}).get(section) or {}


def resolve(verb: str, flags: Mapping[str, Any], config: Path | str | None = None) -> Settings:
    """Return the settings of a run: flags over the file's over defaults, checked one by one and together.

    Args:
        verb: "record", "tune" or "run".
        flags: name in options.py → value, of what was given; texts are taken as they are.
        config: a YAML file with the same names, or the card of a run, which is then repeated.

    Raises:
        ValueError, TypeError, OSError: an option that is missing, unknown, of another type, outside its range, without
            effect or excluded by another; the message names the flag, or the file's line, and what to do.

    >>> settings = resolve("run", {"model": "m", "general": "prose.txt", "data": "code.jsonl", "out": "results"})
    >>> settings.of(PullOptions).reg_lambda, settings.of(TrainOptions).lr
    (0.1, 2e-05)
    """
    known = {entry.name: (part, entry) for part, entry in fields_of(verb)}
    for name in flags:
        if name not in known:
            _validate_finetune.unknown_option(flag(name), name, verb, known, ())
    file = config_file.read(verb, config) if config is not None else None
    card = file.card if file else None
    said = {name: flag(name) for name in known} | dict(file.said if file else {}) | {name: flag(name) for name in flags}
    of_flags = {name: _typed(said[name], known[name][1], value) for name, value in flags.items()}
    of_file = {
        name: _typed(said[name], known[name][1], value) for name, value in (file.options if file else {}).items()
    }
    for pair in EXCLUSIVE:
        if of_flags.keys() & set(pair):  # a flag replaces the file's other one
            of_file = {name: value for name, value in of_file.items() if name not in pair}
    given = of_file.keys() & set(card.get("given") or ()) if card else of_file.keys()
    for name, leading in FOLLOWS.items():
        if name not in given and of_flags.keys() & set(leading):
            of_file.pop(name, None)
    values = _defaults(verb) | of_file | of_flags
    _nothing_missing(verb, values, card)
    for name, (_, entry) in known.items():
        _check(said[name], entry, values[name])
    path = Path(config) if config is not None else None
    anew = frozenset(of_flags) if card else frozenset()
    settings = Settings(verb, _parts(verb, values), frozenset(given | of_flags.keys()), said, card, path, anew)
    alone = replace(settings, parts=_parts(verb, _defaults(verb) | of_file), explicit=frozenset(given))
    effects.check(settings, frozenset(of_flags), alone)
    return _filled(settings)


def flag(name: str) -> str:
    """Return the flag of an option, as help and messages call it.

    >>> flag("max_length"), flag("reg_lambda")
    ('--max-length', '--lambda')
    """
    return "--lambda" if name == "reg_lambda" else "--" + name.replace("_", "-")


def _names(part: type) -> set[str]:
    return {entry.name for entry in fields(part)}


def _defaults(verb: str) -> dict[str, Any]:
    return {entry.name: entry.default for _, entry in fields_of(verb)}


def _nothing_missing(verb: str, values: Mapping[str, Any], card: Mapping[str, Any] | None) -> None:
    missing = [name for name, value in values.items() if value is MISSING]
    missing += [name for name in REQUIRED.get(verb, ()) if values.get(name) is None]
    if missing:
        was = (card or {}).get("files") or {}
        hint = f"; the run of this card wrote to {was['out']}" if "out" in missing and "out" in was else ""
        _validate_finetune.missing_option(verb, [flag(name) for name in missing], hint)


def _parts(verb: str, values: Mapping[str, Any]) -> dict[type, Any]:
    return {part: part(**{name: values[name] for name in _names(part)}) for part in PARTS[verb]}


def _typed(said: str, entry: Field[Any], value: Any) -> Any:
    """Return a value in the option's type, or refuse it."""
    kind, _, optional = str(entry.type).partition(" | ")
    if value is None and optional:
        return None
    if kind == "bool" and isinstance(value, bool):
        return value
    if kind == "int" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind == "float":
        number = _number(value)
        if number is not None:
            return number
    if kind == "str":
        text = _text(entry, value)
        if text is not None:
            return str(Path(text).expanduser()) if entry.metadata["path"] and text.startswith("~") else text
    word = isinstance(value, bool) and kind == "str"
    hint = f"; YAML reads {'yes and on' if value else 'no and off'} so: put quotes round it" if word else ""
    _validate_finetune.option_type(said, value, str(entry.type), hint)


def _number(value: Any) -> float | None:
    """Return a number; YAML reads 2e-5 as text, because it lacks a dot."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def _text(entry: Field[Any], value: Any) -> str | None:
    if isinstance(value, (str, Path)):
        return str(value)
    if entry.name == "temperature" and _number(value) is not None:
        return str(value)
    if entry.name == "betas" and isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return None


def _check(said: str, entry: Field[Any], value: Any) -> None:
    """Check one value, whatever the others are."""
    name = entry.name
    if value is None:
        return
    if entry.metadata["choices"]:
        _validate_values.choice(said, value, entry.metadata["choices"])
    elif name in NUMBERS:
        _validate_values.number(said, value, **NUMBERS[name])
    elif name in INTEGERS:
        _validate_finetune.at_least(said, value, INTEGERS[name])
    elif name == "seed":
        _validate_values.seed(value, said)
    elif name == "reg_lambda":
        _validate_finetune.reg_lambda(said, value)
    elif name == "temperature":
        _validate_finetune.temperature(said, value)
    elif name == "betas":
        _validate_finetune.betas(said, value)
    elif name == "lora":
        LoraSpec.parse(value, said)
    elif name == "chat_template":
        _validate_finetune.file_there(said, value, "a file with a Jinja template")
    elif isinstance(value, str):
        _validate_finetune.not_empty(said, value)


def _filled(settings: Settings) -> Settings:
    """Return the settings with every default that follows from other options."""
    train, lora = settings.of(TrainOptions), settings.in_lora_space
    lr = train.lr or (LORA_LR if lora else FULL_LR)
    values: dict[str, Any] = {"lr": lr, "eval_batch": train.eval_batch or train.batch}
    values["max_grad_norm"] = settings.of(OptimizerOptions).max_grad_norm or None
    if settings.has(PullOptions):
        pull = settings.of(PullOptions)
        default = LORA_LAMBDA if lora else FULL_LAMBDA
        values["reg_lambda"] = default if pull.reg_lambda is None else pull.reg_lambda
        values["layers_by"] = pull.layers_by or ("module" if lora else "block")
    if settings.has(RunOptions):
        run = settings.of(RunOptions)
        values["record_lr"] = run.record_lr or lr
        if run.record_steps is None and run.record_epochs is None:
            values["record_steps"], values["record_epochs"] = train.steps, train.epochs
    return settings.changed(**values)
