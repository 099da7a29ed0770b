"""The demo: a small byte-level language model learns a domain, with and without the pull.

corpus.py ──texts──▶ models.py ──model, batches──▶ training.py ──curves──▶ frontier.py ──▶ study.py (the plan and the result)
"""
