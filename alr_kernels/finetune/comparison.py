"""What `eval` does: measure a model, and one from before it, on the same texts and questions, and say what changed."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import _environment, _validate_choices, _validate_finetune
from .._plain import plain
from . import questions, seen
from .choices import Answers, answer
from .evaluation import IGNORED, Losses, losses
from .intervals import Change, paired
from .options import ModelOptions
from .progress import Progress

if TYPE_CHECKING:
    from .data import Source
    from .models import Loaded

METRICS = ("accuracy", "accuracy_norm")


@dataclass(frozen=True)
class Request:
    """What is measured, and how.

    Args:
        model: how to load the model; the one before it is loaded alike.
        before: folder or hub id of the model that it came from.
        texts: "general" and "domain", either or both.
        choices: files of questions about what was known before.
        domain_choices: files of questions about the domain.
        max_length: tokens of a sequence, at most; cut down to what the model takes.
        packing: as in `alr_kernels.finetune.data.load`.
        loss_on: likewise.
        batch: sequences in a batch.
        limit: questions of each file, the first ones; None: all. (Of texts: ``Source.max_rows``.)
        seed: of the intervals. (Of held-out rows: ``Source.seed``.)
    """

    model: ModelOptions
    before: str | None = None
    texts: Mapping[str, Source] = field(default_factory=dict)
    choices: Sequence[str] = ()
    domain_choices: Sequence[str] = ()
    max_length: int = 1024
    packing: bool | None = None
    loss_on: str = "answers"
    batch: int = 8
    limit: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Text:
    """A model's losses on a text, row by row."""

    losses: Losses
    bytes: int  # of the text of the tokens that count
    fingerprint: str  # of the tokens and of which of them count
    facts: dict[str, Any]

    @property
    def bits_per_byte(self) -> float:
        """NLL of all counted tokens over the bytes of their text, in bits; NaN for no bytes."""
        return math.fsum(self.losses.sums) / math.log(2) / self.bytes if self.bytes else math.nan

    def as_dict(self) -> dict[str, Any]:
        """Return NLL, perplexity, tokens, bits per byte and bytes for JSON."""
        bits = self.bits_per_byte
        rest = {"bits_per_byte": bits if math.isfinite(bits) else None, "bytes": self.bytes}
        return self.losses.total.as_dict() | {"rows": len(self.losses.sums)} | rest


@dataclass(frozen=True)
class Measured:
    """All that was measured of one model."""

    facts: dict[str, Any]
    texts: dict[str, Text]
    choices: dict[str, Answers]  # file → answers

    def as_dict(self) -> dict[str, Any]:
        """Return the numbers for JSON."""
        texts: dict[str, Any] = {name: text.as_dict() for name, text in self.texts.items()}
        return texts | {"choices": {name: answers.as_dict() for name, answers in self.choices.items()}}


def compare(request: Request, progress: Progress | None = None) -> dict[str, Any]:
    """Measure and compare; docs/evaluation.md states every number of the result.

    Only one model is held at a time.

    Args:
        request: what and how.
        progress: is told of each batch.

    Raises:
        ValueError, OSError: nothing to measure, or a model, text or question that is not there or not as it should be.
    """
    progress = progress or Progress()
    _validate_choices.something_to_measure(bool(request.texts), [*request.choices, *request.domain_choices])
    for flag, name in (("--model", request.model.model), ("--before", request.before)):
        if name is not None:
            _validate_finetune.model_folder(flag, name)
    from .data import files

    for source in request.texts.values():
        files.find(source)  # before minutes go by with the first model
    began = time.perf_counter()
    shapes, asked = {}, {}
    for name in (*request.choices, *request.domain_choices):
        shapes[name], found = questions.read(name)
        asked[name] = found[: request.limit]
    before = None
    if request.before is not None:
        before = measure(replace(request.model, model=request.before), request, asked, progress)
    after = measure(request.model, request, asked, progress)
    results = {
        "kind": "eval",
        "verb": "eval",
        "versions": _environment.versions(),
        "machine": _environment.machine(),
        "options": _options(request),
        "model": after.facts,
        "before_model": before and before.facts,
        "data": {name: text.facts for name, text in after.texts.items()},
        "shapes": shapes,
        "before": before and before.as_dict(),
        "after": after.as_dict(),
        **(
            _changes(before, after, request)
            if before
            else {"changes": None, "summary": None, "intervals": None, "notes": []}
        ),
    }
    results["notes"] += [*_seen(request, after), *_oddities(before, after)]
    return results | {"seconds": time.perf_counter() - began}


