"""Shared cases: one table of transforms, one of bases, one of models; every public function passes every row."""

import copy
import weakref

import bitsandbytes as bnb
import torch
from bitsandbytes import functional
from torch import nn
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

import vera_func as vf
from vera_func.quant.value import flatten


# Prime sizes, so that no transposition can cancel; `in` fills whole blocks of 32 only together with `out`.
OUT, IN, R = 13, 37, 5
# Of the models below: the rank of an adapter, and how many there are.
RANK, ADAPTERS = 8, 4


def squared(f):
    return lambda *args: f(*args).square().sum()


# Transform of a function of the params.
TRANSFORMS = {
    "forward": lambda f: f,
    "grad": lambda f: grad(squared(f)),
    "vjp": lambda f: lambda p: vjp(f, p)[1](f(p))[0],
    "jvp": lambda f: lambda p: jvp(f, (p,), (p,))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": lambda f: hessian(squared(f)),
    "grad of jvp": lambda f: grad(lambda p: jvp(squared(f), (p,), (p,))[1]),
    "jvp of jvp": lambda f: lambda p: jvp(lambda p: jvp(squared(f), (p,), (p,))[1], (p,), (p,))[1],
    "functionalize": lambda f: functionalize(grad(squared(f))),
}
TOLERANCE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    torch.float32: {"rtol": 2e-4, "atol": 2e-4},
}


def make_base(name, weight, bias=None):
    """`(base_fn, dense weight)` over a weight (out, in); the oracle multiplies by what the base stands for."""
    if name == "dense":
        return lambda x: nn.functional.linear(x, weight, bias), weight
    if name == "conv1d":
        layer = Conv1D(weight.shape[0], weight.shape[1]).to(weight.dtype)
        layer.weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
        layer.bias = nn.Parameter(torch.zeros_like(weight[:, 0]) if bias is None else bias, requires_grad=False)
        return layer, weight
    q = QUANTIZERS[name](weight.float())
    return lambda x: vf.quantized_linear(q, x, bias), vf.dequantize(q, weight.dtype)


QUANTIZERS = {
    "nf4": lambda w: vf.quantize_4bit(w),
    "fp4": lambda w: vf.quantize_4bit(w, "fp4", 128),
    "nested": lambda w: vf.quantize_4bit(w, double_quant=True),
    "int8": vf.quantize_8bit,
}
BASES = ["dense", "conv1d", *QUANTIZERS]


