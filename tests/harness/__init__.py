"""For integration tests of what talks to a gateway: a real one, a client, fixtures.

    with run_gateway(model="story") as gateway, gateway.connect() as client:
        answer = client.ask("Tell me a story")

`README.md` beside this file is the manual. Importing this patches nothing and starts nothing.
"""

from bargein.gateway.client import (
    Answer,
    AnswerEnded,
    Collected,
    ConnectionEnded,
    Frame,
    FrameRefused,
    WaitTimeout,
)

from .chat import ChatClient
from .protocol import (
    AckStatus,
    Error,
    ErrorCode,
    FunctionCall,
    InterruptAck,
    InterruptOutcome,
    InterruptReason,
    InterruptResult,
    Outcome,
    RegisterAck,
    Response,
    SessionInfo,
    Shutdown,
    Usage,
)
from .running import ProviderRequest, RunningGateway, RunningProvider, StartFailed, run_gateway

__all__ = [
    "AckStatus",
    "Answer",
    "AnswerEnded",
    "ChatClient",
    "Collected",
    "ConnectionEnded",
    "Error",
    "ErrorCode",
    "Frame",
    "FrameRefused",
    "FunctionCall",
    "InterruptAck",
    "InterruptOutcome",
    "InterruptReason",
    "InterruptResult",
    "Outcome",
    "ProviderRequest",
    "RegisterAck",
    "Response",
    "RunningGateway",
    "RunningProvider",
    "SessionInfo",
    "Shutdown",
    "StartFailed",
    "Usage",
    "WaitTimeout",
    "run_gateway",
]
