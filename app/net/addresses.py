"""Which addresses are public, and every spelling of one.

The lists are those of IANA's registries of special addresses, written out: what Python's
``is_global`` says differs between its versions.
"""

import socket
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

NOT_PUBLIC: tuple[Network, ...] = tuple(
    map(
        ip_network,
        (
            "0.0.0.0/8",  # this host, to Linux
            "10.0.0.0/8",
            "100.64.0.0/10",  # behind a carrier's NAT; metadata of Alibaba
            "127.0.0.0/8",
            "168.63.129.16/32",  # metadata of Azure
            "169.254.0.0/16",  # link-local; metadata of most clouds
            "172.16.0.0/12",
            "192.0.0.0/24",  # metadata of Oracle
            "192.0.2.0/24",
            "192.88.99.0/24",  # relays of 6to4
            "192.168.0.0/16",
            "198.18.0.0/15",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved, broadcast
            "2001::/23",  # of protocols: Teredo, ORCHID
            "2001:db8::/32",
            "2002::/16",  # 6to4, which has an IPv4 address in it
            "3fff::/20",
        ),
    )
)
PUBLIC_IPV6 = IPv6Network("2000::/3")  # all else is local, multicast, mapped or given to nobody
NAT64 = IPv6Network("64:ff9b::/96")  # how hosts of IPv6 alone reach those of IPv4


def is_public(address: Address) -> bool:
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        if address in NAT64:
            return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
        if address not in PUBLIC_IPV6:
            return False
    return not any(address in network for network in NOT_PUBLIC)


def unwrapped(address: Address) -> Address:
    """``::ffff:10.0.0.1`` is reached as 10.0.0.1."""
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def literal(host: str) -> Address | None:
    """The address that a host is, if it is no name: as the system's resolver reads it.

    That takes ``127.1``, ``0x7f.0.0.1``, ``017700000001`` and ``2130706433`` for addresses too.
    """
    try:
        return ip_address(host)
    except ValueError:
        pass
    try:
        return IPv4Address(socket.inet_aton(host))
    except (OSError, UnicodeError):
        return None
