"""Evaluators: perplexity and lm-eval tasks of a model in memory.

The rooms: `corpora` (token windows from text), `perplexity`, `harness` (lm-eval tasks), `scorer` (log-likelihoods),
`head` (hidden states to log-probabilities), `packaged` (the data of the embedded default), `errors`.
Importing this package imports nothing heavy; the rooms import torch, datasets or lm_eval when they are entered.
"""
