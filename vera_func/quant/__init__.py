"""4-bit and 8-bit weights as values, the linear layer over them, and conversion from and to bitsandbytes' modules."""
