"""Turn any `nn.Module` into a pure function of one adapter or of many."""
