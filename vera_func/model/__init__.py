"""Turn any `nn.Module` into a pure function that takes the parameters of one adapter, or of many, as an argument.

One adapter: `config` and `targets` select the layers to adapt, `linears` tells which layers can be adapted, and
`expressions` matches regular expressions. `adapt` creates the params, and `build` creates `apply`, which runs a copy of
the model's module tree. `tree`, `layers`, `closures`, `base_layers` and `lazy_weight` make the copy, `binding` binds
params to the copy, and `checkout` isolates calls from each other. `module` converts an adapted model to a module with
trainable parameters. `dense_cache` stores dense copies of quantized weights, which trades memory for speed.

Many adapters: `batch` stacks and selects adapters, `vmap` maps a function over stacked adapters, `pool` and `algebra`
combine adapters, and `dora` computes the norms of DVoRA in advance. The folder `rows` finds the batch axis of each
layer's input.

Models: `convert` quantizes and dequantizes models, `describe` updates the configuration of a transformers model, and
`head` computes the hidden states of a language model without its output head.
"""
