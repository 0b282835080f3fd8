"""What is said of a model: its count, an audit, a verdict on two of them, the rank certificate.

Imports rewrite and what that imports.
"""
