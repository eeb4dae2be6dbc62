"""Errors as grpc raises them, without a call behind them."""

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2


class Broken(grpc.RpcError):
    """A call's end, as a channel tells it."""

    def __init__(self, code, message="it broke", trailing=()):
        super().__init__(message)
        self._parts = (code, message, trailing)

    def code(self):
        return self._parts[0]

    def details(self):
        return self._parts[1]

    def trailing_metadata(self):
        return self._parts[2]


def with_details(code, *details, metadata=()):
    """Return an error whose trailing metadata carry a google.rpc.Status."""
    status = status_pb2.Status(code=code.value[0], message="told")
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        status.details.append(packed)
    trailing = (("grpc-status-details-bin", status.SerializeToString()), *metadata)
    return Broken(code, "told", trailing)


def bad_request(field, description):
    violation = error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
    return error_details_pb2.BadRequest(field_violations=[violation])


def retry_info(nanoseconds):
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(nanoseconds)
    return error_details_pb2.RetryInfo(retry_delay=delay)
