"""What the command line does: the report, the benchmark, the tuner. Nothing else imports it."""
