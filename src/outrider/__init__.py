"""Outrider rides ahead of an LLM: it moves KV cache, experts and requests to where they will be needed.

Importing this package costs nothing: each system is imported by name (`outrider.memory`, `outrider.experts`,
`outrider.agents`), and only `outrider.stack`, `outrider.lab` and `outrider.cli` see more than one of them.
"""

__version__ = "0.1.0"
