"""The demo model ships whole: its files agree with each other and with its corpus."""

import json
import random

from safetensors import safe_open
from tokenizers import Tokenizer

from cluster.demo.path import demo_model_path
from examples.demo_model import corpus

MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>")


def read_json(name):
    return json.loads((demo_model_path() / name).read_text())


def test_every_file_of_the_checkpoint_is_there():
    expected = {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }

    assert expected <= {path.name for path in demo_model_path().iterdir()}


def test_the_weights_have_the_sizes_that_the_config_names():
    config = read_json("config.json")
    with safe_open(demo_model_path() / "model.safetensors", "pt") as weights:
        names = set(weights.keys())
        embedding = weights.get_slice("model.embed_tokens.weight").get_shape()
        experts = weights.get_slice("model.layers.0.mlp.experts.gate_up_proj").get_shape()

    assert [config["vocab_size"], config["hidden_size"]] == embedding
    assert config["num_experts"] == experts[0]
    assert "lm_head.weight" not in names


def test_the_tokenizer_knows_the_stop_tokens_and_the_markers_as_single_tokens():
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    stops = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]

    assert stops == read_json("generation_config.json")["eos_token_id"]
    for marker in MARKERS:
        assert len(tokenizer.encode(marker).ids) == 1
    assert tokenizer.get_vocab_size() <= read_json("config.json")["vocab_size"]


def test_dialogues_survive_the_tokenizer():
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    r = random.Random(3)
    for _ in range(50):
        text = corpus.written(corpus.errand(r))

        assert text == tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)


def test_the_corpus_is_drawn_from_its_seed_alone():
    prose = "\n".join(f"line {n} of some prose that stands in for a play" for n in range(500))
    first, again, other = (corpus.documents(seed, prose, prose) for seed in (1, 1, 2))
    drawn = [next(first) for _ in range(30)]

    assert drawn == [next(again) for _ in range(30)]
    assert drawn != [next(other) for _ in range(30)]
