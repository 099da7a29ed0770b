"""`alr-kernels eval`: what a model knows of texts and questions, and what it knew before."""

from __future__ import annotations

import json
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import _output
from ._errors import clean

if TYPE_CHECKING:
    from ..finetune.comparison import Request

FIRST, TEXTS, ADVANCED = "Begin with these", "Texts", "Advanced"


class Dtype(str, Enum):
    """Precision of weights."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Quantize(str, Enum):
    """How the base model's weights are kept."""

    none = "none"
    int8 = "int8"
    nf4 = "nf4"


class Device(str, Enum):
    """Where the models run."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class LossOn(str, Enum):
    """Which tokens count."""

    answers = "answers"
    all = "all"


def _option(text: str, panel: str, *names: str, form: str | None = None) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, metavar=form)


def eval(
    model: Annotated[
        str,
        _option("Model to measure: a folder, an adapter's folder, or a hub id.", FIRST, form="MODEL"),
    ],
    before: Annotated[
        str | None, _option("Model that it came from, measured too; needed to say what changed.", FIRST, form="MODEL")
    ] = None,
    general: Annotated[
        str | None, _option("Text of what was known before: file, folder or hub id, as of tune.", FIRST, form="DATA")
    ] = None,
    domain: Annotated[str | None, _option("Text of what was learnt, likewise.", FIRST, form="DATA")] = None,
    choices: Annotated[
        list[str] | None,
        _option(
            "Multiple choice about what was known before: a .jsonl, .csv or .parquet file with the columns of SciQ, "
            "PIQA or MedMCQA, or question, choices, answer. May be given again.", FIRST, form="FILE",
        ),
    ] = None,
    domain_choices: Annotated[
        list[str] | None, _option("Multiple choice about the domain, likewise.", FIRST, form="FILE")
    ] = None,
    as_json: Annotated[bool, _option("Print one JSON object instead of the table.", FIRST, "--json", form=" ")] = False,
    out: Annotated[Path | None, _option("Write the JSON object here, too.", FIRST, form="FILE")] = None,
    held_out: Annotated[
        float | None,
        _option(
            "Measure on the rows that training with this share and --seed held out. (default: all rows)",
            TEXTS, form="NUMBER",
        ),
    ] = None,
    seed: Annotated[int, _option("Draws the held-out rows, those of --limit, and the intervals.", TEXTS, form="N")] = 0,
    limit: Annotated[
        int | None, _option("Rows of each text, drawn by the seed; of questions, the first ones.", TEXTS, form="N")
    ] = None,
    max_length: Annotated[
        int, _option("Tokens of a sequence, at most; cut down to what the model takes.", TEXTS, form="N")
    ] = 1024,
    batch: Annotated[int, _option("Sequences in a batch.", TEXTS, form="N")] = 8,
    packing: Annotated[
        bool | None,
        _option(
            "Join short texts into full sequences. (default: for plain text)",
            TEXTS, "--packing/--no-packing", form=" ",
        ),
    ] = None,
    loss_on: Annotated[
        LossOn | None,
        _option(
            "What counts: answers (completions and assistant turns), or all tokens. (default: answers)",
            TEXTS, form="NAME",
        ),
    ] = None,
    general_columns: Annotated[
        str | None, _option("Which columns hold what: text=body, or prompt=q,completion=a.", TEXTS, form="ROLE=COLUMN")
    ] = None,
    domain_columns: Annotated[
        str | None, _option("As --general-columns, of --domain.", TEXTS, form="ROLE=COLUMN")
    ] = None,
    general_split: Annotated[
        str | None,
        _option("Split of a hub data set. (default: train)", ADVANCED, form="NAME"),
    ] = None,
    general_subset: Annotated[str | None, _option("Configuration of a hub data set.", ADVANCED, form="NAME")] = None,
    domain_split: Annotated[str | None, _option("As --general-split, of --domain.", ADVANCED, form="NAME")] = None,
    domain_subset: Annotated[str | None, _option("As --general-subset, of --domain.", ADVANCED, form="NAME")] = None,
    device: Annotated[
        Device,
        _option("Where the models run (auto, cpu, cuda); auto takes a GPU where there is one.", ADVANCED, form="NAME"),
    ] = Device.auto,
    dtype: Annotated[
        Dtype,
        _option("Precision of the weights (auto, fp32, bf16, fp16); auto: as they are saved.", ADVANCED, form="NAME"),
    ] = Dtype.auto,
    quantize: Annotated[
        Quantize,
        _option("Keep base models in 8 or 4 bits, by bitsandbytes (none, int8, nf4).", ADVANCED, form="NAME"),
    ] = Quantize.none,
    tokenizer: Annotated[str | None, _option("Another tokenizer than the models'.", ADVANCED, form="MODEL")] = None,
    chat_template: Annotated[str | None, _option("File with a chat template.", ADVANCED, form="FILE")] = None,
    attention: Annotated[
        str | None,
        _option("Attention implementation, such as sdpa or eager.", ADVANCED, form="NAME"),
    ] = None,
    trust_remote_code: Annotated[
        bool, _option("Run code that comes with a model.", ADVANCED, "--trust-remote-code", form=" ")
    ] = False,
    debug: Annotated[
        bool,
        _option("Show tracebacks, and warnings of other libraries.", ADVANCED, "--debug", form=" "),
    ] = False,
) -> None:  # fmt: skip
    """Measure a model on texts and questions; with --before, also the model it came from, and say what changed.

    Example:

        alr-kernels eval --model tuned --before my-llama --general general/ \\
            --domain domain.jsonl --choices sciq.jsonl

    Of texts: negative log-likelihood in nats a token, perplexity, bits per byte.
    Of questions: accuracy by log-likelihood, plain and normalised by length.
    Differences come with 95 % intervals. docs/evaluation.md defines every number.
    """
    given = locals()
    from .. import _environment

    rank, processes = _environment.launched()
    if rank:
        return  # the first process of a job measures, alone
    with clean("eval", debug), _output.quiet("eval", True, debug):
        if processes > 1:
            typer.echo(f"alr-kernels eval: launched as {processes} processes; the first measures, alone.", err=True)
        results = _results(given)
        for note in results["notes"]:
            typer.echo(f"alr-kernels eval: {note}", err=True)
        if as_json:
            typer.echo(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
        else:
            from rich.console import Console

            from ..report import evaluation_table

            evaluation_table.show(results, Console(width=None if sys.stdout.isatty() else evaluation_table.WIDTH))


def _results(given: dict[str, Any]) -> dict[str, Any]:
    """Check the options and measure."""
    from .. import _validate_choices, _validate_finetune, _validate_values

    _validate_choices.result_file(given["out"])
    _validate_choices.options_of_texts(given)
    for option, low in (("limit", 1), ("batch", 1), ("max_length", 2)):
        if given[option] is not None:
            _validate_finetune.at_least(f"--{option.replace('_', '-')}", given[option], low)
    _validate_values.seed(given["seed"], "--seed")
    _paths_there(given)
    from rich.console import Console

    from .._plain import plain

    console = Console(file=sys.stderr)
    with console.status("importing torch and transformers"):
        from ..finetune.comparison import compare
        from ..finetune.outcome import write_json
    with _output.Shown("eval", console, unit="batches") as progress:
        results = plain(compare(_request(given), progress))
    if given["out"] is not None:
        write_json(given["out"], results)
    return results


def _paths_there(given: dict[str, Any]) -> None:
    """Check what can only be a path before torch is imported, which takes seconds."""
    from .. import _validate_finetune

    for option in ("model", "before"):
        if given[option] is not None:
            _validate_finetune.model_folder(f"--{option}", given[option])
    for option in ("general", "domain"):
        if given[option] is not None:
            _validate_finetune.text_there(f"--{option}", given[option])
    for option in ("choices", "domain_choices"):
        for path in given[option] or ():
            _validate_finetune.file_there(f"--{option.replace('_', '-')}", path, "a file of questions")
    if given["chat_template"] is not None:
        _validate_finetune.file_there("--chat-template", given["chat_template"], "a file with a Jinja template")


def _request(given: dict[str, Any]) -> Request:
    from ..finetune.comparison import Request
    from ..finetune.data import Source
    from ..finetune.options import ModelOptions

    def text(name: str) -> Source:
        return Source(
            given[name],
            columns=given[f"{name}_columns"],
            split=given[f"{name}_split"] or "train",
            subset=given[f"{name}_subset"],
            max_rows=given["limit"],
            held_out=1.0 if given["held_out"] is None else given["held_out"],
            seed=given["seed"],
            option=f"--{name}",
        )

    plain = ("model", "tokenizer", "chat_template", "attention", "trust_remote_code")
    chosen = ("device", "dtype", "quantize")
    model = ModelOptions(**{name: given[name] for name in plain}, **{name: given[name].value for name in chosen})
    return Request(
        model=model,
        before=given["before"],
        texts={name: text(name) for name in ("general", "domain") if given[name] is not None},
        choices=tuple(given["choices"] or ()),
        domain_choices=tuple(given["domain_choices"] or ()),
        loss_on=given["loss_on"].value if given["loss_on"] else "answers",
        **{name: given[name] for name in ("max_length", "packing", "batch", "limit", "seed")},
    )
