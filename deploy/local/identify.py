"""Which process is at the other end of a loopback connection: by the socket's inode, from /proc (Linux alone).

A proxy needs it to tell "owner0 -> processor1" from "owner1 -> processor1": both dial the one address that processor1
advertises, and gRPC lets no client choose the address that it dials from.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path


def _hex_address(address: tuple[str, int]) -> str:
    """As /proc/net/tcp writes it: the address in host byte order, then the port."""
    (number,) = struct.unpack("=I", socket.inet_aton(address[0]))
    return f"{number:08X}:{address[1]:04X}"


_MAPPED = "0000000000000000FFFF0000"
"""How /proc/net/tcp6 begins the address of an IPv6 socket that speaks IPv4; gRPC's are such."""


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
    """The name of the process among `pids` (name -> pid) whose socket is bound to this address; None when it is nobody's."""
    inode = _inode_of(address)
    if inode is None:
        return None
    target = f"socket:[{inode}]"
    for name, pid in pids.items():
        folder = Path("/proc", str(pid), "fd")
        try:
            entries = os.listdir(folder)
        except OSError:  # it has just ended
            continue
        for entry in entries:
            try:
                if os.readlink(folder / entry) == target:
                    return name
            except OSError:
                continue
    return None
