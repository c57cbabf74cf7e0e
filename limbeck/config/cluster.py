"""Machines that are not here, by the numbers that their maker or owner states: what `limbeck check` predicts from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from limbeck.config.section import Section

Amount = Annotated[float, Field(gt=0, le=1e9)]
Count = Annotated[int, Field(ge=1, le=100_000)]


class Rates(Section):
    """TFLOP/s of dense matrix products on one device, by type. Without bfloat16, that is as fast as float32."""

    float32: Amount
    bfloat16: Amount | None = None


class Cluster(Section):
    """Nodes of equal devices, one rank on each device. A GB is 10^9 bytes.

    Args:
        name: what the prediction calls them.
        kind: `cpu` for processors, where chunks of logits and caches have fixed sizes.
        memory_gb: of a device.
        memory_gb_s: what a device reads or writes of its own memory in a second, GB.
        link_gb_s: what a device sends in a second to another in its node, GB, one way.
        network_gb_s: what a node sends in a second to another node, GB, one way.
        price_per_hour: of one device, in any one currency.
        utilisation: the share of `tflops` that training reaches.
    """

    name: Annotated[str, Field(min_length=1, max_length=80)]
    kind: Literal["gpu", "cpu"] = "gpu"
    nodes: Count = 1
    devices_per_node: Count = 1
    memory_gb: Amount
    tflops: Rates
    memory_gb_s: Amount
    link_gb_s: Amount | None = None
    network_gb_s: Amount | None = None
    price_per_hour: Annotated[float, Field(ge=0, le=1e6)] | None = None
    utilisation: Annotated[float, Field(gt=0, le=1)] = 0.4

    @model_validator(mode="after")
    def _connected(self) -> Cluster:
        if self.devices_per_node > 1 and self.link_gb_s is None:
            raise ValueError(
                f"link_gb_s is missing: say how many GB a second one of the {self.devices_per_node} devices of a node"
                " sends to another"
            )
        if self.nodes > 1 and self.network_gb_s is None:
            raise ValueError(f"network_gb_s is missing: say how many GB a second one of {self.nodes} nodes sends")
        return self

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node

    @property
    def memory_bytes(self) -> int:
        """Of a device."""
        return int(self.memory_gb * 1e9)

    @property
    def slowest_link(self) -> tuple[str, float]:
        """(its key, bytes a second) of the slowest part of a ring through all devices, which crosses each node's border
        once; infinitely fast for one device."""
        links = {}
        if self.devices_per_node > 1 and self.link_gb_s is not None:
            links["link_gb_s"] = self.link_gb_s * 1e9
        if self.nodes > 1 and self.network_gb_s is not None:
            links["network_gb_s"] = self.network_gb_s * 1e9
        return min(links.items(), key=lambda link: link[1], default=("link_gb_s", float("inf")))

    @property
    def in_words(self) -> str:
        """Their number and name."""
        devices = f"{self.devices_per_node} device{'s' if self.devices_per_node > 1 else ''}"
        return f"{self.name}: {self.nodes} node{'s' if self.nodes > 1 else ''} of {devices}"
