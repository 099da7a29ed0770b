"""The demo: a small byte-level language model learns a domain, with and without the pull.

corpus.py ──texts──▶ models.py ──batches──▶ training.py ──points──▶ frontier.py ──▶ study.py (plan and result)
"""
