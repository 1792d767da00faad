"""Tests a running daemon step by step, as one of its clients.

It reaches the daemon only through its ports. From the bottom up:

    faults        how a step ends: failed or skipped
    wording       numbers, times, and a server's text, for people
    target        the daemon's addresses, and the credentials for it
    pages         connections and HTTP
    talk          a client session whose errors are step failures, in words
    counts        reads the daemon's metrics, and counts what the steps did
    visit         one examination: its limits, and what its steps share
    reaching, streaming, stopping      the steps
    steps         the table of all steps
    report        the results, as text and as JSON
    examination   runs the steps of the table
    command       the command line

Every wait has a limit (`Limits`), and so has the whole examination.
"""
