"""The project's benchmarks: each compares several ways in one run, in turns, and gives its cases as `timing.Case`."""
