"""Expressions match what `re` matches, and stop."""

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings, strategies
from torch import nn

import vera_func as vf
from vera_func.model import expressions
from vera_func.model.expressions import Expression, require_expression
from vera_func.model.targets import DEFAULT_TARGETS

from helpers import llama


NAMES = [
    "",
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.self_attn.v_proj",
    "model.layers.1.mlp.down_proj",
    "model.layers.1.mlp.experts.10.gate_proj",
    "model.visual.blocks.3.attn.qkv",
    "model.language_model.layers.2.self_attn.k_proj",
    "transformer.h.0.attn.c_attn",
    "bert.encoder.layer.0.attention.self.query",
    "unet.down_blocks.0.attentions.0.to_q",
    "base.{x}.[y]:z",
    "a{e}",
    "x\n",
]
# As they stand in PEFT's documentation, in its tests, and in adapters on the hub.
TYPICAL = [
    r".*",
    r".*\.(q_proj|v_proj)",
    r".*(q|k|v)_proj$",
    r"^model\.layers\.[0-9]+\.self_attn\.(q|v)_proj",
    r"model\.layers\.(0|1|11)\..*_proj",
    r".*layers\.(?:[0-9]|1[0-1])\.(?:self_attn|mlp)\.(?:q|k|v|o|gate|up|down)_proj",
    r"^(?!.*visual)(?!lm_head).*(?:q_proj|k_proj|qkv)$",
    r"(?:model\.)?(?:.*?(?:vision|visual|language|text).*?){1,2}(?:self_attn|attn|mlp).*(?:q_proj|qkv|k_proj)",
    r"model.language_model.layers.\d+.self_attn.\w+",
    r".*\.h\.\d{1,2}\.attn\.c_attn",
    r".*\.\d{,2}\..*",
    r".*\.\d{1,}\..*",
    r".*(?<!\.v_proj)(?<=_proj)",
    r"(?i).*Q_PROJ",
    r"(?P<side>.*)\.query",
    r"(\w+)\.\1.*|lm_head|.*\.(\d+)\.\w+\.\2\..*",
    r"unet\..*to_[qkv]",
    r"[^.]*",
    r"\w+(\.\w+)*",
    r"base\.{x}\.\[y\]:z",
    r".*[{]x}.*[[]y[]].*",
    r"a{e}|a{e<=1}|a{}|{",
    r"[[:alpha:]]+",
    r"[]{]+",
    r"[^]]*",
    r"x.?",
    r"(?s)x.",
    r".*\Z",
    *(targets for targets in DEFAULT_TARGETS.values() if isinstance(targets, str)),
]


def assert_as_re(value, names):
    theirs = re.compile(value)
    require_expression("target_modules", value)
    ours = Expression("target_modules", value)
    for name in names:
        for method in ("fullmatch", "match"):
            expected, found = getattr(theirs, method)(name), getattr(ours, method)(name)
            assert (found is None) == (expected is None), (value, name, method)
            assert found is None or found.span() == expected.span(), (value, name, method)


# re warns of what may be an operation on sets one day.
SETS = pytest.mark.filterwarnings("ignore:Possible (nested set|set (difference|intersection|union)):FutureWarning")


@SETS
@pytest.mark.parametrize("value", TYPICAL)
def test_typical_expressions_match_as_in_re(value):
    assert_as_re(value, NAMES)


PARTS = [
    *("a", "b", "A", ".", "*", "+", "?", "(", ")", "[", "]", "{", "}", "|", "^", "$", "-", ",", "1", ":", "\n", "#"),
    *(r"\d", r"\w", r"\.", r"\b", r"\1", r"\Z", r"\[", r"\{", r"\\", "{2}", "{1,2}", "{,2}", "{,}", "{1,}", "{e}"),
    *("{i<=1}", "(?:", "(?!", "(?=", "(?<=", "(?<!", "(?i)", "(?s)", "[a-b]", "[^a]", "[[:alpha:]]", "--", "&&", "||"),
]


