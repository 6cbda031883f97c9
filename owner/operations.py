"""What an operator can ask of the cluster: the verbs themselves, without a wire and without a terminal.

`owner.api` turns these into gRPC and `owner.cli` into commands. The contract with the service is `owner.view`.
"""

from __future__ import annotations

from owner.view import ChangefeedRegistry, ChangefeedRuntime, OwnerView

__all__ = ["ChangefeedRegistry", "ChangefeedRuntime", "OwnerView"]
