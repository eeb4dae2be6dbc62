"""Let a model run an errand: it calls tools, this program carries them out and reports back.

    python examples/errand.py --server HOST:PORT "Ship order 123 to Oslo and tell ann@example.com."

It sends the conversation through `Client.chat`, runs the calls that come back, adds their results,
and goes on until the model answers without a call. The tools work on a small
office that lives in this process only: nothing is shipped and no mail leaves. Ends with status 1
when the model is not done after `--rounds`.
"""

from __future__ import annotations

import argparse
import ast
import json
import operator
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from expertmesh_client import Client, Message, Sampling, Stopping, Tool, ToolCall

GOAL = "Ship order 123 to Oslo and tell ann@example.com."
TYPES = {int: "integer", str: "string"}
GOODS = ["steel", "paper", "coffee", "tea", "wool", "glass", "salt", "grain"]
WINTER = {
    "Oslo": ("snowy", -4),
    "Cairo": ("clear", 19),
    "London": ("rainy", 7),
}  # an almanac's word
OPERATORS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
ANSWER_DEADLINE_S = 120.0


class ToolError(Exception):
    """A tool cannot do what it was asked; the model is told why."""


@dataclass
class Office:
    """A small office: orders 100 to 999 lie packed, shipments and mails are written down."""

    shipments: dict[int, str] = field(default_factory=dict)
    mails: list[tuple[str, str]] = field(default_factory=list)

    def get_weather(self, city: str) -> dict[str, object]:
        """Look the weather up."""
        if city not in WINTER:
            raise ToolError(f"the almanac has no page for {city}")
        sky, celsius = WINTER[city]
        return {"city": city, "sky": sky, "celsius": celsius}

    def calculate(self, expression: str) -> dict[str, object]:
        """Work out a sum, difference, product or quotient."""
        try:
            return {"value": evaluated(ast.parse(expression, mode="eval").body)}
        except (SyntaxError, ZeroDivisionError) as error:
            raise ToolError(f"cannot calculate {expression}: {error}") from error

    def get_order(self, order_id: int) -> dict[str, object]:
        """Look an order up."""
        self._find(order_id)
        state = "booked" if order_id in self.shipments else "packed"
        return {"order_id": order_id, "goods": GOODS[order_id % len(GOODS)], "state": state}

    def book_shipment(self, order_id: int, city: str) -> dict[str, object]:
        """Book a shipment of a packed order."""
        self._find(order_id)
        if order_id in self.shipments:
            raise ToolError(f"order {order_id} goes to {self.shipments[order_id]} already")
        self.shipments[order_id] = city
        return {"order_id": order_id, "state": "booked"}

    def send_email(self, to: str, text: str) -> dict[str, object]:
        """Send a mail."""
        if "@" not in to:
            raise ToolError(f"{to} is not an address")
        self.mails.append((to, text))
        return {"state": "sent"}

    def _find(self, order_id: int) -> None:
        if not 100 <= order_id <= 999:
            raise ToolError(f"there is no order {order_id}")


TOOLS: dict[str, dict[str, type]] = {
    "get_weather": {"city": str},
    "calculate": {"expression": str},
    "get_order": {"order_id": int},
    "book_shipment": {"order_id": int, "city": str},
    "send_email": {"to": str, "text": str},
}


def evaluated(node: ast.expr) -> float:
    """Return the value of an arithmetic expression; nothing else is ever run."""
    match node:
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](evaluated(left), evaluated(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -evaluated(operand)
        case _:
            raise ToolError("only numbers, + - * / and brackets can be calculated")


def offered(names: list[str]) -> Iterator[Tool]:
    """Yield the tools as the model is to see them."""
    for name in names:
        properties = {key: {"type": TYPES[kind]} for key, kind in TOOLS[name].items()}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
        yield Tool(name, parameters=schema)


def carried_out(office: Office, call: ToolCall) -> dict[str, object]:
    """Run one call; a mistake of the model's is answered too, and it may try again."""
    try:
        arguments = checked_arguments(call)
        result: dict[str, object] = getattr(office, call.name)(**arguments)
    except ToolError as error:
        return {"error": str(error)}
    return result


def checked_arguments(call: ToolCall) -> dict[str, Any]:
    """Return the arguments of a call that names a tool and gives it what it takes."""
    wanted = TOOLS.get(call.name)
    if wanted is None:
        raise ToolError(f"there is no tool {call.name}")
    arguments = call.values
    if {key: type(value) for key, value in arguments.items()} != wanted:
        names = ", ".join(f"{key}: {TYPES[kind]}" for key, kind in wanted.items())
        raise ToolError(f"{call.name} takes {names}")
    return arguments


def answer(client: Client, history: list[Message], given: argparse.Namespace) -> Message:
    """Send the conversation and print the answer as it comes."""
    stream = client.chat(
        history,
        tools=offered(given.tools),
        enable_thinking=given.thinking,
        sampling=Sampling(temperature=0),
        stopping=Stopping(max_tokens=256),
        timeout_s=ANSWER_DEADLINE_S,
    )
    is_reasoning = False
    for update in stream:
        if is_reasoning and update.text:
            print()
        is_reasoning = bool(update.reasoning) or (is_reasoning and not update.text)
        print(update.reasoning + update.text, end="", flush=True)
    return stream.collect().message


def run_errand(client: Client, office: Office, given: argparse.Namespace) -> bool:
    """Go on until the model answers without a call; says whether it did within the rounds."""
    history = [Message("user", given.goal)]
    for _ in range(given.rounds):
        print("model: ", end="")
        reply = answer(client, history, given)
        history.append(reply)
        if not reply.tool_calls:
            print()
            return True
        for call in reply.tool_calls:
            result = json.dumps(carried_out(office, call))
            print(f"\n  calls {call.name} {call.arguments}\n  and is told {result}")
            history.append(Message("tool", result, tool_call_id=call.id))
    return False


def main() -> int:
    """Run one errand; returns the exit status."""
    parser = argparse.ArgumentParser(description="Let a model run an errand with tools.")
    parser.add_argument("goal", nargs="?", default=GOAL)
    parser.add_argument("--server", default="127.0.0.1:50051", metavar="HOST:PORT")
    parser.add_argument("--rounds", type=int, default=8, help="answers to wait for at most")
    parser.add_argument("--thinking", action="store_true", help="let the model reason first")
    parser.add_argument(
        "--tools",
        nargs="+",
        choices=sorted(TOOLS),
        default=["get_order", "book_shipment", "send_email"],
        help="what to offer; the demo model has never seen more than three at once",
    )
    given = parser.parse_args()
    office = Office()
    print(f"user: {given.goal}")
    with Client(given.server) as client:
        done = run_errand(client, office, given)
    for order_id, city in office.shipments.items():
        print(f"booked: order {order_id} to {city}")
    for to, text in office.mails:
        print(f"mail to {to}: {text}")
    if not done:
        print(f"the model was not done after {given.rounds} answers", file=sys.stderr)
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
