"""Other people's acceleration under our protocol, on the same pipeline.

peer, settings = parse("diffusers.first_block_cache@threshold=0.1")
with peer_session(pipeline, peer, steps=50, settings=settings) as session:
    out = session(prompts, seed=seeds)          # the receipt counts what the peer really left out
"""

from vivace.evaluation.peers.base import (
    Installed,
    Peer,
    PeerCard,
    contender_name,
    get,
    names,
    parse,
    registry,
)
from vivace.evaluation.peers.session import PeerSession, peer_session

__all__ = [
    "Installed",
    "Peer",
    "PeerCard",
    "PeerSession",
    "contender_name",
    "get",
    "names",
    "parse",
    "peer_session",
    "registry",
]
