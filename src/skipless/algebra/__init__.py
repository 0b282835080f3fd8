"""Tensors in, tensors out: bases, closing seams exactly, rounding what comes out, and what that costs.

Imports architecture (a seam says which matrices play which part) and errors. Knows no files and no options.
"""