def make_layer(*n, out=OUT, in_=IN, r=R, dtype=torch.float64, seed=0, dora=False):
    """`n` stacked adapters (one without an axis if there is no n), projections, a weight, an input (3, in)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    params = {"lambda_b": normal(*n, out), "lambda_d": normal(*n, r)}
    if dora:
        params["magnitude"] = normal(*n, out)
    # Wider than the layer, as when another layer is wider.
    frozen = {"vera_A": normal(r, in_ + 2), "vera_B": normal(out + 3, r)}
    return params, frozen, normal(out, in_), normal(3, in_)


def dense_forward(params, frozen, x, weight, bias=0.0):
    """The oracle: form the adapted weight, then multiply. Slow and obvious."""
    out, in_ = weight.shape
    A, B = frozen["vera_A"][:, :in_], frozen["vera_B"][:out]
    delta = torch.diag(params["lambda_b"]) @ B @ torch.diag(params["lambda_d"]) @ A
    return x @ (weight + delta).T + bias


def dora_weight(params, weight, delta, differentiate=True):
    """The oracle of DVoRA: the rows of the adapted weight, each scaled to its magnitude."""
    adapted = weight + delta
    norm = adapted.norm(dim=-1)
    return (params["magnitude"] / (norm if differentiate else norm.detach()))[..., None] * adapted


def dora_forward(params, frozen, x, weight, bias=0.0, differentiate=False):
    """`dense_forward` of a DVoRA layer."""
    out, in_ = weight.shape
    A, B = frozen["vera_A"][:, :in_], frozen["vera_B"][:out]
    delta = torch.diag(params["lambda_b"]) @ B @ torch.diag(params["lambda_d"]) @ A
    return x @ dora_weight(params, weight, delta, differentiate).T + bias


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tokens(*shape, seed=0):
    """Ids that are none of the special ones; three rows of seven by default."""
    return torch.randint(3, 67, shape or (3, 7), generator=torch.Generator().manual_seed(seed))


def left_padded(*shape):
    """A mask of rows that begin with 0, 1 or 2 tokens of padding."""
    rows, padding = torch.Size(shape[:-1]).numel(), torch.arange(shape[-1])
    return (padding >= torch.arange(rows)[:, None] % 3).long().reshape(shape)


def row(tree, i):
    """Adapter `i` of a stacked tensor or tree of dicts."""
    return tree[i] if isinstance(tree, torch.Tensor) else {k: row(leaf, i) for k, leaf in tree.items()}


def llama(dtype=torch.float32, attention="sdpa", **changes):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=67, num_hidden_layers=2, attn_implementation=attention, **(sizes | changes), use_cache=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype).eval()


def gpt2(dtype=torch.float32, attention="sdpa"):
    config = GPT2Config(
        vocab_size=67, n_embd=64, n_layer=2, n_head=4, n_positions=64, attn_implementation=attention,
        use_cache=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GPT2LMHeadModel(config).to(dtype).eval()


def bert(dtype=torch.float32, attention="sdpa"):
    config = BertConfig(
        vocab_size=67, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_labels=3, attn_implementation=attention,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config).to(dtype).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}
TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn", "c_fc"], "bert": ["query", "value"]}
FORMATS = {
    **QUANTIZERS,
    "fp4": lambda w: vf.quantize_4bit(w, "fp4"),
    "bf16 storage": lambda w: vf.quantize_4bit(w, quant_storage=torch.bfloat16),
}


def quantized(model, name):
    """The model with every `nn.Linear` but the heads as a bitsandbytes module; `"dense"` leaves it as it is."""
    if name == "dense":
        return model
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and path not in ("lm_head", "classifier"):
            parent, _, child = path.rpartition(".")
            bias = None if module.bias is None else module.bias.data
            setattr(model.get_submodule(parent), child, vf.to_bnb(FORMATS[name](module.weight.data), bias))
    return model


def repack(module):
    """What an eval-mode forward does to a 4-bit layer where the CPU has AVX512-BF16, done on any CPU.

    Nothing public does only this; the function is private to bitsandbytes, and used nowhere else.
    """
    weight = module.weight
    weight.data, weight.quant_state = functional._convert_weight_packed_for_cpu(weight.data, weight.quant_state)
    return module


def exact(model):
    """The model itself, its bitsandbytes layers in training mode: there they multiply by their weight as it is.

    In eval mode a 4-bit layer rewrites its weight and multiplies in bfloat16 where the CPU has AVX512-BF16, and an
    8-bit layer rounds its input to 8 bits. Neither can be the reference of a float32 product.
    """
    for module in model.modules():
        if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            module.train()
    return model


def randomized(params, seed=1, scale=0.1):
    """Params with something learned: a fresh adapter adds nothing, so nothing about it could be seen."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + scale * torch.randn(value.shape, generator=generator).to(value) for key, value in params.items()
    }


def snapshot(*trees):
    """Copies of every tensor in some modules, tensors or dicts, to see later that nothing was written to them."""
    return [copy.deepcopy(tree.state_dict() if isinstance(tree, nn.Module) else tree) for tree in trees]


def relative_error(actual, expected):
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def assert_near(actual, expected, bound=1e-5):
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= bound


def assert_same(actual, expected):
    assert_close(actual, expected, rtol=0, atol=0)


class TiedWeight(nn.Module):
    """Two layers with one weight, of which the first is adapted."""

    def __init__(self):
        super().__init__()
        self.layer, self.other = nn.Linear(7, 7), nn.Linear(7, 7)
        self.other.weight = self.layer.weight

    def forward(self, x):
        return self.other(self.layer(x).tanh())


LANGUAGE = [
    *(("llama", base) for base in ("dense", *FORMATS)),
    ("gpt2", "dense"),
    ("bert", "dense"),
    ("bert", "nested"),
]


def language(name, base, **fields):
    # In training mode (without dropout), as bitsandbytes rewrites 4-bit weights in the other.
    model = quantized(MODELS[name](), base).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    adapted = vf.adapt(model, vf.VeraConfig(r=RANK, **({"target_modules": TARGETS[name]} | fields)))
    return model, adapted._replace(params=randomized(adapted.params))


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def loss_of(adapted, *args, **kwargs):
    return lambda params: logits(adapted.apply(params, adapted.frozen, *args, **kwargs)).square().sum()


