"""From a model and files of text to a tuned model that remembers: what the commands record, tune, run and eval do.

options → settings (flags, YAML, run cards) → data, models → phases (on transformers' Trainer) → outcome.
"""
