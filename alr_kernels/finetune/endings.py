"""How the names of files with texts and with tables end."""

from __future__ import annotations

TEXT = (".txt", ".text", ".md", ".rst")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
