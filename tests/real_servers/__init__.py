"""Real OpenAI-compatible servers and proxies, each in an environment of its own.

python -m tests.real_servers.install DIR          all of them, or by name
BARGEIN_REAL_SERVERS=DIR python -m pytest tests/test_real_servers.py
"""
