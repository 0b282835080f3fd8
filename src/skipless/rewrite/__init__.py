"""Rewriting a checkpoint: what is asked for -> plan -> tasks -> executors, with what it costs and how long it takes.

Imports model, checkpoint, algebra and architecture.
"""
