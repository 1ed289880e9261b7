"""Adapters merged into the weights of their layers, and how much of the update is retained."""
