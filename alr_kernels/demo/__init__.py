"""The demo: a small byte-level language model learns a domain, with and without the pull.

corpus.py ──texts──▶ models.py ──batches──▶ training.py ──points──▶ frontier.py ──▶ comparison.py
settings.py: what fixes a study; subjects.py: what is tuned, and from where; study.py: plan and result.
"""
