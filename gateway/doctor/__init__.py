"""Does a daemon work? What people would try by hand, step by step, as one of its clients.

It knows the daemon by its sockets only. From the bottom up:

    faults        how a step ends that did not go well
    wording       numbers, times, and a server's own words, for people
    target        what is examined
    pages         connections and HTTP
    talk          a session of the client library that tells its failures in words
    counts        what the metrics count
    visit         one examination: its limits, and what its steps know of each other
    reaching, streaming, stopping      the steps
    steps         the table of all steps
    report        what was found
    examination   goes through the table
    command       the command line

Every wait has a limit (`Limits`), and so has the whole.
"""
