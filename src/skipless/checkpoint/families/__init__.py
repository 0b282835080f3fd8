"""Descriptions of other people's models, one module each, found by being here: a FAMILY (checkpoint/family.py)."""
