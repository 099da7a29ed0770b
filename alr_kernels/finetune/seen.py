"""Whether a model was trained on a text that it is measured on: the run card beside the model says so."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import config_file

if TYPE_CHECKING:
    from .data import Source

CARD = "run.yaml"
OF_RUN = ("tuned", "plain", "recorded")  # folders of models in a folder of `run`, which has the card
TRAINED = {"record": ("data",), "tune": ("data",), "run": ("data", "general")}  # verb → texts that it trains on


def notes(models: Mapping[str, str | None], name: str, source: Source, fingerprint: str) -> Iterator[str]:
    """Yield a remark for each model that was trained on rows it is measured on.

    Args:
        models: what a model is called in the remark → its folder or hub id.
        name: of the text, "general" or "domain".
        source: of the text.
        fingerprint: of all its rows in use, as in ``Texts.facts``.
    """
    for what, folder in models.items():
        card = card_of(folder) if folder else None
        for option in TRAINED.get((card or {}).get("verb", ""), ()):
            assert card is not None
            if is_same(card, option, source, fingerprint) and (said := _said(card, option, source)):
                yield f"{name} text: {what} was trained on these rows{said}"
                break


def card_of(folder: str) -> dict[str, Any] | None:
    """Return the card of the run that a model came from, or None where there is none that can be read."""
    path = Path(folder)
    places = [path, path.resolve().parent] if path.resolve().name in OF_RUN else [path]
    for place in places:
        if (place / CARD).is_file():
            try:
                return config_file.read_card(place / CARD)
            except (OSError, ValueError, TypeError, ImportError):
                return None  # a file of another program, or of another version: it says nothing of this text
    return None


def is_same(card: Mapping[str, Any], option: str, source: Source, fingerprint: str) -> bool:
    """Say whether "data" or "general" of a card has the same rows, or is the same file, folder or hub data set."""
    facts = (card.get("data") or {}).get(option) or {}
    if facts.get("fingerprint") == fingerprint:
        return True
    options, before = card.get("options") or {}, "" if option == "data" else "general_"
    known = options.get(option)
    parts = (options.get(f"{before}split") or "train", options.get(f"{before}subset"))
    return (
        known is not None
        and os.path.realpath(known) == os.path.realpath(source.source)
        and parts == (source.split, source.subset)
    )


def _said(card: Mapping[str, Any], option: str, source: Source) -> str:
    """Return what was held out and how to measure on that alone; empty where no row measured on was trained on."""
    options = card.get("options") or {}
    elsewhere = options.get("held_out_data" if option == "data" else "general_held_out_data")
    if elsewhere is not None:
        return f"; measure on what it was not trained on: {elsewhere}"
    share, seed = options.get("held_out") or 0, options.get("seed") or 0
    if not share:
        return ", and none was held out"
    if source.held_out <= share and source.seed == seed:
        return ""  # a smaller share is drawn from the same rows
    return f", all but the held-out ones; measure those alone with --held-out {share:g} --seed {seed}"
