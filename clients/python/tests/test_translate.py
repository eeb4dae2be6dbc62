"""What a caller says becomes what the server reads, and errors tell all that the server told."""

import grpc
from google.protobuf import json_format
from google.rpc import error_details_pb2

from clients.python.tests.harness_errors import Broken, bad_request, retry_info, with_details
from expertmesh_client import Message, Output, Sampling, Stopping, Tool, ToolCall
from expertmesh_client.errors import FieldViolation
from expertmesh_client.translate import chat_request, failure_of, generate_request

CODE = grpc.StatusCode


def as_dict(message):
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


def test_a_generate_request_says_what_was_asked_and_nothing_more():
    assert as_dict(generate_request("hi", {"request_id": "r", "model": "m"})) == {
        "request_id": "r",
        "model": "m",
        "text": "hi",
    }
    request = generate_request(
        [5, 6],
        {
            "sampling": Sampling(temperature=0, seed=2**63, logit_bias={7: -1.5}, num_sequences=2),
            "stopping": Stopping(max_tokens=9, stop_strings=["\n"], stop_token_ids=[3]),
            "output": Output(logprobs=0),
            "resume_window_s": 2.5,
        },
    )

    assert as_dict(request) == {
        "token_ids": {"ids": [5, 6]},
        "sampling": {
            "temperature": 0.0,
            "seed": str(2**63),
            "logit_bias": {"7": -1.5},
            "num_sequences": 2,
        },
        "stopping": {"max_tokens": 9, "stop_strings": ["\n"], "stop_token_ids": [3]},
        "output": {"logprobs": 0},
        "resume_window_s": 2.5,
    }


def test_a_conversation_with_tools_says_what_was_asked():
    call = ToolCall("call_1", "f", '{"a": 1}')
    messages = [
        Message("user", "go"),
        Message("assistant", reasoning="hm", tool_calls=[call]),
        Message("tool", "2", tool_call_id="call_1"),
    ]
    tools = [Tool("f", "adds one", {"type": "object"}), Tool("g")]

    assert as_dict(chat_request(messages, tools, False, {})) == {
        "messages": [
            {"role": "user", "content": "go"},
            {
                "role": "assistant",
                "reasoning": "hm",
                "tool_calls": [{"id": "call_1", "name": "f", "arguments": '{"a": 1}'}],
            },
            {"role": "tool", "content": "2", "tool_call_id": "call_1"},
        ],
        "tools": [
            {"name": "f", "description": "adds one", "parameters": '{"type": "object"}'},
            {"name": "g"},
        ],
        "enable_thinking": False,
    }
    assert call.values == {"a": 1}


def test_details_of_google_rpc_are_read_without_its_package():
    unknown = error_details_pb2.ErrorInfo(reason="R")
    failure = failure_of(
        with_details(
            CODE.RESOURCE_EXHAUSTED,
            bad_request("text", "is bad"),
            unknown,
            retry_info(1_250_000_000),
        )
    )

    assert failure.violations == (FieldViolation("text", "is bad"),)
    assert failure.retry_after_s == 1.25


def test_the_pushback_of_the_transport_overrules_the_details():
    def retry_after_s(pushback):
        metadata = (("grpc-retry-pushback-ms", pushback),)
        error = with_details(CODE.RESOURCE_EXHAUSTED, retry_info(10**9), metadata=metadata)
        return failure_of(error).retry_after_s

    assert retry_after_s("40") == 0.04
    assert retry_after_s("-1") is None  # not to be tried again
    assert retry_after_s("soon") is None


def test_details_that_cannot_be_read_leave_the_status():
    trailing = (("grpc-status-details-bin", b"\xff\xff\xff"),)
    failure = failure_of(Broken(CODE.INVALID_ARGUMENT, "why", trailing))

    assert (failure.code, failure.message, failure.violations) == (CODE.INVALID_ARGUMENT, "why", ())
    assert failure_of(Broken(CODE.UNAVAILABLE, None, None)).message == ""
