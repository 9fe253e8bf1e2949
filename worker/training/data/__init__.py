"""Rows of a dataset: read, checked, rendered and split, before any model is loaded."""
