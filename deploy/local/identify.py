"""Find the process that opened a loopback connection, by the inode of its socket in /proc (Linux
only).

A proxy needs it to distinguish "owner0 -> processor1" from "owner1 -> processor1": both dial the
address that processor1 advertises, and a gRPC client cannot choose the address that it dials from.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path


def _hex_address(address: tuple[str, int]) -> str:
    """Return the address as /proc/net/tcp writes it: in host byte order, then the port."""
    (number,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{number:08X}:{address[1]:04X}"


_MAPPED = "0000000000000000FFFF0000"
"""The beginning of an IPv4 address in /proc/net/tcp6. gRPC dials IPv4 addresses with IPv6 sockets."""


def _inode_of(address: tuple[str, int]) -> str | None:
    plain = _hex_address(address)
    for table, wanted in (("/proc/net/tcp6", _MAPPED + plain), ("/proc/net/tcp", plain)):
        try:
            with open(table, encoding="ascii") as lines:
                next(lines)
                for line in lines:
                    words = line.split()
                    if words[1] == wanted and words[9] != "0":
                        return words[9]
        except FileNotFoundError:
            continue
    return None


def client_name(address: tuple[str, int], pids: Mapping[str, int]) -> str | None:
    """Return the name of the process among `pids` (name -> pid) that has a socket at this address."""
    inode = _inode_of(address)
    if inode is None:
        return None
    target = f"socket:[{inode}]"
    for name, pid in pids.items():
        folder = Path("/proc", str(pid), "fd")
        try:
            entries = os.listdir(folder)
        except OSError:  # the process has just ended
            continue
        for entry in entries:
            try:
                if os.readlink(folder / entry) == target:
                    return name
            except OSError:
                continue
    return None
