"""The code behind the command line: the report, the benchmark and the tuner. Only the command line imports it."""
