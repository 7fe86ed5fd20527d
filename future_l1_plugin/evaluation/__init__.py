"""Benchmarks whose answers are judged or taken apart after the run. Adapters to a host live in `integrations`."""
