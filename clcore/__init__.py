"""Continual learning for adapters of language models: strategies, training loop, evaluation.

Needs torch, transformers and peft only. The service in the package `service` runs it on Ray.
"""
