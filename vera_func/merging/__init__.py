"""Merge adapters into the weights of their layers, and measure how much of the update is retained."""
