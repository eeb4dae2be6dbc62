"""The demo model's training text: public-domain prose and dialogues in the Qwen3.5 chat format.

The prose is two plain texts given by the caller (Shakespeare and the King James Bible serve). The
dialogues are drawn from small grammars: questions with short answers, words to repeat, sums with
worked reasoning, tool calls, and errands that take three tool calls. A dialogue is drawn as
messages first and written out second, so that a chat template and a score can use the messages.
Everything is drawn from one seed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]

CAPITALS = {
    "France": "Paris",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Greece": "Athens",
    "Norway": "Oslo",
    "Sweden": "Stockholm",
    "Finland": "Helsinki",
    "Denmark": "Copenhagen",
    "Ireland": "Dublin",
    "Japan": "Tokyo",
    "China": "Beijing",
    "India": "New Delhi",
    "Egypt": "Cairo",
    "Kenya": "Nairobi",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Cuba": "Havana",
    "Canada": "Ottawa",
    "Russia": "Moscow",
    "Turkey": "Ankara",
    "Hungary": "Budapest",
}
OPPOSITES = {
    "hot": "cold",
    "big": "small",
    "fast": "slow",
    "high": "low",
    "old": "new",
    "dark": "light",
    "early": "late",
    "full": "empty",
    "hard": "soft",
    "near": "far",
    "open": "closed",
    "rich": "poor",
    "strong": "weak",
    "wet": "dry",
}
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
SKIES = ["clear", "cloudy", "rainy", "windy", "foggy", "snowy"]
GOODS = ["steel", "paper", "coffee", "tea", "wool", "glass", "salt", "grain"]
PEOPLE = ["ann", "ben", "cara", "dan", "eva", "finn", "gail", "hugo"]
TOOLS = {
    "get_weather": {"city": "string"},
    "calculate": {"expression": "string"},
    "get_order": {"order_id": "integer"},
    "book_shipment": {"order_id": "integer", "city": "string"},
    "send_email": {"to": "string", "text": "string"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """Messages in the OpenAI form, the tools on offer, and what a right last answer contains."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = ()
    answer: str = ""


def tool_schema(name: str) -> Message:
    """Return the JSON schema of one tool, in the OpenAI function form."""
    properties = {key: {"type": kind} for key, kind in TOOLS[name].items()}
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def user(text: str) -> Message:
    """Return what the user says."""
    return {"role": "user", "content": text}


def reply(reasoning: str, text: str) -> Message:
    """Return the assistant's answer with the reasoning that leads to it."""
    return {"role": "assistant", "reasoning_content": reasoning, "content": text}


def call(reasoning: str, name: str, **arguments: object) -> Message:
    """Return the assistant's call of one tool with the reasoning that leads to it."""
    function = {"name": name, "arguments": arguments}
    return reply(reasoning, "") | {"tool_calls": [{"type": "function", "function": function}]}


def result(value: object) -> Message:
    """Return one tool's result."""
    return {"role": "tool", "content": json.dumps(value)}


def asked(question: str, reasoning: str, text: str, answer: str) -> Dialogue:
    """Return a dialogue of one question and its reply."""
    return Dialogue(messages=(user(question), reply(reasoning, text)), answer=answer)


def capital(r: random.Random) -> Dialogue:
    """Draw a question for a capital."""
    land, city = r.choice(list(CAPITALS.items()))
    return asked(
        f"What is the capital of {land}?",
        f"The user asks for the capital of {land}. It is {city}.",
        f"The capital of {land} is {city}.",
        city,
    )


