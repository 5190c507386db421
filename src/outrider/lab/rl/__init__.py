"""Where experts meets a real model: one policy-gradient step on a few ranks (`rank`, `step`), balanced and not; and a tiny
model that learns arithmetic (`learn`), whose routes are kept (`trace`), also on several ranks to the bit (`exact`)."""
