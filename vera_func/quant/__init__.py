"""4-bit and 8-bit weights as values, the linear layer over them, and conversion from and to bitsandbytes' modules.

Start with `value` (what a quantized weight is), `quantize` (from a dense weight and back), `linear` (the product,
under every transform) and `bnb` (bitsandbytes' modules). `cpu_layout`, `native`, `dense_copy` and `crossover` make
the product faster. `foreign` recognizes the layers of other libraries.
"""
