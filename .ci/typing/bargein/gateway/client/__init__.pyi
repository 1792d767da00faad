# What the wheel installs as bargein.gateway.client is gateway/client in the sources.
from gateway.client import *  # noqa: F403
