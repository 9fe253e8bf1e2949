"""What an operator lets URLs reach that come from outside."""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Any

from app.net.addresses import Address, Network, is_public, unwrapped
from app.settings import Settings

HTTP_PORT, HTTPS_PORT = 80, 443


@dataclass(frozen=True)
class Rules:
    """``networks`` count as public. Ports are those of both schemes."""

    networks: tuple[Network, ...] = ()
    allow_http: bool = False
    ports: tuple[int, ...] = (HTTPS_PORT,)

    @classmethod
    def of(cls, settings: Settings) -> "Rules":
        ports = {HTTPS_PORT, *settings.allowed_ports}
        if settings.allow_http:
            ports.add(HTTP_PORT)
        networks = tuple(settings.allowed_networks)
        return cls(networks, settings.allow_http, tuple(sorted(ports)))

    def admit(self, address: Address) -> bool:
        plain = unwrapped(address)
        return any(plain in network for network in self.networks) or is_public(address)

    @property
    def schemes(self) -> tuple[str, ...]:
        return ("https", "http") if self.allow_http else ("https",)

    @property
    def ports_told(self) -> str:
        return ", ".join(map(str, self.ports))

    def as_plain(self) -> dict[str, Any]:
        """For another process."""
        networks = [str(network) for network in self.networks]
        return {"networks": networks, "allow_http": self.allow_http, "ports": list(self.ports)}

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> "Rules":
        networks = tuple(map(ip_network, values["networks"]))
        return cls(networks, values["allow_http"], tuple(values["ports"]))
