"""What a model is: config.json -> Architecture -> graph of its spaces -> seams -> how much carries no information.

Imports errors and dtypes alone: no torch, and no files.
"""
