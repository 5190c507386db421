"""Where experts meets a real model. One policy-gradient step on a few ranks, balanced and not (`rank`, `step`); a tiny
model that learns arithmetic (`learn`), whose routes are kept (`trace`), also on several ranks to the bit (`exact`).
"""