def measure(
    options: ModelOptions, request: Request, asked: Mapping[str, Sequence[questions.Question]], progress: Progress
) -> Measured:
    """Load one model and measure it on everything."""
    from . import models

    loaded = models.load(options, trainable=False)
    texts = {name: _text(loaded, name, source, request, progress) for name, source in request.texts.items()}
    longest = min(request.max_length, loaded.longest or request.max_length)
    answers = {}
    for name, found in asked.items():
        total = -(-sum(len(question.choices) for question in found) // request.batch)
        tick = _counted(progress, f"{options.model}: {name}", total)
        answers[name] = answer(
            loaded.model, loaded.tokenizer, found, max_length=longest, batch=request.batch, tick=tick
        )
    return Measured(loaded.facts, texts, answers)


def _text(loaded: Loaded, name: str, source: Source, request: Request, progress: Progress) -> Text:
    from . import data

    longest = min(request.max_length, loaded.longest or request.max_length)
    texts = data.load(
        source, loaded.tokenizer, max_length=longest, packing=request.packing, loss_on=request.loss_on, train=False
    )
    rows = texts.held_out
    assert rows is not None  # a source without held-out rows is refused by the command
    tick = _counted(progress, f"{loaded.facts['name']}: {name} text", -(-len(rows) // request.batch))
    found = losses(loaded.model, rows, data.Collator(loaded.tokenizer), request.batch, tick)
    return Text(found, text_bytes(loaded.tokenizer, rows), _fingerprint(rows), texts.facts)


def _counted(progress: Progress, name: str, total: int) -> Any:
    """Return a tick that needs no number."""
    tick, done = progress.phase(name, total), 0

    def called() -> None:
        nonlocal done
        done += 1
        tick(done)

    return called


def text_bytes(tokenizer: Any, rows: Iterable[Mapping[str, Sequence[int]]]) -> int:
    """Return the UTF-8 bytes of the text of all tokens that count.

    Each run of them is decoded after the token before it, whose own text is subtracted: tokenizers treat the beginning
    of a text in their own ways. Special tokens have no text.
    """
    runs: list[list[int]] = []
    for row in rows:
        ids, labels = row["input_ids"], row["labels"]
        for place in range(1, len(ids)):
            if labels[place] != IGNORED:
                if place == 1 or labels[place - 1] == IGNORED:
                    runs.append([ids[place - 1]])
                runs[-1].append(ids[place])

    def size(sequences: list[list[int]]) -> int:
        texts = tokenizer.batch_decode(sequences, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return sum(len(text.encode("utf-8", "replace")) for text in texts)

    return size(runs) - size([run[:1] for run in runs])


def _fingerprint(rows: Iterable[Mapping[str, Sequence[int]]]) -> str:
    """Return a hash of all tokens and labels: two models with the same one are measured on the same predictions."""
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "labels"):
            values = np.asarray(row[name], dtype=np.int64)
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    return digest.hexdigest()


def _changes(before: Measured, after: Measured, request: Request) -> dict[str, Any]:
    """Return the differences, what they are called, and what kept others from being made."""
    notes: list[str] = []
    changes: dict[str, Any] = {"choices": {}}
    nll: dict[str, Change] = {}
    for name, text in after.texts.items():
        earlier = before.texts[name]
        changes[name] = {"nll": None, "bits_per_byte": plain(text.bits_per_byte - earlier.bits_per_byte)}
        if text.fingerprint == earlier.fingerprint:
            nll[name] = paired([_difference(earlier.losses, text.losses)], request.seed)
            changes[name]["nll"] = nll[name].as_dict()
        else:
            notes.append(
                f"{name} text: the two models make other tokens of it (another tokenizer, chat template or longest "
                "sequence), so that their nats a token do not compare: no difference is given; bits per byte compare."
            )
    for name, answers in after.choices.items():
        earlier_answers = before.choices[name]
        changes["choices"][name] = {
            metric: _accuracy([(earlier_answers, answers)], metric, request.seed).as_dict() for metric in METRICS
        }
    found: dict[str, Change | None] = {
        "forgetting": nll.get("general"),
        "domain_gain": -nll["domain"] if "domain" in nll else None,
        "backward_transfer": -nll["general"] if "general" in nll else None,
    }
    for key, files in (
        ("accuracy_backward_transfer", request.choices),
        ("accuracy_domain_gain", request.domain_choices),
    ):
        pairs = [(before.choices[name], after.choices[name]) for name in dict.fromkeys(files)]
        found[key] = _accuracy(pairs, "accuracy_norm", request.seed) if pairs else None
    known = {key: change.as_dict() if change else None for key, change in found.items()}
    summary = {key: change and change["value"] for key, change in known.items()}
    intervals = {key: change and [change["low"], change["high"]] for key, change in known.items()}
    return {"changes": changes, "summary": summary, "intervals": intervals, "notes": notes}


def _difference(before: Losses, after: Losses) -> tuple[np.ndarray, np.ndarray]:
    return after.sums - before.sums, after.counts.astype(np.float64)


def _accuracy(pairs: Sequence[tuple[Answers, Answers]], metric: str, seed: int) -> Change:
    """Return the mean change of accuracy, files weighing alike."""
    name = "right" if metric == "accuracy" else "right_norm"
    differences = [getattr(after, name) - getattr(before, name) for before, after in pairs]
    return paired([(difference, np.ones(len(difference))) for difference in differences], seed)


def _seen(request: Request, after: Measured) -> list[str]:
    """Return which texts the models were trained on."""
    models = {"this model": request.model.model, "the model before": request.before}
    texts = after.texts.items()
    return [
        note
        for name, text in texts
        for note in seen.notes(models, name, request.texts[name], text.facts["fingerprint"])
    ]


def _oddities(before: Measured | None, after: Measured) -> list[str]:
    """Return what a reader of the numbers has to know."""
    notes = []
    for measured in (before, after):
        if measured is None:
            continue
        model = measured.facts["name"]
        for name, text in measured.texts.items():
            if not math.isfinite(text.losses.total.nll):
                notes.append(f"{model}: the NLL of the {name} text is not finite: the model makes no numbers of it.")
        for name, answers in measured.choices.items():
            if answers.undefined:
                notes.append(f"{model}: {answers.undefined} questions of {name} have likelihoods that are NaN: wrong.")
            if answers.truncated:
                notes.append(
                    f"{model}: {answers.truncated} questions of {name} were too long and lost their beginning."
                )
    return notes


def _options(request: Request) -> dict[str, Any]:
    """Return the options as plain values."""
    given = {name: value for name, value in vars(request).items() if name not in ("model", "texts")}
    given |= asdict(request.model)
    for name, source in request.texts.items():
        parts = {f"{name}_{part}": getattr(source, part) for part in ("columns", "split", "subset")}
        given |= {name: source.source} | parts
        given |= {"held_out": source.held_out, "max_rows": source.max_rows}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
