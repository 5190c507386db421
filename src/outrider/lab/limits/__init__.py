"""Limits that no product can reach, for measuring the distance to them."""