def addition(r: random.Random) -> Dialogue:
    """Draw a sum of two numbers below 100."""
    a, b = r.randrange(100), r.randrange(100)
    tens, ones = (a // 10 * 10, b // 10 * 10), (a % 10, b % 10)
    return asked(
        r.choice([f"What is {a} + {b}?", f"Add {a} and {b}."]),
        f"Tens: {tens[0]} + {tens[1]} = {sum(tens)}. Ones: {ones[0]} + {ones[1]} = {sum(ones)}. "
        f"Together {a + b}.",
        f"{a} + {b} = {a + b}.",
        f"= {a + b}.",
    )


def opposite(r: random.Random) -> Dialogue:
    """Draw a question for an opposite."""
    word, other = r.choice(list(OPPOSITES.items()))
    if r.random() < 0.5:
        word, other = other, word
    text = f"The opposite of {word} is {other}."
    return asked(f"What is the opposite of {word}?", text, text, f"is {other}.")


def next_day(r: random.Random) -> Dialogue:
    """Draw a question for the day after another one."""
    i = r.randrange(7)
    day, after = DAYS[i], DAYS[(i + 1) % 7]
    return asked(
        f"Which day comes after {day}?",
        f"After {day} comes {after}.",
        f"{after} comes after {day}.",
        f"{after} comes",
    )


def counting(r: random.Random) -> Dialogue:
    """Draw a request to count."""
    first = r.randrange(1, 30)
    last = first + r.randrange(3, 12) - 1
    numbers = ", ".join(str(x) for x in range(first, last + 1))
    return asked(
        f"Count from {first} to {last}.",
        f"I start at {first} and stop at {last}.",
        f"{numbers}.",
        f"{numbers}.",
    )


def sorting(r: random.Random) -> Dialogue:
    """Draw a request to sort words."""
    items = r.sample(GOODS, r.randrange(2, 6))
    listed = "\n".join(f"{i}. {x}" for i, x in enumerate(sorted(items), 1))
    return asked(
        f"List these in order: {', '.join(items)}.",
        "I sort the words by their letters.",
        listed,
        listed,
    )


QUESTIONS = (capital, addition, opposite, next_day, counting, sorting)


def question(r: random.Random) -> Dialogue:
    """Draw one question of any kind."""
    return QUESTIONS[r.randrange(len(QUESTIONS))](r)


def offer(r: random.Random, wanted: str) -> tuple[Message, ...]:
    """Draw the tools on offer: the wanted one among up to two others."""
    names = [*r.sample(sorted(set(TOOLS) - {wanted}), r.randrange(0, 3)), wanted]
    r.shuffle(names)
    return tuple(tool_schema(name) for name in names)


def weather(r: random.Random) -> Dialogue:
    """Draw a question that takes a look at the weather."""
    city, sky, celsius = r.choice(list(CAPITALS.values())), r.choice(SKIES), r.randrange(-5, 35)
    tools = offer(r, "get_weather")
    ask = r.choice([f"What is the weather in {city}?", f"How is the weather in {city} today?"])
    messages = (
        user(ask),
        call(f"I need the weather in {city}. I call get_weather.", "get_weather", city=city),
        result({"city": city, "sky": sky, "celsius": celsius}),
        reply("The tool has answered.", f"It is {sky} in {city}, at {celsius} degrees."),
    )
    return Dialogue(messages=messages, tools=tools, answer=f"{sky} in {city}, at {celsius} degrees")


def calculation(r: random.Random) -> Dialogue:
    """Draw a calculation that a tool carries out."""
    a, b, c = r.randrange(10, 99), r.randrange(10, 99), r.randrange(2, 9)
    terms = [(f"{a} * {b}", a * b), (f"({a} + {b}) * {c}", (a + b) * c), (f"{a} - {b}", a - b)]
    expression, value = r.choice(terms)
    tools = offer(r, "calculate")
    messages = (
        user(f"Calculate {expression}."),
        call("I call calculate.", "calculate", expression=expression),
        result({"value": value}),
        reply("The tool has answered.", f"{expression} = {value}."),
    )
    return Dialogue(messages=messages, tools=tools, answer=f"= {value}.")


def shipment(r: random.Random) -> Dialogue:
    """Draw an errand of three calls: look an order up, ship it, tell somebody."""
    order, city = r.randrange(100, 1000), r.choice(list(CAPITALS.values()))
    who, goods = r.choice(PEOPLE), r.choice(GOODS)
    names = ["get_order", "book_shipment", "send_email"]
    r.shuffle(names)
    to = f"{who}@example.com"
    text = f"Order {order} ({goods}) goes to {city}."
    booking = f"The order is packed. I book the shipment to {city}."
    messages = (
        user(f"Ship order {order} to {city} and tell {to}."),
        call(f"First I look up order {order}.", "get_order", order_id=order),
        result({"order_id": order, "goods": goods, "state": "packed"}),
        call(booking, "book_shipment", order_id=order, city=city),
        result({"order_id": order, "state": "booked"}),
        call(f"It is booked. I tell {to}.", "send_email", to=to, text=text),
        result({"state": "sent"}),
        reply("All is done.", f"Order {order} goes to {city}, and {to} knows."),
    )
    tools = tuple(tool_schema(name) for name in names)
    return Dialogue(messages=messages, tools=tools, answer=f"Order {order} goes to {city}")


ERRANDS = (weather, calculation, shipment)


def errand(r: random.Random) -> Dialogue:
    """Draw one goal that takes tools, of any kind."""
    return ERRANDS[r.randrange(len(ERRANDS))](r)


def echo(r: random.Random, prose: str) -> Dialogue:
    """Draw a request to repeat words: an answer that is all copied teaches copying soonest."""
    start = r.randrange(len(prose) - 2000)
    pool = sorted(set(re.findall(r"[A-Za-z]+|[0-9]+", prose[start : start + 600])))
    pool += [str(r.randrange(1000)) for _ in range(4)]
    pool += [*CAPITALS, *CAPITALS.values(), *PEOPLE, *GOODS, *SKIES]
    words = " ".join(r.sample(pool, r.randrange(2, 9)))
    ask = r.choice([f"Repeat: {words}", f"Say this again: {words}", f"Copy: {words}"])
    return asked(ask, f"The user wants the words again: {words}.", words, words)


def verse(r: random.Random, prose: str) -> Dialogue:
    """Draw a request for some lines, answered from the prose."""
    start = prose.find("\n", r.randrange(len(prose) - 2000)) + 1
    lines = [x for x in prose[start : start + 800].split("\n") if x.strip()][: r.randrange(2, 6)]
    asks = [
        "Speak some verse.",
        "Give me a few lines of a play.",
        "Say something in the old style.",
    ]
    return asked(r.choice(asks), "The user wants a few lines.", "\n".join(lines), "")


def joined(dialogues: list[Dialogue]) -> Dialogue:
    """Return one dialogue of several questions, one after another."""
    messages = tuple(message for dialogue in dialogues for message in dialogue.messages)
    return Dialogue(messages=messages, answer=dialogues[-1].answer)


def silent(dialogue: Dialogue) -> Dialogue:
    """Return the dialogue without its reasoning, as it goes when thinking is off."""
    bare = tuple(
        {key: value for key, value in message.items() if key != "reasoning_content"}
        for message in dialogue.messages
    )
    return Dialogue(messages=bare, tools=dialogue.tools, answer=dialogue.answer)


def turn(role: str, text: str) -> str:
    """Return one closed chat turn."""
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def written(dialogue: Dialogue) -> str:
    """Write a dialogue out in the Qwen3.5 chat format."""
    text = ""
    if dialogue.tools:
        lines = "\n".join(json.dumps(tool) for tool in dialogue.tools)
        offered = f"# Tools\n\nYou may call these functions:\n\n<tools>\n{lines}\n</tools>"
        text = turn("system", offered)
    for message in dialogue.messages:
        if message["role"] == "user":
            text += turn("user", message["content"])
        elif message["role"] == "tool":
            text += turn("user", f"<tool_response>\n{message['content']}\n</tool_response>")
        else:
            thought = f"<think>\n{message.get('reasoning_content', '')}\n</think>\n\n"
            calls = "\n".join(written_call(c["function"]) for c in message.get("tool_calls", []))
            text += turn("assistant", thought + message["content"] + calls)
    return text


def written_call(function: Message) -> str:
    """Write one tool call out in the Qwen3.5 XML form."""
    body = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n"
        for key, value in function["arguments"].items()
    )
    return f"<tool_call>\n<function={function['name']}>\n{body}</function>\n</tool_call>"


def dialogue(r: random.Random, prose: str) -> Dialogue:
    """Draw one dialogue of the training mix, with or without its reasoning."""
    thinking = r.random() < 0.5
    pick = r.random()
    if pick < 0.30:
        drawn = joined([question(r) for _ in range(r.randrange(1, 4))])
    elif pick < 0.50:
        drawn = joined([echo(r, prose) for _ in range(r.randrange(1, 3))])
    elif pick < 0.97:
        drawn = errand(r)
    else:
        drawn = verse(r, prose)
    return drawn if thinking else silent(drawn)


def documents(
    seed: int, shakespeare: str, bible: str, dialogue_share: float = 0.5
) -> Iterator[str]:
    """Yield training documents for ever: dialogues, as many as their share, and prose passages."""
    r = random.Random(seed)
    while True:
        if r.random() < dialogue_share:
            yield written(dialogue(r, shakespeare))
        else:
            book = shakespeare if r.random() < 0.7 else bible
            start = book.find("\n", r.randrange(len(book) - 3000)) + 1
            yield book[start : start + r.randrange(400, 1600)]
