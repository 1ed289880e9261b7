"""Turn any `nn.Module` into a pure function of one adapter or of many.

One adapter: `config` and `targets` (with `expressions`) say which layers are adapted. `adapt` creates `apply` and the
params. `apply` runs a copy of the module tree (`tree`, `layers`, `closures`, `base_layers`, `lazy_weight`), which
`checkout` isolates for each call. `module` makes a module with trainable parameters; `dense_cache` trades memory for
speed.

Many adapters: `batch` stacks and selects adapters, `vmap` maps over a stack, and `pool`, `algebra` and `dora` make new
adapters. `rows`, `rehearse` and `follow` find the axis of the rows in each layer's input.

Models: `convert` quantizes and dequantizes, `describe` updates the configuration of transformers, `head` separates
the hidden states of a language model from its output head.
"""
