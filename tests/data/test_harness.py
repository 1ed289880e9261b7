"""lm-evaluation-harness over `to_module`, and over all adapters of a stack in one pass: the same scores."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import vera_func as vf
from vera_func.data.harness import SharedScores, encode_pair, harness_models

from helpers import quantized, randomized


lm_eval = pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")  # lm_eval's own
N = 2


@pytest.fixture(scope="module")
def setup(folder):
    """A tiny 4-bit language model with a stack of adapters, and its tokenizer."""
    model = quantized(AutoModelForCausalLM.from_pretrained(folder).eval(), "nf4")
    adapted = vf.adapt(model, vf.VeraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    adapters = [randomized(adapted.params, seed, 1.0) for seed in range(N)]
    return adapted, adapters, AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def task(reviews, tmp_path_factory):
    """A local task of multiple choice; one choice has several words."""
    lines = reviews.read_text().splitlines()[1:25]
    rows = [dict(zip(("text", "label"), line.rsplit(",", 1), strict=True)) for line in lines]
    file = tmp_path_factory.mktemp("task") / "test.jsonl"
    file.write_text("".join(json.dumps({**row, "label": int("pos" in row["label"])}) + "\n" for row in rows))
    return {
        "task": "tiny_reviews",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}} was",
        "doc_to_choice": ["bad", "good and good"],
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


def results(lm, task):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=False)  # the defaults are thousands of files
    found = lm_eval.simple_evaluate(model=lm, tasks=[dict(task)], task_manager=manager, bootstrap_iters=0)
    samples = [list(sample["filtered_resps"]) for sample in found["samples"]["tiny_reviews"]]
    scores = {key: value for key, value in found["results"]["tiny_reviews"].items() if key.startswith("acc")}
    return scores, samples


@pytest.mark.parametrize("batch_size", [1, 5])
def test_one_pass_gives_what_one_by_one_gives(batch_size, setup, task):
    from lm_eval.models.huggingface import HFLM

    adapted, adapters, tokenizer = setup
    many = harness_models(adapted._replace(params=vf.stack_adapters(adapters)), tokenizer, batch_size=batch_size)
    assert len(many) == N
    seen = []
    for params, lm in zip(adapters, many, strict=True):
        one = HFLM(pretrained=vf.to_module(adapted._replace(params=params)), tokenizer=tokenizer, batch_size=1)
        (expected, right), (got, samples) = results(one, task), results(lm, task)
        assert got == expected
        for pairs, right_pairs in zip(samples, right, strict=True):
            for (logprob, greedy), (right_logprob, right_greedy) in zip(pairs, right_pairs, strict=True):
                assert float(logprob) == pytest.approx(float(right_logprob), abs=1e-3)
                assert greedy == right_greedy
        seen.append(str(samples))
    assert len({*seen}) == N  # the adapters differ


def test_each_text_is_computed_once(setup):
    adapted, adapters, tokenizer = setup
    scores = SharedScores(adapted._replace(params=vf.stack_adapters(adapters)), tokenizer, 4)
    batches = []
    logprobs = scores._logprobs
    scores._logprobs = lambda rows, width: batches.append([len(row) for row in rows]) or logprobs(rows, width)
    pairs = [("the film was", " good"), ("the film was", " bad"), ("", "the film"), ("the film was", " good and bad")]
    first = dict(scores.of(pairs))
    assert scores.of(pairs[::-1]) == first
    assert batches == [[2, 3, 5]]  # continuations of one token have the same input
    assert len(first) == 4


@pytest.mark.parametrize("context", ["", "the film was", "the film was  ", "[BOS] the film"])
def test_texts_are_encoded_as_by_the_harness(context, setup):
    from lm_eval.models.huggingface import HFLM

    adapted, _, tokenizer = setup
    harness = HFLM(pretrained=adapted.apply.model, tokenizer=tokenizer)
    seen = []
    harness._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    request = type("Request", (), {"args": (context, " good and bad")})
    harness.loglikelihood([request], disable_tqdm=True)
    assert encode_pair(tokenizer, context, " good and bad") == seen[0][1:]


def test_what_is_not_supported(setup):
    adapted, adapters, tokenizer = setup
    with pytest.raises(ValueError, match="stack"):
        harness_models(adapted._replace(params=adapters[0]), tokenizer)
    stacked = adapted._replace(params=vf.stack_adapters(adapters))
    with pytest.raises(ValueError, match="batch_size must be a positive integer, got 0"):
        harness_models(stacked, tokenizer, batch_size=0)
    lm = harness_models(stacked, tokenizer)[0]
    for call in (lm.generate_until, lm.loglikelihood_rolling):
        with pytest.raises(NotImplementedError, match=r"HFLM\(pretrained=vf.to_module"):
            call([])
    with pytest.raises(ValueError, match="the continuation '' has no tokens"):
        encode_pair(tokenizer, "the film", "")
