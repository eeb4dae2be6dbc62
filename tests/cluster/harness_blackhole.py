"""Serves and answers in a network namespace whose only way out is a hole that keeps what falls in.

Run as `unshare --net --mount python -m tests.cluster.harness_blackhole (sealed | watched)`. Sealed:
nothing but the loopback device is up. Watched: a TUN device that this process reads takes the
default route, and this process is the name server, so that every packet that any process sends out
and every name that it asks for is seen. Prints one JSON line.
"""

import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading

from tests.cluster.harness_serve import served, token_ids

TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
MAX_PACKET_BYTES = 65_536
NO_SUCH_NAME = b"\x81\x83"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=10)


def open_hole() -> int:
    """Give the namespace a default route that ends in this process; return its descriptor."""
    hole = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(hole, TUNSETIFF, struct.pack("16sH", b"hole", IFF_TUN | IFF_NO_PI))
    ip("addr", "add", "192.0.2.2/24", "dev", "hole")
    ip("link", "set", "hole", "up")
    ip("route", "add", "default", "dev", "hole")
    return hole


def destination(packet: bytes) -> str:
    """Return where an IP packet was to go; kernel chatter of IPv6 neighbours is none."""
    if packet[0] >> 4 == 4:
        return ".".join(str(byte) for byte in packet[16:20])
    address = packet[24:40].hex()
    return "" if address.startswith("ff02") else address


def watch(hole: int, sent_to: set[str]) -> None:
    while True:
        sent_to.add(destination(os.read(hole, MAX_PACKET_BYTES)))


def become_name_server() -> socket.socket:
    """Let every process of the namespace ask this one for names."""
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        file.write("nameserver 127.0.0.1\n")
        file.flush()
        command = ["mount", "--bind", file.name, "/etc/resolv.conf"]
        subprocess.run(command, check=True, timeout=10)
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.bind(("127.0.0.1", 53))
    return server


def answer_names(server: socket.socket, asked: set[str]) -> None:
    """Know no name, and keep the questions."""
    while True:
        query, client = server.recvfrom(MAX_PACKET_BYTES)
        labels, at = [], 12
        while size := query[at]:
            labels.append(query[at + 1 : at + 1 + size].decode())
            at += 1 + size
        asked.add(".".join(labels))
        question = query[12 : at + 5]
        server.sendto(query[:2] + NO_SUCH_NAME + b"\0\1" + bytes(6) + question, client)


def send_probe() -> None:
    """Send one packet out and ask for one name, to see that the watch works."""
    program = (
        "import socket\n"
        "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('192.0.2.9', 9))\n"
        "try: socket.getaddrinfo('probe.invalid', 9)\n"
        "except OSError: pass\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)


def main(way: str) -> None:
    ip("link", "set", "lo", "up")
    sent_to: set[str] = set()
    asked: set[str] = set()
    if way == "watched":
        for body, *arguments in (
            (watch, open_hole(), sent_to),
            (answer_names, become_name_server(), asked),
        ):
            threading.Thread(target=body, args=arguments, daemon=True).start()
        send_probe()
    with served("--model", "demo", "--expert-workers", "1") as cluster:
        tokens = token_ids(cluster.generate(max_tokens=8))
    report = {"tokens": len(tokens), "sent_to": sorted(sent_to - {""}), "asked": sorted(asked)}
    print(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
