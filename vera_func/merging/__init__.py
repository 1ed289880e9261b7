"""Merge adapters into the weights of their layers, and measure how much of the update is retained.

`layer` merges one layer, by rounding or with calibration (`calibrate`). `report` measures a merged layer. `model`
merges all layers of a model. For a calibrated merge, `second_moments` computes the second moments of the layers'
inputs.
"""
