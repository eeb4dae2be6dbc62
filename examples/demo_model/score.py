"""Score the demo model on fresh draws of its corpus, greedily.

    python score.py CHECKPOINT                 with transformers
    python score.py --target HOST:PORT         against a running server

A question is right when its answer holds what was asked for; a call when its tool and all of its
arguments are right; an errand when all of its calls are, one after the other. Prints a table, and
a JSON report with `--json FILE`.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import corpus
from corpus import Dialogue, Message

DRAWS: dict[str, Callable[[random.Random], Dialogue]] = {
    "capital": corpus.capital,
    "opposite": corpus.opposite,
    "next day": corpus.next_day,
    "addition": corpus.addition,
    "counting": corpus.counting,
    "sorting": corpus.sorting,
    "weather": corpus.weather,
    "calculation": corpus.calculation,
    "shipment": corpus.shipment,
}
GOAL_SHARE = 0.8
GOALS = ("capital", "opposite", "next day", "weather", "calculation", "shipment")
MAX_TOKENS = 160
CALL = re.compile(r"<tool_call>\n<function=(.*?)>\n(.*?)</function>\n</tool_call>", re.DOTALL)
PARAMETER = re.compile(r"<parameter=(.*?)>\n(.*?)\n</parameter>\n", re.DOTALL)


class Model(Protocol):
    """Whatever answers a conversation."""

    def answer(
        self, messages: Sequence[Message], tools: Sequence[Message], *, thinking: bool
    ) -> Message:
        """Return the assistant's next message."""
        ...


class TransformersModel:
    """A checkpoint run by transformers; the Hugging Face implementation is the reference."""

    def __init__(self, checkpoint: Path) -> None:
        import torch
        from transformers import AutoTokenizer, Qwen3_5MoeForCausalLM

        torch.set_num_threads(1)
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self._model = Qwen3_5MoeForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def answer(
        self, messages: Sequence[Message], tools: Sequence[Message], *, thinking: bool
    ) -> Message:
        """Return the assistant's next message."""
        prompt = self._tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            add_generation_prompt=True,
            enable_thinking=thinking,
            return_tensors="pt",
            return_dict=True,
        )
        ids = self._model.generate(**prompt, do_sample=False, max_new_tokens=MAX_TOKENS)
        text = self._tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
        text = text.split("<|im_end|>")[0]
        reasoning, mark, content = text.partition("\n</think>\n\n") if thinking else ("", "", text)
        if thinking and not mark:
            return {"role": "assistant", "content": ""}
        calls = [
            {"function": {"name": name, "arguments": dict(PARAMETER.findall(body))}}
            for name, body in CALL.findall(content)
        ]
        spoken = CALL.sub("", content).strip()
        answer = {"role": "assistant", "content": spoken, "tool_calls": calls}
        return answer | ({"reasoning_content": reasoning} if thinking else {})


class ServedModel:
    """A model behind a front door's `Chat`."""

    def __init__(self, target: str) -> None:
        import grpc

        from cluster.pb.expertmesh.v1 import inference_pb2
        from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub

        self._pb = inference_pb2
        self._stub = InferenceServiceStub(grpc.insecure_channel(target))

    def answer(
        self, messages: Sequence[Message], tools: Sequence[Message], *, thinking: bool
    ) -> Message:
        """Return the assistant's next message."""
        request = self._pb.ChatRequest(
            messages=[self._message(message) for message in messages],
            enable_thinking=thinking,
            sampling=self._pb.Sampling(temperature=0),
            stopping=self._pb.Stopping(max_tokens=MAX_TOKENS),
        )
        for function in (tool["function"] for tool in tools):
            request.tools.add(name=function["name"], parameters=json.dumps(function["parameters"]))
        reasoning, content, calls = "", "", []
        for response in self._stub.Chat(request, timeout=120):
            reasoning += response.reasoning
            content += response.content
            calls += [
                {"function": {"name": call.name, "arguments": json.loads(call.arguments)}}
                for call in response.tool_calls
            ]
        answer = {"role": "assistant", "content": content, "tool_calls": calls}
        return answer | ({"reasoning_content": reasoning} if thinking else {})

    def _message(self, message: Message) -> Any:
        sent = self._pb.Message(role=message["role"], content=message["content"])
        if "reasoning_content" in message:
            sent.reasoning = message["reasoning_content"]
        for call in message.get("tool_calls", []):
            function = call["function"]
            arguments = json.dumps(function["arguments"])
            sent.tool_calls.add(name=function["name"], arguments=arguments)
        return sent


def calls_of(message: Message) -> list[tuple[str, dict[str, str]]]:
    """Return a message's calls; arguments are compared as text, as the model writes them."""
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return [(f["name"], {k: str(v) for k, v in f["arguments"].items()}) for f in functions]


def mistake(model: Model, dialogue: Dialogue, *, thinking: bool) -> str:
    """Play a dialogue; return what went wrong first, or nothing.

    The model goes on from what it said itself; the tools answer as they did in the drawn dialogue.
    """
    history: list[Message] = []
    for expected in dialogue.messages:
        if expected["role"] != "assistant":
            history.append(expected)
            continue
        said = model.answer(history, dialogue.tools, thinking=thinking)
        if calls_of(expected) != calls_of(said):
            return f"called {calls_of(said)} not {calls_of(expected)}; said {said['content']!r}"
        history.append(said)
    if dialogue.answer not in history[-1]["content"]:
        return f"said {history[-1]['content']!r} not {dialogue.answer!r}"
    return ""


def scores(model: Model, kinds: Sequence[str], count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield one score for each kind of dialogue, with thinking off and on."""
    for kind in kinds:
        for thinking in (False, True):
            r = random.Random(f"{seed} {kind}")
            started_s = time.monotonic()
            wrong = []
            for _ in range(count):
                dialogue = DRAWS[kind](r)
                fault = mistake(model, dialogue, thinking=thinking)
                if fault:
                    wrong.append({"asked": dialogue.messages[0]["content"], "fault": fault})
            yield {
                "kind": kind,
                "thinking": thinking,
                "right": count - len(wrong),
                "of": count,
                "seconds": round(time.monotonic() - started_s, 1),
                "wrong": wrong,
            }


def main() -> int:
    """Score a model; the status is 1 when a kind that counts falls short of its goal."""
    parser = argparse.ArgumentParser(description="Score the demo model on fresh draws.")
    parser.add_argument("checkpoint", nargs="?", type=Path, help="run it with transformers")
    parser.add_argument("--target", metavar="HOST:PORT", help="or ask a running server")
    parser.add_argument("--kinds", nargs="+", choices=list(DRAWS), default=list(DRAWS))
    parser.add_argument("--count", type=int, default=10, help="draws of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the report there")
    given = parser.parse_args()
    if (given.checkpoint is None) == (given.target is None):
        parser.error("name a checkpoint or a --target")
    model = ServedModel(given.target) if given.target else TransformersModel(given.checkpoint)
    report = []
    print(f"{'kind':<12} {'thinking':<9} right")
    for score in scores(model, given.kinds, given.count, given.seed):
        report.append(score)
        thinking = "on" if score["thinking"] else "off"
        print(f"{score['kind']:<12} {thinking:<9} {score['right']}/{score['of']}", flush=True)
        for wrong in score["wrong"][:2]:
            print(f"    {wrong['asked']}  {wrong['fault']}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(report, indent=2) + "\n")
    short = [s for s in report if s["kind"] in GOALS and s["right"] < GOAL_SHARE * s["of"]]
    return 1 if short else 0


if __name__ == "__main__":
    sys.exit(main())
