"""From what a user names to tokenised sets: files → rows → held out or not → tokens → sequences → batches."""

from .collate import Collator
from .loading import load
from .source import Source, Texts

__all__ = ["Collator", "Source", "Texts", "load"]
