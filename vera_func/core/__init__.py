"""The maths of one adapted layer; depends on torch only.

Start with `projection` (the frozen matrices A and B) and `adapter` (the vectors, the update and the adapted layer).
`dora` adds magnitudes. `autograd` and `grad` make derivatives cheaper. `keys` and `shapes` have the names and the
checks that all folders share.
"""