def merged(model, adapted):
    """The oracle: a dense copy of the model whose weights have the update added."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        dense = module
        if isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
            q, bias = vf.from_bnb(module)
            dense = nn.Linear(q.shape[1], q.shape[0], bias=bias is not None)
            dense.weight.data = vf.dequantize(q, torch.float32)
            if bias is not None:
                dense.bias.data = bias.clone()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense)
        prefix = f"{name}." if name else ""
        if f"{prefix}lambda_b" in adapted.params:
            vectors = {key: adapted.params[prefix + key] for key in ("lambda_b", "lambda_d")}
            transposed = isinstance(dense, Conv1D)
            weight = dense.weight.detach().T if transposed else dense.weight.detach()
            delta = vf.delta_weight(vectors, adapted.frozen, weight.shape[1])
            magnitude = adapted.params.get(f"{prefix}magnitude")
            new = weight + delta if magnitude is None else dora_weight({"magnitude": magnitude}, weight, delta)
            # A new parameter: one that was tied stays as it was for the other layer.
            dense.weight = nn.Parameter((new.T if transposed else new).clone())
    return model


def build(name="llama", base="dense", attention="sdpa", **fields):
    model = quantized(MODELS[name](attention=attention), base)
    return vf.adapt(model, vf.VeraConfig(r=RANK, **({"target_modules": TARGETS[name]} | fields)))


# The input, and the fields of the configurations, of models that are merged or exported.
IDS = torch.randint(3, 67, (2, 9), generator=torch.Generator().manual_seed(0))
FIELDS = {"llama": {}, "gpt2": {"bias": "vera_only"}, "bert": {"bias": "vera_only", "task_type": "SEQ_CLS"}}


def make_adapted(name, base="dense", **options):
    """A model, and it with random params of an adapter."""
    model = quantized(MODELS[name](), base)
    adapted = vf.adapt(model, vf.VeraConfig(r=16, target_modules=TARGETS[name], **FIELDS[name], **options))
    return model, adapted._replace(params=randomized(adapted.params))


def logits_of(adapted):
    with torch.no_grad():
        return adapted.apply(adapted.params, adapted.frozen, input_ids=IDS).logits


def logits_without_bnb(model):
    """A quantized model's own forward rounds the activations or repacks; read the weights it holds instead."""
    nothing = vf.adapt(model, vf.VeraConfig(r=1, target_modules="all-linear"))
    return logits_of(nothing)


def several(adapted, n=ADAPTERS, scale=0.3):
    return vf.stack_adapters([randomized(adapted.params, seed, scale) for seed in range(n)])


def small(*, bias=True, targets=("0", "2"), **fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3))
    return vf.adapt(model, vf.VeraConfig(r=RANK, target_modules=list(targets), **fields))


class LargestTensor(TorchDispatchMode):
    """Notes how many values the largest tensor has that an operation returns, views included."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))])
        return out


class LiveTensors(TorchDispatchMode):
    """Notes how many tensors of `numel` values or more, views aside, were in memory at most at the same time."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.live, self.most = numel, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor) and leaf._base is None and leaf.numel() >= self.numel:
                self.live += 1
                self.most = max(self.most, self.live)
                weakref.finalize(leaf, self._free)
        return out

    def _free(self):
        self.live -= 1


def quantized_layers(model):
    """The quantized layers of a model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            found[name] = vf.from_bnb(module)
    return found


def assert_same_bits(model, right):
    """All tensors are equal, quantized layers and buffers outside of the state dict included."""
    got, expected = quantized_layers(model), quantized_layers(right)
    assert got.keys() == expected.keys()
    for name, (q, bias) in got.items():
        (leaves, spec), (right_leaves, right_spec) = flatten(q), flatten(expected[name][0])
        assert spec == right_spec
        for one, other in zip(leaves, right_leaves, strict=True):
            assert (one.dtype, one.shape) == (other.dtype, other.shape)
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
        assert (bias is None) == (expected[name][1] is None)
        assert bias is None or torch.equal(bias, expected[name][1])
    for kind in ("named_parameters", "named_buffers"):
        pairs = zip(getattr(model, kind)(), getattr(right, kind)(), strict=True)
        for (name, one), (right_name, other) in pairs:
            assert name == right_name
            assert torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))
            assert (one.dtype, one.requires_grad) == (other.dtype, other.requires_grad)
