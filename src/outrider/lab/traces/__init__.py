"""Readers of traces: a file of calls as it was published -> a Workload that the simulator runs."""
