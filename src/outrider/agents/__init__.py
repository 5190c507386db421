"""agents: a gateway that foresees what an agent call will cost, and orders, places and prepares by it.

Importing this is cheap: the server is `outrider.agents.gateway`, the pure core `outrider.agents.policy`.
"""

from outrider.agents.client import Workflow, workflow

__all__ = ["Workflow", "workflow"]
