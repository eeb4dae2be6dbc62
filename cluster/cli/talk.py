"""`expertmesh chat` and `expertmesh generate`: words in, words out."""

import sys
from dataclasses import dataclass

from rich.console import Console

from cluster.cli.client import Server, channel_to
from cluster.pb.expertmesh.v1 import inference_pb2 as pb
from cluster.pb.expertmesh.v1.inference_pb2_grpc import InferenceServiceStub


@dataclass(frozen=True, slots=True)
class Ask:
    """The choices of a command line that a request carries; None leaves a field unset."""

    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None

    def sampling(self) -> pb.Sampling:
        """Return the sampling message."""
        return pb.Sampling(temperature=self.temperature, seed=self.seed)

    def stopping(self) -> pb.Stopping:
        """Return the stopping message."""
        return pb.Stopping(max_tokens=self.max_tokens)


def generate_command(server: Server, prompt: str, ask: Ask) -> None:
    """Print the continuation as it comes."""
    with channel_to(server) as channel:
        request = pb.GenerateRequest(text=prompt, sampling=ask.sampling(), stopping=ask.stopping())
        for response in InferenceServiceStub(channel).Generate(request):
            _say(response.text)
    _say("\n")


def chat_command(
    server: Server, message: str | None, system: str, thinking: bool | None, ask: Ask
) -> None:
    """Hold a dialogue, or ask one question when `message` is given."""
    console = Console(stderr=True)
    history = [pb.Message(role="system", content=system)] if system else []
    with channel_to(server) as channel:
        stub = InferenceServiceStub(channel)
        while True:
            text = message if message is not None else _read()
            if text is None:
                return
            history.append(pb.Message(role="user", content=text))
            request = pb.ChatRequest(
                messages=history,
                enable_thinking=thinking,
                sampling=ask.sampling(),
                stopping=ask.stopping(),
            )
            history.append(_answer(stub, request, console))
            if message is not None:
                return


def _answer(stub: InferenceServiceStub, request: pb.ChatRequest, console: Console) -> pb.Message:
    reasoning = content = ""
    console_is_open = False  # reasoning was printed, and its line not yet ended
    calls: list[pb.ToolCall] = []
    for response in stub.Chat(request):
        reasoning += response.reasoning
        content += response.content
        calls.extend(response.tool_calls)
        if response.reasoning:
            console.print(response.reasoning, end="", style="dim", highlight=False, markup=False)
            console_is_open = True
        elif response.content and console_is_open:
            console.print()
            console_is_open = False
        _say(response.content)
    _say("\n")
    return pb.Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls)


def _read() -> str | None:
    """Return the next line that is not empty, or None at the end of the input."""
    while True:
        if sys.stdin.isatty():
            _say("> ")
        line = sys.stdin.readline()
        if not line:
            return None
        if line.strip():
            return line.strip()


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
