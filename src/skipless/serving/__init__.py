"""Skipless models in the engines people use."""
