"""4-bit and 8-bit weights as values, linear layers with such weights, and conversion of bitsandbytes' modules.

Start with `value` (types of quantized weights), `quantize` (conversion from and to dense weights), `linear` (the
product of inputs and a quantized weight, which supports every transform) and `bnb` (conversion of bitsandbytes'
modules). `cpu_layout`, `native`, `dense_copy` and `crossover` make the product faster. `foreign` recognizes quantized
layers of other libraries.
"""
