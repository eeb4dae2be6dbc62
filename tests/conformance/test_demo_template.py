"""transformers renders the demo model's chat template as its training text was written."""

import random

from transformers import AutoTokenizer

from cluster.demo.path import demo_model_path
from examples.demo_model import corpus


def test_transformers_renders_messages_as_the_corpus_writes_them():
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    r = random.Random(12)
    for _ in range(200):
        drawn = corpus.errand(r) if r.random() < 0.5 else corpus.question(r)
        dialogue = drawn if r.random() < 0.5 else corpus.silent(drawn)
        text = tokenizer.apply_chat_template(
            list(dialogue.messages), tools=list(dialogue.tools) or None, tokenize=False
        )

        assert corpus.written(dialogue) == text
