"""The processes and the command line: parse, connect, loop, close. No arithmetic lives here."""
