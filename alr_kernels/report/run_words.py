"""What a run amounts to, in plain words with the numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..demo.frontier import general_at, shared_level
from . import charts
from .drawing import as_bytes, duration

NATS = "nats per token"


def summary(results: Mapping[str, Any]) -> list[str]:
    """Return paragraphs: what was learnt, what was forgotten, what the pull changed, what it cost."""
    parts = (_learnt, _forgotten, _compared, at_equal_learning, _moved, _spent)
    return [said for said in (part(results) for part in parts) if said]


def _learnt(results: Mapping[str, Any]) -> str:
    gain, said = results["summary"]["domain_gain"], _change("domain", results)
    if gain > 0:
        return f"The model learnt the domain: {said}, {gain:.3f} nats per token better."
    return f"The model did not learn the domain: {said}. More steps or a larger learning rate may be needed."


def _change(kind: str, results: Mapping[str, Any]) -> str:
    old, new = results["before"][kind], results["after"][kind]
    return (
        f"on held-out {kind} text its NLL went from {old['nll']:.3f} to {new['nll']:.3f} nats per token (perplexity "
        f"{old['perplexity']:.4g} to {new['perplexity']:.4g}, {new['tokens']:,} tokens)"
    )


def _forgotten(results: Mapping[str, Any]) -> str:
    lost = results["summary"]["forgetting"]
    if lost is None:
        return "What it forgot was not measured: give a general text with `--general`."
    if lost > 0:
        return f"It forgot {lost:.3f} nats per token of what it knew: {_change('general', results)}."
    return f"It forgot nothing that was measured: {_change('general', results)}."


def _compared(results: Mapping[str, Any]) -> str:
    """Say what the baseline learnt and forgot, and what the pull saved of it."""
    said = results["summary"]
    plain_gain, plain_lost = said.get("plain_domain_gain"), said.get("plain_forgetting")
    if plain_gain is None:
        return ""
    if plain_lost is None or said["forgetting"] is None:
        return f"The baseline, the same training without the pull, learnt {plain_gain:.3f} nats per token."
    lost, gain = said["forgetting"], said["domain_gain"]
    if plain_lost <= 0:
        return (
            f"The baseline, the same training without the pull, learnt {plain_gain:.3f} nats per token and forgot "
            f"nothing (its general NLL fell by {-plain_lost:.3f}): there was nothing to save."
        )
    began = (
        f"The baseline, the same training without the pull, learnt {plain_gain:.3f} and forgot {plain_lost:.3f} nats "
        "per token"
    )
    share = 100 * (plain_lost - lost) / plain_lost
    saved = f"avoided {share:.0f} % of that forgetting" if share > 0 else f"forgot {-share:.0f} % more"
    saved = "avoided all of that forgetting" if lost <= 0 else saved
    if plain_gain <= 0:
        return f"{began}. The pull {saved}."
    kept = f"{100 * gain / plain_gain:.0f} %" if gain > 0 else "nothing"
    return f"{began}. The pull {saved}, and kept {kept} of what the baseline learnt."


def at_equal_learning(results: Mapping[str, Any]) -> str:
    """Compare with the baseline where both had learnt the same: at the end, whoever learnt less forgot less, too.

    Empty where there is no such point, and where the baseline forgot nothing, so that nothing could be saved.
    """
    if ((results.get("summary") or {}).get("plain_forgetting") or 0.0) <= 0:
        return ""
    points = {
        phase: [(entry["domain"], entry["general"]) for entry in (results.get("curves") or {}).get(phase) or ()
                if entry["domain"] is not None and entry.get("general") is not None]
        for phase in ("tune", "plain")
    }  # fmt: skip
    if not all(points.values()):
        return ""
    level = shared_level(list(points.values()))
    tuned, plain = (general_at(points[phase], level) for phase in ("tune", "plain"))
    if tuned is None or plain is None:
        return ""
    start = results["before"]["general"]["nll"]
    return (
        f"At the same domain NLL of {level:.3f}, the best that both reached, general NLL had changed by "
        f"{tuned - start:+.3f} with the pull and by {plain - start:+.3f} without."
    )


def _moved(results: Mapping[str, Any]) -> str:
    moves = results["movement"] or {}
    if not moves.get("tune") or not moves.get("plain"):
        return ""
    share, count, tuned = charts.most_important(moves["tune"])
    _, _, plain = charts.most_important(moves["plain"])
    if not tuned or not plain:
        return ""
    return (
        f"The {count:,} most important weights ({100 * share:.2g} % of all) moved {tuned / plain:.2g} times as far as "
        "in the baseline."
    )


def _spent(results: Mapping[str, Any]) -> str:
    cost, seconds = results["cost"], {phase: spent for phase, spent in results["seconds"].items() if spent}
    parts = ", ".join(f"{phase} {duration(spent)}" for phase, spent in seconds.items())
    said = [f"It took {duration(sum(seconds.values()))} ({parts})."] if seconds else []
    kinds = (("importance", "importance"), ("anchor", "anchors"))
    beside = [f"{as_bytes(cost['bytes'][kind])} of {name}" for kind, name in kinds if cost["bytes"].get(kind)]
    if beside:
        moments = cost["bytes"].get("moments")
        held = f", beside {as_bytes(moments)} of AdamW's own moments" if moments else ""
        said.append(f"The pull holds {' and '.join(beside)}{held}.")
    if cost.get("artifact_bytes"):
        said.append(f"The importance file has {as_bytes(cost['artifact_bytes'])}.")
    return " ".join(said)
