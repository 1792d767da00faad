"""The frames of the wire protocol."""

from actors.session.profile import *  # noqa: F403
from actors.words import *  # noqa: F403
from gateway.wire.decode import *  # noqa: F403
from gateway.wire.encode import *  # noqa: F403
from gateway.wire.frames import *  # noqa: F403
