"""Orders inside an engine that know the future: what a scheduler is measured against. Pure.

A gateway starts calls and cannot take one back, so its srtf is without preemption. An engine that computes one token
at a time for the first in order, and whose order is this one, serves shortest remaining processing time first (SRPT),
which no order beats in mean response time on one server. Hand it to `lab.twins.engine.Engine` as `order`.
"""

from outrider.lab.twins.job import Job


def shortest_remaining(job: Job) -> tuple[float, ...]:
    """Fewest tokens still to generate first; ties by arrival. An oracle: no engine knows its answers' lengths."""
    return (job.output_tokens - job.generated, job.arrival)
