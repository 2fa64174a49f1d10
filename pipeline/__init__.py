"""Joins the packages: extraction, training, evaluation, checkpoints and the demo."""
