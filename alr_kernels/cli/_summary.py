"""What record, tune and run print when they are done: what was measured, where the files are, what to do next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

ROWS = {"domain": "domain (held-out rows)", "general": "general (held-out rows)"}
FILES = {
    "importance": "importance",
    "model": "model",
    "recorded": "model of the recording",
    "plain": "model without the pull",
    "results": "numbers",
    "metrics": "log",
    "card": "run card",
    "report": "report",
}


def show(results: Mapping[str, Any]) -> None:
    """Print a table of measurements, the files, and the next command, on standard output."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    if any(results["before"].get(kind) for kind in ROWS) and not _only_read(results):
        console.print(_table(results))
    for line in (*findings(results), "", *_files(results), "", *following(results)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _table(results: Mapping[str, Any]) -> Any:
    """Return nats a token and perplexity, before and after, of each text."""
    from rich.table import Table

    plain = results.get("plain")
    without = ("NLL without the pull",) if plain else ()
    table = Table(
        *("held-out text", "tokens", "NLL before", "NLL after", *without, "change", "perplexity before", "after"),
        title="Negative log-likelihood (NLL) in nats per token",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for kind, name in ROWS.items():
        before, after = results["before"].get(kind), results["after"].get(kind)
        if before and after:
            cells = [name.partition(" (")[0], f"{after['tokens']:,}", _nats(before["nll"]), _nats(after["nll"])]
            if plain:
                cells.append(_nats((plain.get(kind) or {}).get("nll")))
            cells += [_change(before["nll"], after["nll"]), _perplexity(before), _perplexity(after)]
            table.add_row(*cells)
    return table


def findings(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the numbers say, in words."""
    summary = results.get("summary") or {}
    if _only_read(results):
        yield from _as_it_is(results)
    if (gain := summary.get("domain_gain")) is not None:
        yield (
            f"Learnt: {gain:.4f} nats per token of the domain."
            if gain >= 0
            else f"Learnt nothing: NLL of the domain rose by {-gain:.4f} nats per token."
        )
    if (forgetting := summary.get("forgetting")) is not None:
        yield (
            f"Forgot: {forgetting:.4f} nats per token of the general text."
            if forgetting >= 0
            else f"Forgot nothing: NLL of the general text fell by {-forgetting:.4f} nats per token."
        )
    elif results["verb"] == "tune":
        yield "What was forgotten was not measured: --general TEXT would."
    if results.get("plain"):
        changes = (("domain", "plain_domain_gain", -1), ("general text", "plain_forgetting", 1))
        moved = [
            f"{sign * summary[key]:+.4f} on the {text}" for text, key, sign in changes if summary.get(key) is not None
        ]
        yield f"Without the pull, NLL changed by {' and '.join(moved)}."
        from ..report.run_words import at_equal_learning

        if fair := at_equal_learning(results):
            yield fair
    if results["verb"] == "tune" and results.get("importance") and (summary.get("forgetting") or 0.0) > 0:
        yield (
            "To forget less, raise --lambda; `run --baseline`, or --lambda 0 into another folder, shows what the pull "
            "saves."
        )


def _only_read(results: Mapping[str, Any]) -> bool:
    """Say whether the model was read and not trained: there is no before and after."""
    return results["verb"] == "record" and results["options"]["method"] != "path-integral"


def _as_it_is(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield that nothing was trained, and what was measured."""
    found = results["before"].get("general")
    measured = (
        f" Its held-out text has NLL {_nats(found['nll'])} nats per token, perplexity {_perplexity(found)} "
        f"({found['tokens']:,} tokens)."
        if found
        else ""
    )
    yield f"Nothing was trained: --method {results['options']['method']} only reads the model.{measured}"


def _files(results: Mapping[str, Any]) -> Iterator[str]:
    files = results.get("files") or {}
    for what, name in FILES.items():
        if files.get(what):
            yield f"{name + ':':24}{files[what]}"


def following(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield what to do next: the command after record, the line that loads a tuned model."""
    files, options = results.get("files") or {}, results["options"]
    if results["verb"] == "record":
        model = files.get("model") or options["model"]
        words = ["alr-kernels", "tune", "--model", model, "--importance", files.get("importance") or options["out"]]
        if options.get("lora") and not files.get("model"):
            words += ["--lora", options["lora"]]
        yield "Next, learn a domain and hold what mattered:"
        yield f"  {shlex.join(words)} --data DOMAIN --general {shlex.quote(options['data'])} --out tuned"
        return
    lora = results["model"]["space"] == "lora"
    yield "Load it (transformers reads the adapter and its base model):" if lora else "Load it:"
    yield f"  AutoModelForCausalLM.from_pretrained({files['model']!r})"


def _nats(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after - before:+.4f}"


def _perplexity(measured: Mapping[str, Any]) -> str:
    value = measured.get("perplexity")
    return "-" if value is None or not math.isfinite(value) else f"{value:,.2f}" if value < 1e5 else f"{value:.2e}"
