"""What a gateway knows of one link: above all, what its worker computed when it ended."""

from collections import deque

import pytest
import torch

from workers.dispatch.header import Header, Kind, ReplyFrame, RequestFrame
from workers.dispatch.link_set import OpenLink
from workers.dispatch.options import MessageShape
from workers.errors import LinkClosedError
from workers.placement import MemberId

SHAPE = MessageShape(hidden_size=4, top_k=2, dtype=torch.float32)


class FakeLink:
    incarnation = 1

    def __init__(self):
        self.sent = []
        self.arriving = deque()
        self.is_closed = False

    def send(self, frame, header):
        if self.is_closed:
            raise LinkClosedError("the link is closed")
        self.sent.append((header.kind, header.message_id))

    def receive(self, frame):
        return self.arriving.popleft()

    def close(self):
        self.is_closed = True

    def request_frame(self, capacity_rows=None):
        return RequestFrame(SHAPE, 4 if capacity_rows is None else capacity_rows)

    def reply_frame(self, capacity_rows=None):
        return ReplyFrame(SHAPE, 4 if capacity_rows is None else capacity_rows)


@pytest.fixture
def link():
    return FakeLink()


@pytest.fixture
def opened(link):
    return OpenLink(MemberId("worker-0", 1), link, num_buffers=2)


def arrive(opened, kind, message_id):
    opened.link.arriving.append(Header(kind, message_id, 1))
    return opened.receive_one()


def test_a_worker_that_ends_after_begun_ended_by_that_message(opened):
    assert opened.ended_by is None
    assert arrive(opened, Kind.BEGUN, 7) is None
    assert opened.ended_by == 7
    assert arrive(opened, Kind.BEGUN, 8) is None
    assert opened.ended_by == 8, "the next one began, after this side had been silent for long"


def test_a_reply_that_has_come_acquits_whether_or_not_the_model_has_seen_it(opened, link):
    arrive(opened, Kind.BEGUN, 7)
    header, _ = arrive(opened, Kind.REPLY, 7)
    assert header.message_id == 7
    assert opened.ended_by is None
    assert link.sent == [(Kind.SETTLED, 7)]


def test_the_reply_to_another_message_acquits_nobody_and_is_not_confirmed(opened, link):
    """An older worker echoes flags, says no BEGUN, and knows no SETTLED."""
    arrive(opened, Kind.REPLY, 6)
    arrive(opened, Kind.BEGUN, 7)
    arrive(opened, Kind.REPLY, 5)
    assert opened.ended_by == 7
    assert link.sent == []


def test_a_link_that_this_side_closes_tells_nothing_about_the_worker(opened):
    arrive(opened, Kind.BEGUN, 7)
    opened.close()
    assert opened.ended_by is None


def test_nor_does_one_that_the_worker_closes_on_request(opened, link):
    arrive(opened, Kind.BEGUN, 7)
    blamed = []
    link.send = lambda frame, header: blamed.append(opened.ended_by)  # it closes on BYE
    opened.say_bye()
    assert blamed == [None]
    assert link.is_closed


def test_a_reply_comes_even_if_it_can_no_longer_be_confirmed(opened, link):
    arrive(opened, Kind.BEGUN, 7)
    link.is_closed = True
    assert arrive(opened, Kind.REPLY, 7) is not None
