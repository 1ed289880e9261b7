"""Any `nn.Module` as a pure function of an adapter, of one or of many."""
