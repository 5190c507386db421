"""Twins of the live movers on the virtual clock, and the modelled engines and links that they move on."""