@SETS
@pytest.mark.filterwarnings("ignore:Flags not at the start:DeprecationWarning")  # an error since Python 3.11
@settings(max_examples=500, deadline=None)
@given(
    strategies.lists(strategies.sampled_from(PARTS), max_size=8).map("".join),
    strategies.lists(strategies.text("abA.1{}e,[]:lph\n-#", max_size=5), min_size=5, max_size=10),
)
def test_any_expression_matches_as_in_re(value, names):
    try:
        re.compile(value)
    except re.error:
        with pytest.raises(ValueError, match="is not a regular expression"):
            require_expression("target_modules", value)
        return
    assert_as_re(value, names)


HOSTILE = [r"(.|.)*\w(?<=!)", r"(?:b{0,300}){0,300}(?<=!)", r"(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(.*?)(?<=!)"]


@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_expression_stops(value, monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    with pytest.raises(ValueError, match=r"target_modules=.* takes more than 0\.1 seconds"):
        vf.adapt(nn.ModuleDict({"b" * 60: nn.Linear(2, 2)}), vf.VeraConfig(target_modules=value))
    config = vf.VeraConfig(target_modules=["b" * 60], layers_to_transform=[0], layers_pattern=value)
    blocks = nn.ModuleDict({"b" * 60: nn.ModuleList([nn.ModuleDict({"b" * 60: nn.Linear(2, 2)})])})
    with pytest.raises(ValueError, match=r"layers_pattern=.* takes more than 0\.1 seconds"):
        vf.adapt(blocks, config)


def test_the_time_is_for_all_names_together(monkeypatch):
    expression = Expression("target_modules", r"(.|.)*b(?<=c)")
    monkeypatch.setattr(expression, "left", 0.05)
    for length in range(1, 60):
        try:
            expression.fullmatch("b" * length)
        except ValueError:
            break
    assert expression.left < 0
    with pytest.raises(ValueError, match="takes more than"):
        expression.fullmatch("b" * 60)


def test_a_hostile_expression_in_a_file_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 0.1)
    model = llama()
    _, params, frozen, config = vf.adapt(model, vf.VeraConfig(r=2, target_modules=r".*\.q_proj"))
    vf.save_adapter(tmp_path, params, frozen, dataclasses.replace(config, target_modules=HOSTILE[0]))
    with pytest.raises(ValueError, match=r"adapter_config\.json does not fit this model: .* takes more than 0\.1 sec"):
        vf.load_adapter(tmp_path, model)


@pytest.mark.parametrize(
    "value",
    ["(?:(?:a{1000}){1000}){1000}", "a{99999999}", "(?:a{,99}){,99}{0}(?:b{99}){2}", "a|" * 50_001 + "a"],
    ids=lambda value: value[:20],
)
def test_too_large_an_expression(value):
    with pytest.raises(ValueError, match=r"too large a regular expression|is not a"):
        vf.VeraConfig(target_modules=value)


@pytest.mark.parametrize(
    "value", ["(", "a{2,1}", "(?R)", r"\p{L}", "a{" + "9" * 5000 + "}", "(" * 10_000], ids=lambda v: v[:9]
)
def test_what_is_no_expression_of_re(value):
    with pytest.raises(ValueError, match=r"target_modules=.* is not a regular expression"):
        vf.VeraConfig(target_modules=value)


def test_a_group_in_layers_pattern():
    """The layer's index is the number after the pattern, whatever groups that has."""
    model = llama()
    fields = {"r": 2, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    plain = vf.adapt(model, vf.VeraConfig(**fields, layers_pattern="layers"))
    grouped = vf.adapt(model, vf.VeraConfig(**fields, layers_pattern="(layers|h)"))
    assert grouped.params.keys() == plain.params.keys()
    assert all(torch.equal(grouped.params[key], value) for key, value in plain.params.items())
