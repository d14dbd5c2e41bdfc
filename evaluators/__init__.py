"""Evaluators: perplexity and lm-eval tasks of a model in memory.

The rooms: token windows from text (`corpora`, `recipes`), `perplexity` and `divergence` on them; lm-eval's tasks
(`tasks` are the known ones, `harness` evaluates one); what answers them (`scorer`: log-likelihoods by `prefix_tree` and
`tree_attention`, or `sequence_rows`, where wanted with `hflm_rounding`; `generation`: texts); `head` (hidden states to
log-probabilities); `comparison` (paired statistics); `sandbox` (programs that models wrote); `forensics` (where numbers
cease to be finite); `packaged` (the data of the embedded default).
Importing this package imports nothing heavy; the rooms import torch, datasets or lm_eval when they are entered.
"""
