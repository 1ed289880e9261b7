"""The maths of one adapted layer, in pure PyTorch.

Start with `projection` (the frozen matrices A and B) and `adapter` (the vectors, the update and the adapted layer).
`dora` adds magnitudes. `autograd` and `grad` make derivatives cheaper. `keys` defines the keys of params, and `shapes`
checks arguments, for the whole package.
"""
