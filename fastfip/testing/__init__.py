"""What tests and benchmarks share: tolerances and nets. Nothing else imports it."""
